//! `qevm send`: be the source of a migration into a real QEMU's `-incoming`.

use super::Output;
use crate::args;
use crate::failure::{Failure, Stop};
use crate::progress::Progress;
use crate::rewrite::SavedGuest;
use crate::rewrite::channels::{ChannelForm, Channels};
use crate::rewrite::stream::{Multifd, Target};
use crate::socket::{Address, Socket};
use crate::stream::Inputs;
use crate::table::size;
use qevm_returnpath::{Decoder, Event, Message};
use qevm_wire::{Profile, Step};
use serde_json::{Map, json};
use std::io::{self, Read};
use std::thread;
use std::time::Duration;

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the input is bad, the connection breaks, or the destination says that it failed; [`Stop::Usage`] if
/// the destination cannot be reached.
pub fn run(send: &args::Send) -> Result<(), Stop> {
    let address = Address::parse(&send.address)?;
    let mut inputs = Inputs::open(&send.input)?;
    let mut guest = SavedGuest::read(&mut inputs)?;
    let profile = Profile::new(send.to, &guest.machine());
    let connect =
        || Socket::connect(&address).map_err(|error| Stop::Usage(format!("{}: cannot connect: {error}", send.address)));

    // Older destinations tell channels apart by their order only: the main channel is the first.
    let mut main = connect()?;
    let multifd = match send.multifd_channels {
        None => None,
        Some(count) => {
            let named = |number| Ok((format!("{} (page channel {number})", send.address), connect()?));
            let sockets = (0..count).map(named).collect::<Result<Vec<_>, Stop>>()?;
            let (compression, level) = (send.multifd_compression, send.multifd_level);
            let form = ChannelForm { profile: profile.clone(), compression, level, uuid: guest.uuid() };
            Some(Multifd::new(Channels::open(sockets, &form, guest.page_geometry())?, &profile))
        }
    };
    let cannot = |error: io::Error| Stop::from(Failure::io(&send.address, 0, &error));
    let answers = match send.no_return_path {
        true => None,
        false => {
            let mut socket = main.try_clone().map_err(cannot)?;
            socket.set_read_timeout(Some(Duration::from_secs(send.timeout))).map_err(cannot)?;
            Some(thread::spawn(move || shut_status(&mut socket)))
        }
    };

    let mut bar = Progress::new("sending", Some(guest.data_len()));
    let target = Target { out: &mut main, name: &send.address, return_path: answers.is_some() };
    let written = guest.write_stream(target, multifd, &mut bar);
    drop(bar);
    let confirmed = answers.is_some();
    // The destination's own word explains a broken connection, and so comes first.
    if let Some(answers) = answers {
        if written.is_err() {
            main.close();
        }
        let answer = answers.join().unwrap_or_else(|_| Err("the reader of the return path failed".into()));
        verdict(&send.address, answer, &written)?;
    }
    let bytes = written?;
    let mut out = Output::new();
    match send.output.json {
        true => {
            let mut object = Map::new();
            object.insert("address".into(), json!(send.address));
            object.insert("bytes".into(), json!(bytes));
            object.insert("confirmed".into(), json!(confirmed));
            out.json(object)?;
        }
        false => {
            let word = if confirmed { "the destination has loaded the guest" } else { "not confirmed" };
            out.line(format!("sent {} to {}: {word}", size(bytes), send.address))?;
        }
    }
    out.finish()
}

fn verdict(address: &str, answer: Result<u32, String>, written: &Result<u64, Stop>) -> Result<(), Stop> {
    let message = match (answer, written) {
        (Ok(0), _) => return Ok(()),
        (Ok(status), _) => {
            format!("the destination failed to load the guest (SHUT {status}); its own log has the reason")
        }
        (Err(_), Err(_)) => return Ok(()), // the failed write is the better explanation
        (Err(reason), Ok(_)) => format!("the destination did not say that it has loaded the guest: {reason}"),
    };
    Err(Failure::mismatch(address, written.as_ref().copied().unwrap_or(0), "return path", message).into())
}

/// Reads the destination's answers up to its last one.
fn shut_status(socket: &mut Socket) -> Result<u32, String> {
    let mut decoder = Decoder::default();
    let mut buffer = Vec::new();
    loop {
        match decoder.next(&buffer).map_err(|error| error.to_string())? {
            Step::Event { event: Event::Message(Message::Shut { status }), .. } => return Ok(status),
            Step::Event { consumed, .. } => drop(buffer.drain(..consumed)),
            Step::Payload { remaining } => {
                let count = remaining.min(buffer.len() as u64);
                decoder.skip_payload(count).map_err(|error| error.to_string())?;
                buffer.drain(..count as usize);
                if count == 0 {
                    more(socket, &mut buffer)?;
                }
            }
            Step::NeedMore { .. } => more(socket, &mut buffer)?,
            Step::End => return Err("the return path ended without SHUT".into()),
        }
    }
}

fn more(socket: &mut Socket, buffer: &mut Vec<u8>) -> Result<(), String> {
    let mut piece = [0; 4096];
    match socket.read(&mut piece) {
        Ok(0) => Err("it closed the connection".into()),
        Ok(read) => {
            buffer.extend_from_slice(&piece[..read]);
            Ok(())
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err("no answer in time (--timeout)".into())
        }
        Err(error) => Err(error.to_string()),
    }
}
