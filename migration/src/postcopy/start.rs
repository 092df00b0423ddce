//! The start of a guest whose memory is still to come.

use super::stream::Stream;
use super::{Listening, Postcopy};
use crate::core::destination::{Action, Destination, Turn};
use crate::destination::within;
use crate::{Arrival, Channel, Guest, Job, LoadError, MigrationError, Rest, Status};
use qevm_wire::Located;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a source that was told of a failure may take to close.
const LINGER: Duration = Duration::from_secs(1);
const START: &str = "start a thread for the rest of guest memory";

/// What reads the main channel up to the point where the devices are to be loaded.
pub(crate) struct Parts {
    pub(crate) core: Destination,
    pub(crate) listening: Listening,
    pub(crate) channel: Arc<dyn Channel>,
    /// Bytes that were read and not used.
    pub(crate) first: Vec<u8>,
    /// Time 0 of the core.
    pub(crate) start: Instant,
    /// Bytes that have come.
    pub(crate) bytes: u64,
}

/// Loads the devices while the stream goes on, in a thread of its own from here on.
///
/// # Errors
/// The guest has not been started, and must not be. The source has been told, as far as it listens.
pub(crate) fn start(guest: &dyn Guest, job: &Job, parts: Parts) -> Result<Arrival, MigrationError> {
    let Parts { core, mut listening, channel, first, start, bytes } = parts;
    let devices = core.devices().to_vec();
    let stream = Arc::new(Stream::new(listening.shared.clone(), core, start));
    let reading = stream.clone();
    let from = channel.clone();
    let reader = thread::Builder::new().name("postcopy".into()).spawn(move || reading.read(from, first));
    let reader = reader.map_err(|error| MigrationError::guest(START)(error.into()))?;
    let loaded = guest.devices().load(&devices);
    match run(guest, job, &stream, loaded) {
        Ok(running) => {
            let rest = Postcopy { shared: stream.shared.clone(), reader: Some(reader), asker: listening.asker.take() };
            Ok(Arrival { running, bytes, rest: Some(Rest::AtSource(rest)) })
        }
        Err(error) => Err(give_up(&stream, &*channel, reader, error)),
    }
}

/// The guest starts, if nothing has failed.
fn run(
    guest: &dyn Guest,
    job: &Job,
    stream: &Stream,
    loaded: Result<bool, crate::GuestError>,
) -> Result<bool, MigrationError> {
    let mut core = stream.core();
    core.loaded(loaded)?;
    while core.starts() {
        match core.next(&[])? {
            Turn { action: Action::Activate, .. } => {
                let activated = guest.hooks().activate();
                core.activated(activated)?;
            }
            Turn { action: Action::Send(message), .. } => stream.shared.send(&message),
            Turn { action: Action::Run { running }, .. } => {
                job.handed_over()?;
                stream.shared.start_guest()?;
                job.advance(Status::PostcopyActive)?;
                drop(core);
                stream.wake();
                return Ok(running);
            }
            Turn { action, .. } => {
                let error = LoadError::Unsupported(format!("{action:?} at the start of the guest"));
                return Err(Located::new(error, core.offset()).into());
            }
        }
    }
    // The stream has failed, and says why.
    Err(MigrationError::NoVerdict)
}

/// Tells the source that the guest is not here, and says why.
fn give_up(stream: &Stream, channel: &dyn Channel, reader: JoinHandle<()>, error: MigrationError) -> MigrationError {
    let mut core = stream.core();
    core.time(stream.start.elapsed());
    core.fail(&error);
    while let Ok(Turn { action: Action::Send(message), .. }) = core.next(&[]) {
        stream.shared.send(&message);
    }
    drop(core);
    stream.wake();
    channel.finish_writing();
    // It has reported what went wrong.
    let _ = within(LINGER, channel, || reader.join());
    let cause = stream.shared.failure().filter(|_| matches!(error, MigrationError::NoVerdict));
    cause.unwrap_or(error)
}
