//! A source's connections to a destination, which may take long and can be cancelled meanwhile.

use super::{Outgoing, Reader};
use crate::channel::write_all;
use crate::watch::{Brings, Watch, Watched};
use crate::{Address, Channel, ChannelName, Job, MigrationError, Socket, Timeouts, Tls, TlsChannel, WriteSlice};
use qevm_multifd::{Init, Uuid};
use qevm_wire::Writer;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a migration that is being connected looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(20);

/// What is connected.
#[derive(Debug, Clone, Copy)]
pub(super) enum Names {
    /// The main channel, and this many page channels.
    Pages(u8),
    /// The preempt channel.
    Preempt,
}

impl Names {
    fn list(self) -> Vec<ChannelName> {
        match self {
            Names::Pages(channels) => {
                [ChannelName::Main].into_iter().chain((0..channels).map(ChannelName::Page)).collect()
            }
            Names::Preempt => vec![ChannelName::Preempt],
        }
    }
}

/// What a thread that connects is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    LookUp,
    Connect,
    Handshake,
}

impl Step {
    fn text(self) -> &'static str {
        match self {
            Step::LookUp => "the look-up of its name",
            Step::Connect => "a connection to it",
            Step::Handshake => "the TLS handshake",
        }
    }

    fn limit(self, timeouts: &Timeouts) -> (Option<Duration>, &'static str) {
        match self {
            Step::LookUp | Step::Connect => (timeouts.connect(), "x-connect-timeout"),
            Step::Handshake => (timeouts.handshake(), "x-handshake-timeout"),
        }
    }
}

/// What a connecting thread reports.
enum Progress {
    At(Step),
    Connected(Result<Arc<dyn Channel>, MigrationError>),
}

/// Connects these, until `job` is cancelled or one takes too long. To look a name up and to connect may take minutes
/// and cannot be interrupted everywhere: a thread of its own does it, which is not waited for then, and which connects
/// no more.
pub(super) fn connect(address: &Address, job: &Job, names: Names) -> Result<Outgoing, MigrationError> {
    let failed = |source| MigrationError::Connect { address: address.clone(), source };
    let (sender, news) = mpsc::channel();
    let (to, tls, waits, list) = (address.clone(), job.tls(), job.waits(), names.list());
    let (greeted, uuid) = (tls.is_some(), job.uuid().unwrap_or_default());
    let wanted = Arc::new(());
    let still = Arc::downgrade(&wanted);
    let connecting = move || {
        for name in list {
            let at = &mut |step| drop(sender.send(Progress::At(step)));
            let mut channel = secured(&to, tls.as_ref(), name, &waits, &|| still.strong_count() > 0, at);
            if greeted && let ChannelName::Page(number) = name {
                channel = channel.and_then(|channel| greet(channel, number, uuid));
            }
            let failed = channel.is_err();
            if sender.send(Progress::Connected(channel)).is_err() || failed {
                return;
            }
        }
    };
    thread::Builder::new().name("connect".into()).spawn(connecting).map_err(failed)?;
    let next = |name: ChannelName| {
        let (mut step, mut since) = (Step::LookUp, Instant::now());
        loop {
            // As with a QEMU, `query-migrate` then says what was cancelled.
            job.check().map_err(|cancelled| failed(io::Error::new(io::ErrorKind::Interrupted, cancelled)))?;
            match news.recv_timeout(CANCEL_POLL) {
                Ok(Progress::At(next)) => (step, since) = (next, Instant::now()),
                Ok(Progress::Connected(channel)) => return channel,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(failed(io::Error::other("its thread has ended"))),
            }
            let (limit, parameter) = step.limit(&job.waits().timeouts());
            if let Some(limit) = limit
                && since.elapsed() >= limit
            {
                let (seconds, step) = (limit.as_secs_f64(), step.text());
                let why = format!("{step} for {name} has taken more than {seconds} s ({parameter})");
                return Err(failed(io::Error::new(io::ErrorKind::TimedOut, why)));
            }
        }
    };
    let mut channels = names.list().into_iter().map(next).collect::<Result<Vec<_>, _>>()?.into_iter();
    drop(wanted);
    let Some(main) = channels.next() else { return Err(failed(io::ErrorKind::NotConnected.into())) };
    let (pages, address) = (channels.collect(), Some(address.clone()));
    Ok(Outgoing { pages, greeted, reader: Reader::Answers, address, watched: true, ..main.into() })
}

/// Sends the first packet of page channel `number`. A QEMU reads it from each session before it goes on with the
/// handshake of the next.
fn greet(channel: Arc<dyn Channel>, number: u8, uuid: Uuid) -> Result<Arc<dyn Channel>, MigrationError> {
    let mut packet = Writer::new();
    Init::new(uuid, number).encode(&mut packet);
    let failed = |source| MigrationError::Send { doing: "the first packet of a page channel", source };
    write_all(&*channel, &mut [WriteSlice::bytes(packet.as_bytes())]).map_err(failed)?;
    Ok(channel)
}

/// Connects to `address`; with `tls`, as its client.
fn secured(
    address: &Address,
    tls: Option<&Tls>,
    name: ChannelName,
    waits: &Arc<Watch>,
    wanted: &dyn Fn() -> bool,
    at: &mut dyn FnMut(Step),
) -> Result<Arc<dyn Channel>, MigrationError> {
    let failed = |source| MigrationError::Connect { address: address.clone(), source };
    at(Step::LookUp);
    let found = Socket::look_up(address).map_err(failed)?;
    at(Step::Connect);
    let socket = Arc::new(Socket::connect_to(address, &found, wanted).map_err(failed)?);
    let socket: Arc<dyn Channel> =
        Arc::new(Watched::new(socket, name, waits, Brings::Answers, Some(address)).map_err(failed)?);
    let Some(tls) = tls else { return Ok(socket) };
    at(Step::Handshake);
    let host = match address {
        Address::Tcp { host, .. } => Some(if host.is_empty() { "localhost" } else { host }),
        _ => None,
    };
    // The caller that waits for this thread gives up first, and says what for.
    let patience = || waits.timeouts().handshake().map(|limit| limit + 10 * CANCEL_POLL);
    let session = TlsChannel::connect_within(socket, tls, host, &patience);
    Ok(Arc::new(session.map_err(failed)?))
}
