//! The destination of a postcopy: the guest runs here, and the rest of its memory comes after it.
//!
//! A thread that touches a page that has not come waits until it is there. The source is asked for it, once, and sends
//! it before all others.
//!
//! ```text
//!  guest, devices ──touch──▶ MissingPages::wait ─▶ PageFaults ─▶ REQ_PAGES ──▶ source
//!                          waiters continue ◀─ MissingPages::fill ◀─ page ◀── source
//! ```
//!
//! Two threads do that from the moment on at which memory is missing: the devices, which are loaded meanwhile, may
//! touch it, too. With capability `postcopy-preempt` a third reads the connection on which the source sends what it is
//! asked for ([`preempt`]). A page that was filled in is never filled in again, and one that does not come is not
//! filled in at all: what waits for it keeps waiting, so that wrong memory is never seen. How long each thread waits is
//! [counted](BlockTimes) with capability `postcopy-blocktime`.

mod assembly;
mod block_times;
mod listening;
mod missing;
mod preempt;
mod recovery;
pub(crate) mod start;
mod stream;

use super::{Job, MigrationError, RestoreProgress};
pub use block_times::BlockTimes;
pub(crate) use listening::Listening;
use missing::Shared;
pub(crate) use preempt::{Preempt, PreemptListener};
pub use recovery::Recovery;
use std::mem;
use std::sync::Arc;
use std::thread::JoinHandle;

/// The part of a guest's memory that is still at the source, from where it comes while the guest runs. Its owner
/// [waits](Postcopy::load) until all is here.
///
/// When it is dropped before, memory goes on coming, and its end is not reported.
#[derive(Debug)]
pub struct Postcopy {
    shared: Arc<Shared>,
    /// Reads the stream…
    reader: Option<JoinHandle<()>>,
    /// …and asks for pages.
    asker: Option<JoinHandle<()>>,
}

impl Postcopy {
    /// Waits until all of guest memory is here and the source knows it. `job` has the status: a connection that is lost
    /// pauses the postcopy until another [is there](Recovery).
    ///
    /// # Errors
    /// [`MigrationError::PostcopyBroken`]. Guest memory is lost then: the guest must be stopped and never run again.
    /// What waits for a page keeps waiting, so that wrong memory is never seen.
    pub fn load(mut self, job: &Job) -> Result<(), MigrationError> {
        while let Some(status) = self.shared.wait_for_news() {
            // Too late to be cancelled.
            let _ = job.advance(status);
        }
        let died = || broken(MigrationError::guest("receive guest memory")("its thread has died".into()));
        let read = self.reader.take().map_or(Ok(()), |reader| reader.join().map_err(|_| died()));
        self.shared.failure().map_or(read, Err)?;
        self.shared.stop_asking();
        let asked = self.asker.take().map_or(Ok(()), |asker| asker.join().map_err(|_| died()));
        self.shared.failure().map_or(asked, Err)?;
        self.shared.complete().map_err(broken)
    }

    /// What pauses it and lets it go on.
    pub fn recovery(&self) -> Recovery {
        Recovery { shared: self.shared.clone() }
    }

    /// How far it is.
    pub fn progress(&self) -> RestoreProgress {
        self.shared.progress()
    }

    /// Something that tells how long the guest has waited, with capability `postcopy-blocktime`.
    pub fn watch_block_times(&self) -> impl Fn() -> Option<BlockTimes> + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || shared.block_times()
    }

    /// Something that tells how far it is, while others wait.
    pub fn watch(&self) -> impl Fn() -> RestoreProgress + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || shared.progress()
    }
}

impl Drop for Postcopy {
    fn drop(&mut self) {
        if self.shared.is_started() {
            // Without what makes pages missing they would turn to zeros.
            mem::forget(self.shared.clone());
        }
    }
}

/// What failed when the guest ran here already.
fn broken(error: MigrationError) -> MigrationError {
    match error {
        MigrationError::PostcopyBroken { .. } => error,
        error => MigrationError::PostcopyBroken { reason: error.into() },
    }
}

#[cfg(test)]
mod tests;
