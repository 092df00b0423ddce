//! A postcopy that is interrupted, and goes on.

use super::{Job, Refused, State};
use crate::{MigrationError, Outgoing, Status};

impl Job {
    /// Gives the connections of a postcopy up, which is then [interrupted](Status::PostcopyPaused) and can be
    /// [recovered](Self::recover) (`migrate-pause`).
    ///
    /// # Errors
    /// [`Refused::NotInPostcopy`] where none is in [`Status::PostcopyActive`] or [`Status::PostcopyRecover`].
    pub fn pause(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        if !matches!(state.statistics.status, Status::PostcopyActive | Status::PostcopyRecover) {
            return Err(Refused::NotInPostcopy);
        }
        state.paused = true;
        let channels = state.channels.clone();
        drop(state);
        channels.iter().for_each(|channel| channel.close());
        Ok(())
    }

    /// Whether [`begin_recovery`](Self::begin_recovery) would succeed now.
    ///
    /// # Errors
    /// [`Refused::NoPausedMigration`] unless a postcopy is in [`Status::PostcopyPaused`], [`Refused::MemoryReleased`]
    /// with capability `release-ram`.
    pub fn may_recover(&self) -> Result<(), Refused> {
        self.lock().may_recover()
    }

    /// Claims a postcopy that is interrupted, for connections that the caller opens now and gives to
    /// [`recover`](Self::recover) (`migrate` with `resume`).
    ///
    /// # Errors
    /// As [`may_recover`](Self::may_recover).
    pub fn begin_recovery(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        state.may_recover()?;
        // As in QEMU.
        state.statistics.error = None;
        state.enter(Status::PostcopyRecoverSetup);
        drop(state);
        self.changed.notify_all();
        self.tell();
        Ok(())
    }

    /// Lets a postcopy go on that was [claimed](Self::begin_recovery), over these connections of [`Outgoing::open`]. An
    /// error instead of them leaves it interrupted, with that for a reason.
    pub fn recover(&self, connections: Result<Outgoing, MigrationError>) {
        let mut state = self.lock();
        if state.statistics.status != Status::PostcopyRecoverSetup {
            return;
        }
        match connections {
            Ok(connections) => state.next = Some(connections),
            Err(error) => {
                state.statistics.error = Some(error.to_string());
                state.enter(Status::PostcopyPaused);
            }
        }
        drop(state);
        self.changed.notify_all();
        self.tell();
    }

    /// Ends a postcopy that is interrupted, or will be, as failed: the guest was lost, or the rest of its memory is not
    /// wanted.
    pub fn give_up_recovery(&self) {
        self.lock().given_up = true;
        self.changed.notify_all();
    }

    /// The connections of a postcopy are lost. Waits for other ones; `None` if they are no longer waited for.
    pub(crate) fn next_connections(&self, why: String) -> Option<Outgoing> {
        let mut state = self.lock();
        let paused = std::mem::take(&mut state.paused);
        // QEMU's words.
        state.statistics.error = Some(if paused { "Postcopy migration is paused by the user".into() } else { why });
        state.enter(Status::PostcopyPaused);
        drop(state);
        self.changed.notify_all();
        self.tell();
        let waiting = |state: &mut State| state.next.is_none() && !state.given_up;
        let mut state = self.lock();
        self.changed.wait_while(&mut state, waiting);
        state.next.take()
    }
}

impl State {
    fn may_recover(&self) -> Result<(), Refused> {
        if self.statistics.status != Status::PostcopyPaused {
            return Err(Refused::NoPausedMigration);
        }
        // In QEMU's order and words.
        if self.capabilities.release_ram { Err(Refused::MemoryReleased) } else { Ok(()) }
    }
}
