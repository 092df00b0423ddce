//! What all connections of one migration know together: whether everything that the source sent has arrived.
//!
//! The destination's last word, SHUT 0, makes the source give up its guest. It may only be said when every page channel
//! has delivered the SYNC packets that the main channel announced, which a [`SyncBarrier`] knows, and no packet number
//! is missing, which would be on a channel that never came. Connections that have not shown to belong to the migration
//! do not count. What goes wrong on one connection must end the others.

use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_inspect::failure::Failure;
use qevm_multifd::{ChannelSet, FlushMode, Init, Progress, SyncBarrier, SyncError, Waiting};
use qevm_savevm::ram::{RamBlock, RamBlocks};
use qevm_wire::{Blame, PageGeometry};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long page channels may be under way of which nothing is known, if the main channel has brought no page itself.
const DOUBT: Duration = Duration::from_secs(2);

/// The shared state of a migration that arrives.
#[derive(Debug)]
pub(super) struct Ledger {
    /// The address that is listened on, for errors.
    address: String,
    /// The source's `multifd-channels`, if it is known; 0 without multifd.
    expected: Option<u8>,
    state: Mutex<State>,
    changed: Condvar,
    bytes: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// By number.
    channels: BTreeMap<u8, Channel>,
    /// Why a page channel was turned away that could be one of this migration.
    refused: Option<String>,
    /// Once the configuration section is over.
    pages: Option<PageGeometry>,
    blocks: Arc<RamBlocks>,
    /// The source may send pages on a second channel in postcopy.
    postcopy: bool,
    /// The main channel has brought pages.
    main_pages: bool,
    /// Who has met which synchronisation.
    barrier: SyncBarrier,
    /// When the main channel waited for the page channels for the first time.
    first_mark: Option<Instant>,
    /// The end of the stream has come on the main channel.
    main_ended: bool,
    phase: Phase,
    failure: Option<Failure>,
}

/// How far the migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Bytes are expected.
    Arriving,
    /// All has arrived: nothing that comes now changes that.
    Settled,
    /// The source has had its answer and the main channel is closed.
    Over,
}

#[derive(Debug)]
struct Channel {
    init: Init,
    numbers: Numbers,
    ended: bool,
}

/// The packet numbers of a page channel up to its last SYNC packet.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Numbers {
    /// How many were used.
    pub(super) used: u64,
    /// The first and the last of them.
    pub(super) range: Option<(u64, u64)>,
}

/// Why SHUT 0 cannot be said yet.
struct Missing {
    message: String,
    /// It cannot come any more.
    hopeless: bool,
}

impl State {
    /// The source flushes page channels, and so has some.
    fn flushes(&self) -> bool {
        self.barrier.mode() == Some(FlushMode::PerRound)
    }

    /// A channel was turned away, and the source has closed all others: it will not open the one that is missing.
    fn has_left(&self) -> bool {
        self.refused.is_some() && !self.channels.is_empty() && self.channels.values().all(|channel| channel.ended)
    }
}

impl Ledger {
    pub(super) fn new(address: String, expected: Option<u8>) -> Self {
        let state = State {
            channels: BTreeMap::new(),
            refused: None,
            pages: None,
            blocks: Arc::default(),
            postcopy: false,
            main_pages: false,
            barrier: SyncBarrier::new(expected.unwrap_or(0), None),
            first_mark: None,
            main_ended: false,
            phase: Phase::Arriving,
            failure: None,
        };
        Ledger { address, expected, state: Mutex::new(state), changed: Condvar::new(), bytes: AtomicU64::new(0) }
    }

    /// The address that is listened on.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that arrived on all connections of the migration.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn phase(&self) -> Phase {
        self.locked().phase
    }

    /// The main channel is closed.
    pub(super) fn over(&self) {
        self.locked().phase = Phase::Over;
    }

    /// The first failure; from then on nothing that arrives means anything.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.locked().failure.clone()
    }

    /// Notes a failure, unless all has arrived already.
    pub(super) fn fail(&self, failure: Failure) {
        let mut state = self.locked();
        if state.phase == Phase::Arriving {
            state.failure.get_or_insert(failure);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// `failure` with what may be its cause: the source of a channel that was turned away breaks off.
    pub(super) fn explained(&self, failure: Failure) -> Failure {
        match &self.locked().refused {
            Some(refused) if !failure.message.contains(refused.as_str()) => {
                let message = format!("{refused}; then: {}", failure.message);
                Failure { kind: "mismatch", message, ..failure }
            }
            _ => failure,
        }
    }

    /// The main channel is past its configuration section, in which only large pages are announced.
    pub(super) fn configured(&self, pages: Option<PageGeometry>) {
        let mut state = self.locked();
        if state.pages.is_none() {
            state.pages = Some(pages.unwrap_or(PageGeometry::X86));
            // From now on they can be followed, and no longer leave unnoticed.
            let channels: Vec<u8> = state.channels.keys().copied().collect();
            channels.into_iter().for_each(|channel| self.join(&mut state, channel));
        }
    }

    /// If it was not known how many page channels there are, this is one more.
    fn join(&self, state: &mut State, channel: u8) {
        if self.expected.is_none() {
            // It came once; an error from before is reported where it was met.
            let _ = state.barrier.join(channel);
        }
    }

    /// The page size, which page channels need after their first packet, once it is known.
    pub(super) fn page_geometry(&self) -> Option<PageGeometry> {
        self.locked().pages
    }

    /// The main channel lists a RAM block.
    pub(super) fn block(&self, block: RamBlock) {
        // A list that cannot be is refused by the main channel's decoder.
        let _ = Arc::make_mut(&mut self.locked().blocks).push(block);
    }

    /// The source has announced postcopy.
    pub(super) fn postcopy_advised(&self) {
        self.locked().postcopy = true;
    }

    /// The main channel has brought a page.
    pub(super) fn main_page(&self) {
        self.locked().main_pages = true;
    }

    /// What a second channel of postcopy would refer to, if the source may open one.
    pub(super) fn preempt_context(&self) -> Option<(Arc<RamBlocks>, PageGeometry)> {
        let state = self.locked();
        state.postcopy.then(|| (Arc::clone(&state.blocks), state.pages.unwrap_or(PageGeometry::X86)))
    }

    /// A page channel has shown its first packet: says why it does not belong to this migration, if it does not.
    ///
    /// # Errors
    /// The reason, for people.
    pub(super) fn admit(&self, init: &Init) -> Result<(), String> {
        let mut state = self.locked();
        let reason = match self.expected {
            Some(0) => Err("a multifd channel came, but none is expected here".to_owned()),
            expected => {
                let first = state.channels.values().next().map(|channel| channel.init.uuid);
                let mut set = ChannelSet::new(expected.unwrap_or(u8::MAX), first);
                let others = state.channels.values().map(|channel| &channel.init);
                let all = others.chain([init]).map(|init| set.arrived(init));
                all.collect::<Result<(), _>>().map_err(|error| error.to_string())
            }
        };
        match &reason {
            Ok(()) => {
                let channel = Channel { init: init.clone(), numbers: Numbers::default(), ended: false };
                state.channels.insert(init.channel, channel);
                if state.pages.is_some() {
                    self.join(&mut state, init.channel);
                }
            }
            Err(reason) => drop(state.refused.get_or_insert_with(|| reason.clone())),
        }
        drop(state);
        self.changed.notify_all();
        reason
    }

    /// A page channel went away before there was a migration that it could belong to.
    pub(super) fn forget(&self, channel: u8) {
        self.locked().channels.remove(&channel);
    }

    /// A page channel has met a SYNC packet, up to which it has used these `numbers`. It must not be read while it
    /// [waits](Self::channel_waits).
    pub(super) fn channel_sync(&self, channel: u8, numbers: Numbers) -> Result<(), SyncError> {
        let mut state = self.locked();
        if let Some(channel) = state.channels.get_mut(&channel) {
            channel.numbers = numbers;
        }
        let met = state.barrier.channel_sync(channel).map(|_| ());
        self.changed.notify_all();
        met
    }

    /// Whether a page channel must not be read before others have synchronised with it.
    pub(super) fn channel_waits(&self, channel: u8) -> bool {
        self.locked().barrier.channel_waits(channel)
    }

    pub(super) fn channel_ended(&self, channel: u8) -> Result<(), SyncError> {
        let mut state = self.locked();
        if let Some(channel) = state.channels.get_mut(&channel) {
            channel.ended = true;
        }
        let ended = state.barrier.channel_end(channel);
        self.changed.notify_all();
        ended
    }

    /// The main channel ends a RAM section, and must not be read before [`wait`](Self::wait) returns.
    pub(super) fn eos(&self) {
        self.main_mark(SyncBarrier::main_eos);
    }

    /// The main channel flushes the page channels, and must not be read before [`wait`](Self::wait) returns.
    pub(super) fn flush(&self) {
        self.main_mark(SyncBarrier::main_flush);
    }

    fn main_mark(&self, meet: impl FnOnce(&mut SyncBarrier) -> Result<Progress, SyncError>) {
        let mut state = self.locked();
        state.first_mark.get_or_insert_with(Instant::now);
        if let Err(error) = meet(&mut state.barrier) {
            drop(state);
            self.fail(self.unsynchronised(&error));
        }
    }

    /// Waits until every page channel that is known has met the main channel's last mark, or something has failed.
    pub(super) fn wait(&self) {
        let mut state = self.locked();
        while state.barrier.main_waits() && state.failure.is_none() {
            self.changed.wait(&mut state);
        }
    }

    /// What the main channel waits for, if it does.
    pub(super) fn awaited(&self) -> Option<String> {
        let state = self.locked();
        state.barrier.main_waits().then(|| state.barrier.waiting().to_string())
    }

    /// Fails if page channels are missing although the main channel has waited for them longer than `patience`, or
    /// `longer` than any source takes.
    pub(super) fn check_missing(&self, patience: Duration, longer: bool) {
        let state = self.locked();
        let late = state.first_mark.is_some_and(|since| longer || since.elapsed() > patience);
        let unexpected = self.expected == Some(0) && state.flushes();
        let Some(message) = self.missing(&state).filter(|_| late || unexpected) else { return };
        drop(state);
        self.fail(Failure::mismatch(&self.address, 0, "multifd channels", message));
    }

    /// Memory is complete: the main channel announces no further synchronisation.
    pub(super) fn end_of_memory(&self) {
        let ended = self.locked().barrier.main_end();
        if let Err(error) = ended {
            self.fail(self.unsynchronised(&error));
        }
    }

    /// The failure that the channels have not synchronised.
    fn unsynchronised(&self, error: &SyncError) -> Failure {
        let failure = Failure::mismatch(&self.address, 0, "multifd channels", error.to_string());
        Failure { kind: error.fault().as_str(), ..failure }
    }

    /// The main channel's stream has ended. What is waited for from now on has a patience of its own.
    pub(super) fn main_ended(&self) {
        self.locked().main_ended = true;
    }

    /// The source may still owe something on the main channel.
    pub(super) fn awaits_main(&self) -> bool {
        !self.locked().main_ended
    }

    /// The main channel is over: waits until every page channel has delivered what was announced, for `patience` at
    /// most, and gives what is missing then.
    pub(super) fn settle(&self, patience: Duration) -> Option<Failure> {
        let started = Instant::now();
        let mut state = self.locked();
        loop {
            if state.failure.is_some() {
                return state.failure.clone();
            }
            if let Err(error) = state.barrier.healthy() {
                return Some(self.unsynchronised(&error));
            }
            let waited = started.elapsed();
            let limit = match self.lacks(&state) {
                Some(Missing { message, hopeless }) if hopeless || waited >= patience => {
                    let failure = Failure::mismatch(&self.address, 0, "multifd channels", message);
                    return Some(state.failure.get_or_insert(failure).clone());
                }
                Some(_) => patience,
                None if self.doubts(&state) && waited < DOUBT.min(patience) => DOUBT.min(patience),
                None => {
                    state.phase = Phase::Settled;
                    return None;
                }
            };
            let left = limit.saturating_sub(waited);
            self.changed.wait_for(&mut state, left);
        }
    }

    /// All pages may be under way on channels that were not announced: sources before 8.1 do not flush.
    fn doubts(&self, state: &State) -> bool {
        self.expected.is_none() && state.channels.is_empty() && !state.main_pages && !state.blocks.is_empty()
    }

    fn lacks(&self, state: &State) -> Option<Missing> {
        if let Some(message) = self.missing(state) {
            return Some(Missing { message, hopeless: self.expected == Some(0) || state.has_left() });
        }
        // A source with page channels sends its pages on them. If there are pages here, the channel was a stranger's.
        if let Some(refused) = state.refused.as_ref().filter(|_| state.channels.is_empty() && !state.main_pages) {
            return Some(Missing { message: refused.clone(), hopeless: true });
        }
        // Of channels that came late, for which no synchronisation has waited.
        match state.barrier.waiting() {
            waiting @ Waiting::Channels(_) => Some(Missing { message: waiting.to_string(), hopeless: false }),
            _ => self.missing_numbers(state),
        }
    }

    /// Packets are numbered over all channels. Up to QEMU 7.2 a race gives some numbers to two packets, so that fewer
    /// can be missing than there are packets; but not more.
    fn missing_numbers(&self, state: &State) -> Option<Missing> {
        let used: u64 = state.channels.values().map(|channel| channel.numbers.used).sum();
        let ranges = state.channels.values().filter_map(|channel| channel.numbers.range);
        let (first, last) = ranges.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
        (last - first >= used).then(|| {
            let reason = state.refused.as_ref().map_or(String::new(), |refused| format!(" ({refused})"));
            let message =
                format!("packets have numbers {first} to {last}, but only {used} came: a channel is missing{reason}");
            let hopeless = self.expected.is_some() || state.has_left();
            Missing { message, hopeless }
        })
    }

    fn missing(&self, state: &State) -> Option<String> {
        let came = state.channels.len();
        let hint = "multifd-channels must be equal on both sides";
        match self.expected {
            Some(0) if state.flushes() => {
                Some("the main channel waits for multifd channels, but none is expected here".into())
            }
            Some(expected) if came < usize::from(expected) => {
                Some(format!("{came} of {expected} multifd channels came: {hint}"))
            }
            None if came == 0 && state.flushes() => {
                Some("the main channel waits for multifd channels, but none came".into())
            }
            // Numbers have no gaps.
            None => match state.channels.keys().next_back() {
                Some(last) if usize::from(*last) >= came => {
                    Some(format!("channel {last} came, but only {came} in all"))
                }
                _ => None,
            },
            Some(_) => None,
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Nothing is half-done here if a holder panicked: every change is a single step.
        self.state.lock()
    }
}

#[cfg(test)]
mod tests;
