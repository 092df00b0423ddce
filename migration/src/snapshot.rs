//! Memory as of one instant, of a guest that runs on (capability `background-snapshot`, QEMU 6.0).
//!
//! Guest memory is protected against writes. A thread that writes to a page first waits until it was copied, which
//! takes microseconds and does not depend on the peer: copies are sent when their turn comes. What is not written to is
//! copied as the migration comes to it.
//!
//! ```text
//!  guest, devices ──write──▶ ProtectedPages::wait ─▶ copy ─▶ ProtectedPages::unprotect ─▶ waiters continue
//!             Snapshot::copy (the next pages) ─▶ copy ───────────▲        └▶ Snapshot::take: what is sent
//! ```

use super::atomic_page_set::AtomicPageSet;
use super::{GuestError, MigrationError, PAGE_SIZE, ProtectedPages, RamView};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Duration;
use vm_memory::Bytes;

/// Bytes of copies that wait to be sent, above which those who write are slowed down…
const PLENTY: u64 = 64 << 20;
/// …by this time for each page: a peer that takes nothing does not stop the guest, nor its monitor.
const SLOWED: Duration = Duration::from_millis(100);

/// Bytes that are copied for a thread that writes: it goes on to the next pages more often than not.
const AROUND: u64 = 64 << 10;

const PREPARE: &str = "protect guest memory against writes (capability 'background-snapshot')";
const FOLLOW: &str = "follow who writes to guest memory";

/// A copy of a part of guest memory.
pub(crate) struct Copied {
    pub(crate) block: usize,
    /// Where it begins in the block.
    pub(crate) offset: u64,
    /// Whole pages.
    pub(crate) bytes: Vec<u8>,
}

/// The guest's memory on its way into a snapshot.
#[derive(Default)]
pub(crate) struct Snapshot {
    pages: OnceLock<Box<dyn ProtectedPages>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Of each block, when it is protected.
    blocks: Vec<Block>,
    copies: VecDeque<Copied>,
    /// Bytes of `copies`.
    waiting: u64,
    failure: Option<MigrationError>,
    ended: bool,
}

struct Block {
    /// Bytes that are unprotected at once.
    unit: u64,
    /// Units that were copied.
    copied: AtomicPageSet,
}

impl Snapshot {
    /// Takes what will protect the memory.
    pub(crate) fn prepare(&self, pages: Result<Box<dyn ProtectedPages>, GuestError>) -> Result<(), MigrationError> {
        // There is one in a migration.
        let _ = self.pages.set(pages.map_err(MigrationError::guest(PREPARE))?);
        Ok(())
    }

    /// Protects all memory of the guest, which is paused.
    pub(crate) fn protect(&self, ram: &[RamView<'_>]) -> Result<(), MigrationError> {
        let Some(pages) = self.pages.get() else { return Ok(()) };
        let mut state = self.lock();
        for (number, view) in ram.iter().enumerate() {
            let unit = pages.protect(number).map_err(MigrationError::guest(PREPARE))?;
            let units = (view.memory.len() as u64).div_ceil(unit);
            state.blocks.push(Block { unit, copied: AtomicPageSet::new(units, false) });
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Copies pages of this memory for those who write to them, until the [end](Snapshot::end). Each thread has views
    /// of its own: the guest must not be asked for them while a page is waited for.
    pub(crate) fn serve(&self, ram: &[RamView<'_>]) {
        let unprotected = |state: &mut State| state.blocks.is_empty() && !state.ended;
        let mut protected = self.lock();
        self.changed.wait_while(&mut protected, unprotected);
        if protected.ended {
            return;
        }
        drop(protected);
        let Some(pages) = self.pages.get() else { return };
        loop {
            let served = match pages.wait() {
                Ok(None) => return,
                Ok(Some((block, offset))) => self.serve_page(ram, block, offset),
                Err(source) => Err(MigrationError::Guest { doing: FOLLOW, source }),
            };
            if let Err(error) = served {
                self.lock().failure.get_or_insert(error);
                // The snapshot has failed, and no thread is to wait until that is noticed.
                return self.release();
            }
        }
    }

    fn serve_page(&self, ram: &[RamView<'_>], block: usize, offset: u64) -> Result<(), MigrationError> {
        let plenty = |state: &mut State| state.waiting > PLENTY && !state.ended;
        let mut state = self.lock();
        self.changed.wait_while_for(&mut state, plenty, SLOWED);
        let end = ram.get(block).map_or(0, |view| view.memory.len() as u64).min(offset + AROUND);
        self.copy_from(ram, state, block, offset..end.max(offset + 1))
    }

    /// Copies pages of a block, unless they were copied before.
    pub(crate) fn copy(&self, ram: &[RamView<'_>], block: usize, pages: &Range<u64>) -> Result<(), MigrationError> {
        self.copy_from(ram, self.lock(), block, pages.start * PAGE_SIZE..pages.end * PAGE_SIZE)
    }

    /// Copies the units of a block that hold these bytes and were not copied before, and lets them be written to.
    fn copy_from(
        &self,
        ram: &[RamView<'_>],
        mut state: MutexGuard<'_, State>,
        number: usize,
        bytes: Range<u64>,
    ) -> Result<(), MigrationError> {
        let (Some(view), Some(block), Some(pages)) = (ram.get(number), state.blocks.get(number), self.pages.get())
        else {
            let why = format!("RAM block {number} is not protected");
            return Err(MigrationError::Guest { doing: FOLLOW, source: why.into() });
        };
        let (unit, len) = (block.unit, view.memory.len() as u64);
        let units = bytes.start / unit..bytes.end.div_ceil(unit);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for number in units.filter(|number| block.copied.claim(*number)) {
            match runs.last_mut() {
                Some(last) if last.end == number => last.end = number + 1,
                _ => runs.push(number..number + 1),
            }
        }
        for run in runs {
            let (offset, end) = (run.start * unit, run.end * unit);
            let mut bytes = vec![0; (end.min(len).saturating_sub(offset)) as usize];
            let read = view.memory.read_slice(&mut bytes, offset as usize);
            read.map_err(|error| MigrationError::Guest { doing: "copy guest memory", source: error.into() })?;
            state.waiting += bytes.len() as u64;
            state.copies.push_back(Copied { block: number, offset, bytes });
            pages.unprotect(number, offset, end - offset).map_err(MigrationError::guest(FOLLOW))?;
        }
        Ok(())
    }

    /// Takes what was copied and is to be sent.
    ///
    /// # Errors
    /// Those of [`serve`](Snapshot::serve): memory is not as it was.
    pub(crate) fn take(&self) -> Result<VecDeque<Copied>, MigrationError> {
        let mut state = self.lock();
        if let Some(error) = state.failure.take() {
            return Err(error);
        }
        state.waiting = 0;
        let copies = mem::take(&mut state.copies);
        drop(state);
        self.changed.notify_all();
        Ok(copies)
    }

    /// Ends the protection, and [`serve`](Snapshot::serve).
    pub(crate) fn end(&self) {
        let before = mem::replace(&mut self.lock().ended, true);
        self.changed.notify_all();
        if !before {
            self.release();
        }
    }

    fn release(&self) {
        let Some(pages) = self.pages.get() else { return };
        pages.stop();
        if let Err(error) = pages.release() {
            tracing::error!(error, "who writes to guest memory waits for ever");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
