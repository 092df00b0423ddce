//! The thread that reads the stream when the guest runs before its memory has come.

use super::assembly::Assembly;
use super::missing::Shared;
use crate::core::destination::{Action, Destination, Turn};
use crate::destination::leave;
use crate::stream_reader::StreamReader;
use crate::{Channel, MigrationError, verdict};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::sync::Arc;
use std::time::Instant;

/// The stream, and what it says.
pub(super) struct Stream {
    pub(super) shared: Arc<Shared>,
    core: Mutex<Destination>,
    /// The guest has been started, or will not be.
    started: Condvar,
    /// Time 0 of the core.
    pub(super) start: Instant,
}

impl Stream {
    pub(super) fn new(shared: Arc<Shared>, core: Destination, start: Instant) -> Self {
        Stream { shared, core: Mutex::new(core), started: Condvar::new(), start }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Destination> {
        self.core.lock()
    }

    /// Who waits for the start of the guest looks again.
    pub(super) fn wake(&self) {
        self.started.notify_all();
    }

    /// Reads to the end, or until something fails. `first` has been read already; the core knows where that is.
    pub(super) fn read(&self, mut channel: Arc<dyn Channel>, mut first: Vec<u8>) {
        loop {
            let mut reader = StreamReader::new(&*channel, &first, self.core().offset());
            match self.follow(&*channel, &mut reader) {
                Ok(()) => break,
                // What a source has said or not said is no reason to lose the guest.
                Err(error) if self.core().runs_early() && !is_local(&error) => {
                    match self.shared.next_line(&error) {
                        Some(next) => (channel, first) = next,
                        None => break,
                    }
                    self.core().reconnected();
                }
                Err(error) => {
                    leave(&mut self.core(), &*channel, self.start, &error, |message| self.shared.send(message));
                    self.shared.fail(error);
                    break;
                }
            }
        }
        channel.finish_writing();
        self.shared.end();
    }

    /// Does what the core says.
    fn follow(&self, channel: &dyn Channel, reader: &mut StreamReader<'_>) -> Result<(), MigrationError> {
        let mut assembly = Assembly::default();
        loop {
            let mut core = self.core();
            let Turn { consumed, action } = core.next(reader.bytes())?;
            match action {
                Action::Place { page, content } => {
                    let at = core.offset();
                    drop(core);
                    self.shared.place(&page, content, &mut assembly, at)?;
                }
                Action::Continue => {}
                Action::Read { at_least, .. } => {
                    drop(core);
                    let filled = reader.fill(at_least)?;
                    let mut core = self.core();
                    match filled {
                        true => core.arrived(self.start.elapsed()),
                        false => core.end_of_input(),
                    }
                }
                Action::Send(message) => {
                    drop(core);
                    self.shared.send(&message);
                }
                Action::SendBitmap(block) => {
                    drop(core);
                    self.shared.send_bitmap(block.index())?;
                }
                Action::Resume => {
                    drop(core);
                    self.shared.resumed();
                }
                Action::AwaitStart => self.started.wait(&mut core),
                Action::Tell { message, .. } => {
                    let offset = core.offset();
                    drop(core);
                    self.shared.wait_for_urgent(offset)?;
                    let mut core = self.core();
                    let _writing = self.shared.request_channel();
                    if let Err(doubt) = verdict::send(channel, &message) {
                        // The guest is here with all that it has, and the source knows that it left.
                        tracing::debug!(%doubt, "the source may not know that all of the guest is here");
                    }
                    core.told(Ok(()))?;
                }
                Action::Complete { .. } => return Ok(()),
                // The devices could not be loaded; the source has been told.
                Action::Linger { .. } => {
                    drop(core);
                    match reader.fill(1) {
                        Ok(true) => reader.consume(reader.bytes().len()),
                        _ => self.core().end_of_input(),
                    }
                    continue;
                }
                Action::Close => return Ok(()),
                other => {
                    let error = core.refuse(crate::LoadError::Unsupported(format!("{other:?} in postcopy")));
                    return Err(core.broken(error));
                }
            }
            if consumed > 0 {
                reader.consume(consumed);
            }
        }
    }
}

/// Whether something failed here, and not on the way or at the source.
fn is_local(error: &MigrationError) -> bool {
    matches!(error, MigrationError::Guest { .. })
}
