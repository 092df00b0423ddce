//! Who waits for whom at the destination: the synchronisation of the core between threads.

use crate::LoadError;
use crate::core::{Mark, Synchronisation};
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_multifd::SyncError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lets the main channel and the page channels of a destination go on together.
#[derive(Debug)]
pub(crate) struct Gate {
    synchronisation: Mutex<Synchronisation>,
    changed: Condvar,
    received: AtomicU64,
    start: Instant,
}

impl Gate {
    /// For this many page channels.
    pub(crate) fn new(channels: u8) -> Self {
        Gate {
            synchronisation: Mutex::new(Synchronisation::new(channels)),
            changed: Condvar::new(),
            received: AtomicU64::new(0),
            start: Instant::now(),
        }
    }

    /// The main channel met a mark, and waits if it has to.
    pub(crate) fn main(&self, mark: Mark) -> Result<(), SyncError> {
        let mut synchronisation = self.lock();
        let met = synchronisation.main(mark, self.received(), self.start.elapsed());
        self.changed.notify_all();
        met?;
        loop {
            let now = self.start.elapsed();
            let waits = synchronisation.main_waits(self.received(), now);
            if waits.is_err() {
                self.changed.notify_all();
            }
            let Some(until) = waits? else { return Ok(()) };
            self.changed.wait_for(&mut synchronisation, until.saturating_sub(now));
        }
    }

    /// The guest's memory is complete.
    pub(crate) fn main_end(&self) -> Result<(), SyncError> {
        self.lock().main_end()
    }

    /// A page channel met a SYNC packet and waits for the others.
    pub(super) fn channel_sync(&self, channel: u8) -> Result<(), SyncError> {
        let mut synchronisation = self.lock();
        let met = synchronisation.channel_sync(channel);
        self.changed.notify_all();
        met?;
        let waiting = |synchronisation: &mut Synchronisation| synchronisation.channel_waits(channel) == Ok(true);
        self.changed.wait_while(&mut synchronisation, waiting);
        synchronisation.channel_waits(channel).map(|_| ())
    }

    /// A page channel was closed at the end of a packet.
    pub(super) fn channel_end(&self, channel: u8) -> Result<(), SyncError> {
        let ended = self.lock().channel_end(channel);
        self.changed.notify_all();
        ended
    }

    /// Lets all threads that wait give up, for this reason.
    pub(crate) fn abandon(&self, reason: impl Into<String>) {
        self.lock().abandon(reason);
        self.changed.notify_all();
    }

    /// A page channel received this many bytes.
    pub(super) fn count(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of all page channels.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Synchronisation> {
        self.synchronisation.lock()
    }
}

impl From<SyncError> for LoadError {
    fn from(error: SyncError) -> Self {
        LoadError::Multifd(error.into())
    }
}
