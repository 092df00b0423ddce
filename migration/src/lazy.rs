//! Restoring from a file in which every page has its place while the guest runs already (capabilities `mapped-ram` and
//! `postcopy-ram` together, QEMU 11.2).
//!
//! The pages of large RAM blocks are left where they are in the file. A thread that touches one waits until it has been
//! read, and meanwhile all others can be loaded one after the other. One bit for each page decides which thread reads
//! it: the one that sets it, and no other ever. So no page is filled in twice, and none that the guest has changed is
//! filled in again.
//!
//! ```text
//!  guest, devices ──touch──▶ MissingPages::wait ─▶ claim ─▶ read the page ─▶ MissingPages::fill ─▶ waiters continue
//!            LazyRestore::load ─▶ claim the next run ─▶ read the run ──────────────▲
//! ```
//!
//! A page that is touched comes with those around it, and what is loaded next is what comes after them.
//!
//! A page that cannot be read is never filled in: who waits for it waits on, and the guest is to be stopped for good.

use super::atomic_page_set::AtomicPageSet;
use super::page_file::PageFile;
use super::{LoadError, MigrationError, MissingPages, Touch};
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_multifd::mapped_ram::PageArea;
use qevm_savevm::mapped_ram::{MappedBlock, PageBitmap};
use qevm_wire::{CountedString, Located, PageGeometry};
use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

/// Bytes that are read at once ahead of the guest: few enough that a thread that touches one of these pages does not
/// wait long.
const AHEAD: u64 = 256 << 10;
/// A page that is touched comes with what the file has around it, within this many bytes, aligned: as the kernel does
/// for a file that is mapped.
const AROUND: u64 = 64 << 10;

/// A guest's memory of which parts are still in the file. Its owner decides whether the rest is
/// [loaded](LazyRestore::load) or [left](LazyRestore::serve) in the file until it is touched.
///
/// When it is dropped before, and the guest has been started, memory stays as it is, and a thread that touches a
/// missing page waits for ever.
#[derive(Debug)]
pub struct LazyRestore {
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RestoreProgress {
    /// Bytes of pages that are still in the file only.
    pub remaining: u64,
    /// Pages that were read because they were waited for.
    pub requests: u64,
}

struct Shared {
    pages: Box<dyn MissingPages>,
    file: PageFile,
    blocks: BTreeMap<usize, Block>,
    remaining: AtomicU64,
    requests: AtomicU64,
    /// Who loads the rest goes on there: after the page that was touched last, by block and unit. The guest may well
    /// touch the next.
    touched: Mutex<Option<(usize, u64)>>,
    state: Mutex<State>,
    /// There was a failure, or nothing remains.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    failure: Option<MigrationError>,
    /// The guest may have been started: what it waits for must not turn to zeros any more.
    started: bool,
}

struct Block {
    name: CountedString,
    layout: MappedBlock,
    present: PageBitmap,
    /// Bytes that are filled in at once.
    unit: u64,
    /// Units that were read, or are being read.
    claimed: AtomicPageSet,
}

/// Blocks that are left in the file, before any thread may touch them.
pub(crate) struct Setup {
    pages: Box<dyn MissingPages>,
    file: PageFile,
    blocks: BTreeMap<usize, Block>,
}

impl Setup {
    pub(crate) fn new(pages: Box<dyn MissingPages>, file: PageFile) -> Self {
        Setup { pages, file, blocks: BTreeMap::new() }
    }

    /// Leaves a block in the file, whose number in the guest is `block`.
    pub(crate) fn leave(
        &mut self,
        block: usize,
        name: CountedString,
        layout: MappedBlock,
        present: PageBitmap,
    ) -> Result<(), MigrationError> {
        let doing = "leave guest memory in the file (capability 'postcopy-ram')";
        let unit = self.pages.unit(block).map_err(MigrationError::guest(doing))?;
        let whole = unit.is_power_of_two() && unit >= PageGeometry::X86.size();
        if !whole || !layout.used_length.is_multiple_of(unit) {
            let why = format!("its {} bytes are no multiple of pages of {unit} bytes", layout.used_length);
            return Err(MigrationError::Guest { doing, source: why.into() });
        }
        let emptied = self.pages.discard(block, 0..layout.used_length);
        emptied.and_then(|()| self.pages.add(block)).map_err(MigrationError::guest(doing))?;
        let claimed = AtomicPageSet::new(layout.used_length / unit, false);
        self.blocks.insert(block, Block { name, layout, present, unit, claimed });
        Ok(())
    }

    /// Begins to serve those who touch pages.
    pub(crate) fn start(self) -> Result<LazyRestore, MigrationError> {
        let Setup { pages, file, blocks } = self;
        let present: u64 = blocks.values().map(|block| block.present.count()).sum();
        let shared = Arc::new(Shared {
            pages,
            file,
            blocks,
            remaining: AtomicU64::new(present * PageGeometry::X86.size()),
            requests: AtomicU64::new(0),
            touched: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let serving = shared.clone();
        let server = thread::Builder::new().name("page-requests".into()).spawn(move || serving.serve());
        let server = server.map_err(|error| MigrationError::Guest {
            doing: "start a thread for pages that are missing",
            source: error.into(),
        })?;
        Ok(LazyRestore { shared, server: Some(server) })
    }
}

impl LazyRestore {
    /// How far it is.
    pub fn progress(&self) -> RestoreProgress {
        RestoreProgress {
            remaining: self.shared.remaining.load(Ordering::Relaxed),
            requests: self.shared.requests.load(Ordering::Relaxed),
        }
    }

    /// Loads everything that is not there yet, while the guest runs, and returns when the file is needed no more.
    ///
    /// # Errors
    /// [`MigrationError`] when a page cannot be had, for whatever reason. Guest memory is lost then: the guest must be
    /// stopped and never run again. What waits for a page keeps waiting, so that wrong memory is never seen.
    pub fn load(self) -> Result<(), MigrationError> {
        if let Err(error) = self.shared.load_all() {
            self.shared.fail(error);
        }
        self.finish()
    }

    /// Loads pages only when they are touched, and returns when all that the file has were touched.
    ///
    /// # Errors
    /// As [`load`](LazyRestore::load).
    pub fn serve(self) -> Result<(), MigrationError> {
        let goes_on = |state: &mut State| state.failure.is_none() && self.shared.remaining.load(Ordering::Relaxed) > 0;
        self.shared.changed.wait_while(&mut self.shared.lock(), goes_on);
        self.finish()
    }

    /// Something that tells how far it is, while others load it.
    pub fn watch(&self) -> impl Fn() -> RestoreProgress + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || RestoreProgress {
            remaining: shared.remaining.load(Ordering::Relaxed),
            requests: shared.requests.load(Ordering::Relaxed),
        }
    }

    /// The guest may be started from here on.
    ///
    /// # Errors
    /// A page could not be had meanwhile; the guest must not be started.
    pub(crate) fn start_guest(&self) -> Result<(), MigrationError> {
        let mut state = self.shared.lock();
        match state.failure.take() {
            Some(error) => Err(error),
            None => {
                state.started = true;
                Ok(())
            }
        }
    }

    /// Why what was read of guest memory so far may be wrong: a page could not be had.
    pub(crate) fn failure(&self) -> Option<MigrationError> {
        self.shared.lock().failure.take()
    }

    fn finish(mut self) -> Result<(), MigrationError> {
        self.shared.pages.stop();
        let died = || MigrationError::guest("serve pages that are missing")("its thread has died".into());
        let served = self.server.take().map_or(Ok(()), |server| server.join().map_err(|_| died()));
        let failure = self.shared.lock().failure.take();
        failure.map_or(served, Err)?;
        self.shared.pages.release().map_err(MigrationError::guest("end the loading of guest memory"))?;
        self.shared.lock().started = false;
        Ok(())
    }
}

impl Drop for LazyRestore {
    fn drop(&mut self) {
        if self.shared.lock().started {
            // Without what makes pages missing they would turn to zeros.
            mem::forget(self.shared.clone());
        } else if let Some(server) = self.server.take() {
            self.shared.pages.stop();
            // It has reported what went wrong.
            let _ = server.join();
        }
    }
}

impl Shared {
    /// Reads pages that are waited for.
    fn serve(&self) {
        loop {
            let served = match self.pages.wait() {
                Ok(None) => return,
                Ok(Some(Touch { block, offset, .. })) => self.serve_page(block, offset),
                Err(source) => Err(MigrationError::Guest { doing: "wait for pages that are missing", source }),
            };
            if let Err(error) = served {
                return self.fail(error);
            }
        }
    }

    fn serve_page(&self, number: usize, offset: u64) -> Result<(), MigrationError> {
        let Some(block) = self.blocks.get(&number).filter(|block| offset < block.layout.used_length) else {
            let why = format!("byte {offset:#x} of RAM block {number} was asked for, which is not in the file");
            return Err(MigrationError::Guest { doing: "serve pages that are missing", source: why.into() });
        };
        let unit = offset / block.unit;
        if !block.claimed.claim(unit) {
            // The thread that has it lets all go on that wait for it.
            return Ok(());
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let run = block.claim_around(unit);
        *self.touched.lock() = Some((number, run.end));
        self.fill(number, block, run)
    }

    /// Reads everything that was not read, what comes after touched pages first.
    fn load_all(&self) -> Result<(), MigrationError> {
        let mut place = (0, 0);
        while let Some((number, block, run)) = self.claim_next(place) {
            if self.lock().failure.is_some() {
                return Ok(());
            }
            place = (number, run.end);
            self.fill(number, block, run)?;
        }
        Ok(())
    }

    /// Claims the next units to load, from `place` on unless the guest is elsewhere.
    fn claim_next(&self, place: (usize, u64)) -> Option<(usize, &Block, Range<u64>)> {
        let touched = self.touched.lock().take();
        let ahead = touched.and_then(|(number, unit)| {
            let block = self.blocks.get(&number)?;
            Some((number, block, block.claim_run(unit..unit + block.at_once())?))
        });
        let rest = || {
            let from = self.blocks.range(place.0..).map(|(number, block)| {
                let unit = if *number == place.0 { place.1 } else { 0 };
                (*number, block, unit)
            });
            let passed = self.blocks.range(..=place.0).map(|(number, block)| (*number, block, 0));
            let mut all = from.chain(passed);
            all.find_map(|(number, block, unit)| Some((number, block, block.claim_run(unit..u64::MAX)?)))
        };
        ahead.or_else(rest)
    }

    /// Fills in units that the caller has claimed.
    fn fill(&self, number: usize, block: &Block, units: Range<u64>) -> Result<(), MigrationError> {
        let bytes = units.start * block.unit..units.end * block.unit;
        let area = PageArea::new(block.layout.header.pages_offset, block.layout.used_length, PageGeometry::X86);
        let mut runs = area.iter().flat_map(|area| area.reads(block.present.as_bytes(), bytes.clone())).peekable();
        let doing = "fill in guest memory";
        if runs.peek().is_none() {
            let zeros = self.pages.fill_zeros(number, bytes.start, bytes.end - bytes.start);
            return zeros.map_err(MigrationError::guest(doing));
        }
        let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
        let mut read = 0;
        for run in runs {
            let at = (run.block_offset - bytes.start) as usize;
            self.file.read_bytes(&mut buffer[at..at + run.len as usize], run.file_offset).map_err(|source| {
                let error = LoadError::File { doing: "read pages", source };
                Located::new(error, run.file_offset).within(format!("RAM block '{}'", block.name))
            })?;
            read += run.len;
        }
        self.pages.fill(number, bytes.start, &buffer).map_err(MigrationError::guest(doing))?;
        if self.remaining.fetch_sub(read, Ordering::Relaxed) == read {
            drop(self.lock());
            self.changed.notify_all();
        }
        Ok(())
    }

    fn fail(&self, error: MigrationError) {
        let mut state = self.lock();
        state.failure.get_or_insert(error);
        if !state.started {
            // The guest will not be started, so that a thread that loads its devices may find zeros and need not wait
            // for ever.
            if let Err(error) = self.pages.release() {
                tracing::error!(error, "who waits for guest memory waits for ever");
            }
        }
        drop(state);
        self.changed.notify_all();
        self.pages.stop();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Block {
    /// How many units are read at once.
    fn at_once(&self) -> u64 {
        (AHEAD / self.unit).max(1)
    }

    /// Claims the first units within these that the file has and that were not claimed, as many as are read at once.
    fn claim_run(&self, units: Range<u64>) -> Option<Range<u64>> {
        let end = units.end.min(self.units());
        let first = (units.start..end).find(|unit| self.claim_held(*unit))?;
        let longest = end.min(first + self.at_once());
        let last = (first + 1..longest).find(|unit| !self.claim_held(*unit)).unwrap_or(longest);
        Some(first..last)
    }

    /// Claims what is next to a unit that the caller has claimed, as far as the file has it and it was not claimed.
    fn claim_around(&self, unit: u64) -> Range<u64> {
        if !self.has(unit) {
            return unit..unit + 1;
        }
        let window = (AROUND / self.unit).max(1);
        let start = unit / window * window;
        let end = (start + window).min(self.units());
        let first = (start..unit).rev().take_while(|unit| self.claim_held(*unit)).last().unwrap_or(unit);
        let last = (unit + 1..end).take_while(|unit| self.claim_held(*unit)).last().unwrap_or(unit);
        first..last + 1
    }

    fn units(&self) -> u64 {
        self.layout.used_length / self.unit
    }

    /// Whether the file has anything of a unit.
    fn has(&self, unit: u64) -> bool {
        let mut pages = (unit * self.unit / 4096)..((unit + 1) * self.unit / 4096);
        pages.any(|page| self.present.contains(page))
    }

    /// Claims a unit that the file has.
    fn claim_held(&self, unit: u64) -> bool {
        self.has(unit) && self.claimed.claim(unit)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LazyRestore").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
