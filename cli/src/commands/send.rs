//! `qevm send`: be the source of a migration into a real QEMU's `-incoming`.

mod answers;

use super::Output;
use crate::args;
use crate::failure::Stop;
use crate::progress::Progress;
use crate::socket::{Address, Socket};
use answers::{Answer, POLL, ReturnPathReader, Sent};
use qevm_inspect::failure::Failure;
use qevm_inspect::rewrite::SavedGuest;
use qevm_inspect::rewrite::channels::{ChannelForm, Channels};
use qevm_inspect::rewrite::stream::{Multifd, Target};
use qevm_inspect::size::size;
use qevm_multifd::rules::Parameters;
use qevm_multifd::{Compression, Compressor, Init};
use qevm_savevm::framing;
use qevm_wire::capability::{self, Context};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{Capabilities, Capability, Profile, QemuVersion, Writer};
use serde_json::{Map, json};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the input is bad, the connection breaks, or the destination says that it failed; [`Stop::Usage`] if
/// the destination's release cannot take what is asked for, or cannot be reached.
pub fn run(send: &args::Send) -> Result<(), Stop> {
    let address = Address::parse(&send.address)?;
    check(send)?;
    let tls = send.tls.sessions()?;
    let mut inputs = send.input.open()?;
    let patience = Duration::from_secs(send.timeout);
    let cannot = |error: io::Error| Stop::from(Failure::io(&send.address, 0, &error));
    let connect = || -> Result<TimeoutSocket, Stop> {
        let socket = Socket::connect_within(&address, patience)
            .map_err(|error| Stop::Usage(format!("{}: cannot connect: {error}", send.address)))?;
        let socket = match &tls {
            Some(tls) => socket.seal(tls, &address, patience).map_err(|error| {
                let message = format!("no TLS session with the destination: {error}");
                Stop::from(Failure::mismatch(&send.address, 0, "", message))
            })?,
            None => socket,
        };
        // A destination with another number of channels, or without multifd, stops reading without a word.
        socket.set_write_timeout(Some(patience)).map_err(cannot)?;
        Ok(TimeoutSocket { socket: Arc::new(socket), patience, sent: Arc::default(), ahead: 0 })
    };

    // Whether there is a destination is known before a large file is read, and the destination knows that no stranger
    // has come. Older ones tell channels apart by their order only: the main channel is the first.
    let mut main = connect()?;
    let header = [framing::MAGIC.to_be_bytes(), framing::VERSION.to_be_bytes()].concat();
    main.start(&header).map_err(cannot)?;
    let mut guest = super::read_saved(&mut inputs, &send.bounds, None)?;
    let profile = profile(send, &guest);
    let multifd = match send.multifd_channels {
        None => None,
        Some(count) => {
            let named = |number| {
                let name = format!("{} (page channel {number})", send.address);
                let mut socket = connect().map_err(|stop| {
                    let message = match stop {
                        Stop::Bad(failure) => format!("page channel {number}: {}", failure.message),
                        _ => format!("the destination takes no connection for page channel {number}; {HINT}"),
                    };
                    Stop::from(Failure::mismatch(&send.address, 0, "multifd channels", message))
                })?;
                // A destination waits for these, and for nothing else, before it takes the next connection.
                let mut init = Writer::new();
                Init::new(guest.uuid(), number).encode(&mut init);
                socket.start(init.as_bytes()).map_err(|error| Stop::from(Failure::io(&name, 0, &error)))?;
                Ok((name, socket))
            };
            let sockets = (0..count).map(named).collect::<Result<Vec<_>, Stop>>()?;
            let (compression, level) = (send.multifd_compression, send.multifd_level);
            let form = ChannelForm { profile: profile.clone(), compression, level, uuid: guest.uuid() };
            Some(Multifd::new(Channels::open(sockets, &form, guest.page_geometry())?, &profile))
        }
    };
    let sent = Arc::clone(&main.sent);
    let answers = match send.no_return_path {
        true => None,
        false => {
            let socket = Arc::clone(&main.socket);
            socket.set_read_timeout(Some(POLL)).map_err(cannot)?;
            let answers = ReturnPathReader { socket, sent: Arc::clone(&sent), patience, waiting_since: None };
            Some(thread::Builder::new().spawn(move || answers.last()).map_err(cannot)?)
        }
    };

    let mut bar = Progress::new("sending", Some(guest.data_len()));
    let zero_pages = profile.zero_page_detection != ZeroPageDetection::None;
    let target = Target { out: &mut main, name: &send.address, return_path: answers.is_some(), zero_pages };
    let written = guest.write_stream(target, multifd, &mut |at| bar.at(at)).map_err(Stop::from);
    sent.all.store(true, Ordering::SeqCst);
    drop(bar);
    let confirmed = answers.is_some();
    // The destination's own word explains a broken connection, and so comes first.
    if let Some(answers) = answers {
        if written.is_err() {
            main.socket.close();
        }
        let answer = answers.join().unwrap_or_else(|_| Answer::Missing("the reader of the return path failed".into()));
        // Only the description may be under way when the destination has loaded all.
        let needed = sent.bytes.load(Ordering::SeqCst).saturating_sub(guest.description_len());
        verdict(&send.address, answer, needed, &written)?;
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

/// Judges the destination's last word: `needed` bytes of the main channel make the guest.
fn verdict(address: &str, answer: Answer, needed: u64, written: &Result<u64, Stop>) -> Result<(), Stop> {
    let message = match (answer, written) {
        (Answer::Shut { status: 0, sent }, Ok(_)) if sent < needed => {
            format!("the destination said that it has loaded the guest (SHUT 0) after {sent} of {needed} bytes")
        }
        (Answer::Shut { status: 0, .. }, _) => return Ok(()),
        (Answer::Shut { status, .. }, _) => {
            format!("the destination failed to load the guest (SHUT {status}); its own log has the reason")
        }
        (Answer::Refused(reason), _) => format!("the destination has ended the TLS session: {reason}"),
        (Answer::Wrong(reason), _) => format!("the destination said what was not asked for: {reason}"),
        (Answer::Missing(_), Err(_)) => return Ok(()), // the failed write is the better explanation
        (Answer::Missing(reason), Ok(_)) => {
            format!("the destination did not say that it has loaded the guest: {reason}")
        }
    };
    Err(Failure::mismatch(address, written.as_ref().copied().unwrap_or(0), "return path", message).into())
}

/// What a destination that hangs is asked.
const HINT: &str = "does it have the same capabilities, multifd-channels, multifd-compression and machine properties?";

/// A connection to a destination that may hang.
struct TimeoutSocket {
    socket: Arc<Socket>,
    patience: Duration,
    sent: Arc<Sent>,
    /// Bytes at the start of the stream that are sent already.
    ahead: usize,
}

impl TimeoutSocket {
    /// Sends what the channel starts with, which is not sent again.
    fn start(&mut self, first: &[u8]) -> io::Result<()> {
        self.write_all(first)?;
        self.ahead = first.len();
        Ok(())
    }
}

impl Write for TimeoutSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.ahead > 0 {
            let count = self.ahead.min(bytes.len());
            self.ahead -= count;
            return Ok(count);
        }
        // Before, for the destination may be faster than this thread.
        self.sent.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        let written = (&*self.socket).write(bytes);
        let left = bytes.len() - *written.as_ref().unwrap_or(&0);
        self.sent.bytes.fetch_sub(left as u64, Ordering::SeqCst);
        written.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                let seconds = self.patience.as_secs();
                let message = format!("the destination took nothing for {seconds} s (--timeout); {HINT}");
                io::Error::new(io::ErrorKind::TimedOut, message)
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                let message = match self.socket.refusal() {
                    None => format!("the destination closed the connection; its own log has the reason; {HINT}"),
                    Some(Some(alert)) => format!("the destination has ended the TLS session: {alert}"),
                    Some(None) => {
                        let want = "does it want this certificate (TLS)?";
                        format!("the destination closed the connection; its own log has the reason; {want} {HINT}")
                    }
                };
                io::Error::new(error.kind(), message)
            }
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
