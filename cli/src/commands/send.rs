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
use qevm_multifd::rules::Parameters;
use qevm_multifd::{Compression, Compressor};
use qevm_returnpath::{Decoder, Event, Message};
use qevm_wire::capability::{self, Context};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{Capabilities, Capability, Profile, QemuVersion, Step};
use serde_json::{Map, json};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the input is bad, the connection breaks, or the destination says that it failed; [`Stop::Usage`] if
/// the destination's release cannot take what is asked for, or cannot be reached.
pub fn run(send: &args::Send) -> Result<(), Stop> {
    let address = Address::parse(&send.address)?;
    check(send)?;
    let mut inputs = Inputs::open(&send.input)?;
    let mut guest = SavedGuest::read(&mut inputs, &send.bounds)?;
    let profile = profile(send, &guest);
    let patience = Duration::from_secs(send.timeout);
    let cannot = |error: io::Error| Stop::from(Failure::io(&send.address, 0, &error));
    let connect = || -> Result<Patient, Stop> {
        let socket = Socket::connect_within(&address, patience)
            .map_err(|error| Stop::Usage(format!("{}: cannot connect: {error}", send.address)))?;
        // A destination with another number of channels, or without multifd, stops reading without a word.
        socket.set_write_timeout(Some(patience)).map_err(cannot)?;
        Ok(Patient { socket, patience })
    };

    // Older destinations tell channels apart by their order only: the main channel is the first.
    let mut main = connect()?;
    let multifd = match send.multifd_channels {
        None => None,
        Some(count) => {
            let named = |number| {
                let name = format!("{} (page channel {number})", send.address);
                let socket = connect().map_err(|_| {
                    let message = format!("the destination takes no connection for page channel {number}; {HINT}");
                    Stop::from(Failure::mismatch(&send.address, 0, "multifd channels", message))
                })?;
                Ok((name, socket))
            };
            let sockets = (0..count).map(named).collect::<Result<Vec<_>, Stop>>()?;
            let (compression, level) = (send.multifd_compression, send.multifd_level);
            let form = ChannelForm { profile: profile.clone(), compression, level, uuid: guest.uuid() };
            Some(Multifd::new(Channels::open(sockets, &form, guest.page_geometry())?, &profile))
        }
    };
    let sent = Arc::new(AtomicBool::new(false));
    let answers = match send.no_return_path {
        true => None,
        false => {
            let socket = main.socket.try_clone().map_err(cannot)?;
            socket.set_read_timeout(Some(POLL)).map_err(cannot)?;
            let mut answers = Answers { socket, sent: Arc::clone(&sent), patience, waiting_since: None };
            Some(thread::spawn(move || answers.shut_status()))
        }
    };

    let mut bar = Progress::new("sending", Some(guest.data_len()));
    let zero_pages = profile.zero_page_detection != ZeroPageDetection::None;
    let target = Target { out: &mut main, name: &send.address, return_path: answers.is_some(), zero_pages };
    let written = guest.write_stream(target, multifd, &mut bar);
    sent.store(true, Ordering::Relaxed);
    drop(bar);
    let confirmed = answers.is_some();
    // The destination's own word explains a broken connection, and so comes first.
    if let Some(answers) = answers {
        if written.is_err() {
            main.socket.close();
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
            out.json(&object)?;
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

/// What a destination that stands still is asked.
const HINT: &str = "does it have the same capabilities, multifd-channels, multifd-compression and machine properties?";

/// A connection to a destination that may stand still.
struct Patient {
    socket: Socket,
    patience: Duration,
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                let seconds = self.patience.as_secs();
                let message = format!("the destination took nothing for {seconds} s (--timeout); {HINT}");
                io::Error::new(io::ErrorKind::TimedOut, message)
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                let message = format!("the destination closed the connection; its own log has the reason; {HINT}");
                io::Error::new(error.kind(), message)
            }
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// How often it is looked whether everything has been sent.
const POLL: Duration = Duration::from_millis(100);

/// The return path.
struct Answers {
    socket: Socket,
    /// Everything has been sent, so that the last answer is due.
    sent: Arc<AtomicBool>,
    patience: Duration,
    waiting_since: Option<Instant>,
}

impl Answers {
    /// Reads the destination's answers up to its last one.
    fn shut_status(&mut self) -> Result<u32, String> {
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
                        self.more(&mut buffer)?;
                    }
                }
                Step::NeedMore { .. } => self.more(&mut buffer)?,
                Step::End => return Err("the return path ended without SHUT".into()),
            }
        }
    }

    fn more(&mut self, buffer: &mut Vec<u8>) -> Result<(), String> {
        let mut piece = [0; 4096];
        loop {
            match self.socket.read(&mut piece) {
                Ok(0) => return Err("it closed the connection".into()),
                Ok(read) => {
                    buffer.extend_from_slice(&piece[..read]);
                    self.waiting_since = None;
                    return Ok(());
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    // While there is more to send, the destination has nothing to say.
                    if self.sent.load(Ordering::Relaxed)
                        && self.waiting_since.get_or_insert_with(Instant::now).elapsed() > self.patience
                    {
                        let seconds = self.patience.as_secs();
                        return Err(format!("no answer within {seconds} s (--timeout); {HINT}"));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

/// Refuses what the destination's release would refuse, and what cannot be written, before anything is sent.
fn check(send: &args::Send) -> Result<(), Stop> {
    let refused = |reason: String| Stop::Usage(format!("QEMU {}: {reason}", send.to));
    let mut on = Capabilities::NONE;
    let mut parameters = Parameters { zero_page_detection: send.zero_page_detection, ..Parameters::default() };
    if let Some(channels) = send.multifd_channels {
        on = on.with(Capability::Multifd, true);
        parameters.channels = channels.into();
        parameters.compression = send.multifd_compression;
    }
    let mut context = Context::new(send.to);
    context.compressed = parameters.compression != Compression::None;
    capability::check(on, &context).map_err(|error| refused(error.to_string()))?;
    parameters.check(send.to).map_err(|error| refused(error.to_string()))?;
    if send.multifd_flush_after_each_section == Some(false) && send.to < PER_ROUND {
        return Err(refused(format!("multifd-flush-after-each-section cannot be off before QEMU {PER_ROUND}")));
    }
    // The level, and whether the method can be written here.
    Compressor::new(parameters.compression, send.multifd_level)
        .map(drop)
        .map_err(|error| Stop::Usage(error.to_string()))
}

/// The first release that synchronises page channels once a round.
const PER_ROUND: QemuVersion = QemuVersion::new(8, 1);

/// What the destination reads: by its release and the machine type, unless the command line knows better.
fn profile(send: &args::Send, guest: &SavedGuest) -> Profile {
    let mut profile = Profile::new(send.to, &guest.machine());
    if let Some(mode) = send.zero_page_detection {
        profile.zero_page_detection = mode;
    }
    if let Some(each) = send.multifd_flush_after_each_section {
        profile.multifd_flush_after_each_section = each;
        // The property replaces all other flushes.
        profile.multifd_flush_at_end &= !each;
    }
    profile
}
