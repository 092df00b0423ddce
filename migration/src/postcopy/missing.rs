//! Memory that is missing until it comes from the source.

use super::assembly::Assembly;
use super::block_times::{Account, BlockTimes};
use super::preempt::Preempt;
use crate::atomic_page_set::AtomicPageSet;
use crate::channel::{WriteSlice, write_all};
use crate::ram_receiver::Listed;
use crate::watch::Watch;
use crate::{Channel, LoadError, MigrationError, MissingPages, PAGE_SIZE, RestoreProgress, Status, Touch};
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_returnpath::Message;
use qevm_returnpath::requests::{PageFaults, RequestBlocks};
use qevm_savevm::ram::{PageAt, RamBlocks};
use qevm_wire::{CountedString, Located};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

pub(super) const LISTEN: &str = "receive guest memory while the guest runs (capability 'postcopy-ram')";
const ASK: &str = "ask the source for pages that are missing";

/// Guest memory of which parts are missing, and what is known of them.
pub(super) struct Shared {
    pages: Box<dyn MissingPages>,
    /// In the order of the stream.
    blocks: Vec<Block>,
    /// What was asked for.
    book: Mutex<PageFaults>,
    /// How long the guest waits, with capability `postcopy-blocktime`, and when that began.
    account: Option<Mutex<Account>>,
    start: Instant,
    /// Where messages are written to, one at a time.
    request_channel: Mutex<RequestChannel>,
    /// Bytes that have not come.
    pub(super) remaining: AtomicU64,
    /// Pages that the source was asked for.
    requests: AtomicU64,
    /// What reads the preempt channel of the connection, with capability `postcopy-preempt`.
    pub(super) preempt: Mutex<Option<Preempt>>,
    /// The list of the source, for the preempt channel.
    pub(super) urgent_blocks: OnceLock<Arc<RamBlocks>>,
    state: Mutex<State>,
    /// The deadlines.
    pub(super) waits: Arc<Watch>,
    /// The connection, or what is known of the end.
    pub(super) changed: Condvar,
}

#[derive(Debug)]
pub(super) struct State {
    failure: Option<MigrationError>,
    /// The guest may have been started: what it waits for must not turn to zeros any more.
    started: bool,
    /// The connection.
    pub(super) line: Line,
    /// Pages may still come on its preempt channel.
    pub(super) urgent: bool,
    /// The next connection.
    pub(super) next: Option<NextLine>,
    /// How often a source was waited for.
    pub(super) turn: u64,
    /// What the operator has not been told.
    pub(super) news: VecDeque<Status>,
}

impl RequestChannel {
    /// Writes bytes, if there is a connection.
    pub(super) fn put(&self, bytes: &[u8]) {
        // If the source is gone, reading will tell.
        let written = self.channel.as_deref().map(|channel| write_all(channel, &mut [WriteSlice::bytes(bytes)]));
        if let Some(Err(error)) = written {
            tracing::debug!(%error, "the return path is broken");
        }
    }
}

impl State {
    pub(super) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }
}

/// The way back to the source.
#[derive(Debug)]
pub(super) struct RequestChannel {
    /// The connection, if there is one.
    pub(super) channel: Option<Arc<dyn Channel>>,
    /// The source takes requests. One that has come back does not before it goes on, and is asked for everything then.
    pub(super) asks: bool,
}

/// The connection to the source.
#[derive(Debug)]
pub(super) enum Line {
    Up(Arc<dyn Channel>),
    /// Another is waited for.
    Lost,
    /// None is needed any more.
    Over,
}

/// The connection of a source that goes on.
#[derive(Debug)]
pub(super) struct NextLine {
    pub(super) channel: Arc<dyn Channel>,
    /// What was read from it.
    pub(super) first: Vec<u8>,
    /// What takes its preempt channel in.
    pub(super) preempt: Option<Preempt>,
}

/// A RAM block.
pub(super) struct Block {
    name: CountedString,
    /// Its number in the guest.
    number: usize,
    /// Bytes that are filled in at once.
    pub(super) unit: u64,
    units: u64,
    /// Units that had come before anything was missing. Those of them that were not touched are zero.
    kept: Arc<AtomicPageSet>,
    /// Units that were filled in since then, or are about to be.
    placed: AtomicPageSet,
}

impl Block {
    /// Makes what has not come of a block missing.
    pub(super) fn empty(
        pages: &dyn MissingPages,
        number: usize,
        listed: &Listed,
        received: &Arc<AtomicPageSet>,
    ) -> Result<Block, MigrationError> {
        let doing = MigrationError::guest;
        let unit = pages.unit(number).map_err(doing(LISTEN))?;
        if !unit.is_power_of_two() || unit < PAGE_SIZE || !listed.used_length.is_multiple_of(unit) {
            let (name, length) = (&listed.name, listed.used_length);
            let why = format!("the {length} bytes of RAM block '{name}' are no multiple of pages of {unit} bytes");
            return Err(MigrationError::Guest { doing: LISTEN, source: why.into() });
        }
        if unit != listed.page_size {
            let (block, found, expected) = (listed.name.clone(), listed.page_size, unit);
            return Err(Located::new(LoadError::HostPageSize { block, found, expected }, 0).into());
        }
        let units = listed.used_length / unit;
        let kept = match unit {
            PAGE_SIZE => received.clone(),
            _ => {
                // Of a huge page of which a part is old everything comes again.
                let kept = AtomicPageSet::new(units, false);
                let pages = unit / PAGE_SIZE;
                let mut next = 0;
                for gap in received.gaps(listed.used_length / PAGE_SIZE) {
                    kept.mark(next..gap.start / pages);
                    next = gap.end.div_ceil(pages);
                }
                kept.mark(next..units);
                Arc::new(kept)
            }
        };
        for gap in kept.gaps(units) {
            pages.discard(number, gap.start * unit..gap.end * unit).map_err(doing(LISTEN))?;
        }
        pages.add(number).map_err(doing(LISTEN))?;
        Ok(Block { name: listed.name.clone(), number, unit, units, kept, placed: AtomicPageSet::new(units, false) })
    }

    /// Bytes that are to come.
    fn remaining(&self) -> u64 {
        self.kept.gaps(self.units).map(|gap| (gap.end - gap.start) * self.unit).sum()
    }
}

impl Shared {
    /// Guest memory of which these blocks are missing, in part, and come over `channel`. `block_times` says that it is
    /// counted how long the guest waits.
    pub(super) fn new(
        pages: Box<dyn MissingPages>,
        blocks: Vec<Block>,
        requested: RequestBlocks,
        channel: Arc<dyn Channel>,
        block_times: bool,
        waits: Arc<Watch>,
    ) -> Self {
        let remaining: u64 = blocks.iter().map(Block::remaining).sum();
        let account = block_times.then(|| Account::new(pages.vcpus(), blocks.iter().map(|block| block.units)));
        Shared {
            account: account.map(Mutex::new),
            start: Instant::now(),
            pages,
            blocks,
            book: Mutex::new(PageFaults::new(requested)),
            request_channel: Mutex::new(RequestChannel { channel: Some(channel.clone()), asks: true }),
            remaining: remaining.into(),
            requests: AtomicU64::default(),
            preempt: Mutex::default(),
            urgent_blocks: OnceLock::new(),
            waits,
            state: Mutex::new(State {
                failure: None,
                started: false,
                line: Line::Up(channel),
                urgent: false,
                next: None,
                turn: 0,
                news: VecDeque::new(),
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn progress(&self) -> RestoreProgress {
        RestoreProgress {
            remaining: self.remaining.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
        }
    }

    /// How long the guest has waited, with capability `postcopy-blocktime`.
    pub(super) fn block_times(&self) -> Option<BlockTimes> {
        Some(self.account()?.report())
    }

    fn account(&self) -> Option<MutexGuard<'_, Account>> {
        self.account.as_ref().map(|account| account.lock())
    }

    /// Puts a message on the return path.
    pub(super) fn send(&self, message: &Message) {
        self.request_channel().put(&message.to_bytes());
    }

    /// Which pages of a block are here, 64 to a word, and its name.
    pub(super) fn bitmap(&self, index: usize) -> Option<(CountedString, Vec<u8>)> {
        let block = self.blocks.get(index)?;
        let pages = block.unit / PAGE_SIZE;
        let here = AtomicPageSet::new(block.units * pages, true);
        let missing = block.kept.gaps(block.units).flatten().filter(|unit| !block.placed.contains(*unit));
        missing.for_each(|unit| here.clear(unit * pages..(unit + 1) * pages));
        // There are no pages after the end.
        here.clear(block.units * pages..(block.units * pages).next_multiple_of(64));
        Some((block.name.clone(), here.to_bytes()))
    }

    /// Asks for what is touched.
    pub(super) fn ask(&self) {
        loop {
            let asked = match self.pages.wait() {
                Ok(None) => return,
                Ok(Some(touch)) => self.touched(&touch),
                Err(source) => Err(MigrationError::Guest { doing: ASK, source }),
            };
            if let Err(error) = asked {
                return self.fail(error);
            }
        }
    }

    /// A page is waited for.
    fn touched(&self, touch: &Touch) -> Result<(), MigrationError> {
        let (number, offset) = (touch.block, touch.offset);
        let found = self.blocks.iter().enumerate().find(|(_, block)| block.number == number);
        let Some((index, block)) = found.filter(|(_, block)| offset / block.unit < block.units) else {
            let why = format!("byte {offset:#x} of RAM block {number} was touched, which the source does not have");
            return Err(MigrationError::Guest { doing: ASK, source: why.into() });
        };
        let unit = offset / block.unit;
        if block.kept.contains(unit) {
            // It came as zeros, or was never anything else.
            return self.fill(block, unit, None);
        }
        if let Some(mut account) = self.account() {
            account.touched(touch.vcpu, index, unit, self.start.elapsed());
        }
        if block.placed.contains(unit) {
            // The thread that fills it in lets all go on that wait for it.
            return Ok(());
        }
        // Which block a message is about may depend on the one before.
        let request_channel = self.request_channel();
        let message = self.book().fault(index, offset);
        let message = message.map_err(|error| MigrationError::Guest { doing: ASK, source: error.into() })?;
        if let Some(message) = message {
            self.requests.fetch_add(1, Ordering::Relaxed);
            if request_channel.asks {
                request_channel.put(&message.to_bytes());
            }
        }
        Ok(())
    }

    /// A page has come at about byte `at` of its channel, or zeros for it.
    pub(super) fn place(
        &self,
        page: &PageAt,
        content: Option<&[u8]>,
        assembly: &mut Assembly,
        at: u64,
    ) -> Result<(), MigrationError> {
        let index = page.block.index();
        let Some(block) = self.blocks.get(index) else {
            let why = format!("RAM block {index} was not listed");
            return Err(MigrationError::Guest { doing: "fill in guest memory", source: why.into() });
        };
        let unit = page.offset / block.unit;
        let whole = match block.unit {
            PAGE_SIZE => content,
            _ => match assembly.add((index, unit), page.offset % block.unit, content, block.unit) {
                Ok(Some(whole)) => Some(whole),
                Ok(None) => return Ok(()),
                Err((begun_block, begun)) => {
                    let (block, found) = (index, page.offset);
                    let error = LoadError::HugePageInPieces { begun_block, begun, block, found };
                    return Err(Located::new(error, at).into());
                }
            },
        };
        // What has come before is here, and may be newer.
        if block.kept.contains(unit) || !block.placed.claim(unit) {
            return Ok(());
        }
        self.fill(block, unit, whole)?;
        if let Some(mut account) = self.account() {
            account.placed(index, unit, self.start.elapsed());
        }
        self.book().received(index, page.offset);
        if self.remaining.fetch_sub(block.unit, Ordering::Relaxed) == block.unit {
            // Who waits for the last of them has looked before this lock was free, or sees it.
            drop(self.lock());
            self.changed.notify_all();
        }
        Ok(())
    }

    fn fill(&self, block: &Block, unit: u64, content: Option<&[u8]>) -> Result<(), MigrationError> {
        let offset = unit * block.unit;
        let filled = match content {
            Some(content) => self.pages.fill(block.number, offset, content),
            None => self.pages.fill_zeros(block.number, offset, block.unit),
        };
        match filled {
            Err(source) if !(block.kept.contains(unit) && exists(&*source)) => {
                Err(MigrationError::Guest { doing: "fill in guest memory", source })
            }
            _ => Ok(()),
        }
    }

    /// Something failed, after which no page is asked for.
    pub(super) fn fail(&self, error: MigrationError) {
        let mut state = self.lock();
        state.failure.get_or_insert(error);
        if !state.started {
            // The guest will not be started, so that a thread that loads its devices may find zeros and need not wait
            // for ever.
            if let Err(error) = self.pages.release() {
                tracing::error!(error, "who waits for guest memory waits for ever");
            }
        }
        if let (true, Line::Up(channel)) = (state.started, &state.line) {
            // Nothing that still comes is of use.
            channel.close();
        }
        drop(state);
        self.changed.notify_all();
        self.stop_asking();
    }

    /// The stream is over, for good or bad.
    pub(super) fn end(&self) {
        self.end_urgent();
        self.lock().line = Line::Over;
        self.changed.notify_all();
    }

    /// Waits for what the operator is to be told; `None` when the stream is over.
    pub(super) fn wait_for_news(&self) -> Option<Status> {
        let quiet = |state: &mut State| state.news.is_empty() && !matches!(state.line, Line::Over);
        let mut state = self.lock();
        self.changed.wait_while(&mut state, quiet);
        state.news.pop_front()
    }

    /// What has failed first.
    pub(super) fn failure(&self) -> Option<MigrationError> {
        self.lock().failure.take()
    }

    /// The guest may be started from here on.
    pub(super) fn start_guest(&self) -> Result<(), MigrationError> {
        let mut state = self.lock();
        match state.failure.take() {
            Some(error) => Err(error),
            None => {
                state.started = true;
                Ok(())
            }
        }
    }

    pub(super) fn is_started(&self) -> bool {
        self.lock().started
    }

    pub(super) fn stop_asking(&self) {
        self.pages.stop();
    }

    /// Nothing more comes: nothing may be missing.
    pub(super) fn complete(&self) -> Result<(), MigrationError> {
        match self.remaining.load(Ordering::Relaxed) {
            0 => self.pages.release().map_err(MigrationError::guest("end the loading of guest memory"))?,
            left => {
                let why = format!("the source has ended, and {left} bytes of guest memory have not come");
                return Err(MigrationError::Guest { doing: "receive guest memory", source: why.into() });
            }
        }
        self.lock().started = false;
        Ok(())
    }

    pub(super) fn request_channel(&self) -> MutexGuard<'_, RequestChannel> {
        self.request_channel.lock()
    }

    pub(super) fn book(&self) -> MutexGuard<'_, PageFaults> {
        self.book.lock()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// Whether a page was there already.
fn exists(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postcopy").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}
