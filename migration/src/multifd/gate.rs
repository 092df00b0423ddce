//! Who waits for whom at the destination: the barrier of `qevm-multifd` between threads.

use crate::LoadError;
use qevm_multifd::{Progress, SyncBarrier, SyncError};
use std::{
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// What the main channel met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A flush record.
    Flush,
    /// An EOS of the `ram` section.
    Eos,
}

/// Longest time in which nothing at all arrives while the main channel waits for SYNC packets. The mark on the main channel is
/// sent behind them, so whatever is missing is on its way already.
const SYNC_PATIENCE: Duration = Duration::from_secs(60);

/// Lets the main channel and the page channels of a destination go on together.
#[derive(Debug)]
pub(crate) struct Gate {
    barrier: Mutex<SyncBarrier>,
    changed: Condvar,
    received: AtomicU64,
}

impl Gate {
    /// For so many page channels. How the source flushes is told by the stream.
    pub(crate) fn new(channels: u8) -> Self {
        let barrier = Mutex::new(SyncBarrier::new(channels, None));
        Gate { barrier, changed: Condvar::new(), received: AtomicU64::new(0) }
    }

    /// The main channel met a mark, and waits if it has to.
    pub(crate) fn main(&self, mark: Mark) -> Result<(), SyncError> {
        let mut barrier = self.lock();
        let number = barrier.completed();
        let progress = match mark {
            Mark::Flush => barrier.main_flush(),
            Mark::Eos => barrier.main_eos(),
        };
        self.changed.notify_all();
        if progress? != Progress::Wait {
            return Ok(());
        }
        let mut received = self.received();
        loop {
            let waiting = |barrier: &mut SyncBarrier| barrier.completed() == number && barrier.healthy().is_ok();
            let (now, _) = self
                .changed
                .wait_timeout_while(barrier, SYNC_PATIENCE, waiting)
                .unwrap_or_else(PoisonError::into_inner);
            barrier = now;
            barrier.healthy()?;
            if barrier.completed() != number {
                return Ok(());
            }
            let so_far = self.received();
            if std::mem::replace(&mut received, so_far) == so_far {
                let error = barrier.timed_out();
                self.changed.notify_all();
                return Err(error);
            }
        }
    }

    /// The guest's memory is complete.
    pub(crate) fn main_end(&self) -> Result<(), SyncError> {
        self.lock().main_end()
    }

    /// A page channel met a SYNC packet and waits for the others. How long is up to the main channel, which may be waiting for
    /// its source's rate limit.
    pub(super) fn channel_sync(&self, channel: u8) -> Result<(), SyncError> {
        let mut barrier = self.lock();
        let number = barrier.completed();
        let progress = barrier.channel_sync(channel);
        self.changed.notify_all();
        if progress? != Progress::Wait {
            return Ok(());
        }
        let waiting = |barrier: &mut SyncBarrier| barrier.completed() == number && barrier.healthy().is_ok();
        self.changed.wait_while(barrier, waiting).unwrap_or_else(PoisonError::into_inner).healthy()
    }

    /// A page channel was closed at the end of a packet.
    pub(super) fn channel_end(&self, channel: u8) -> Result<(), SyncError> {
        let ended = self.lock().channel_end(channel);
        self.changed.notify_all();
        ended
    }

    /// Lets everybody who waits give up, for this reason.
    pub(crate) fn abandon(&self, reason: impl Into<String>) {
        self.lock().abort(reason);
        self.changed.notify_all();
    }

    /// A page channel received so many bytes.
    pub(super) fn count(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of all page channels.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, SyncBarrier> {
        self.barrier.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<SyncError> for LoadError {
    fn from(error: SyncError) -> Self {
        LoadError::Multifd(error.into())
    }
}
