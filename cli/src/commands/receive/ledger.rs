//! What all connections of one migration know together: whether everything that the source sent has arrived.
//!
//! The destination's last word, SHUT 0, makes the source give up its guest. It may only be said when every page channel
//! has delivered as many SYNC packets as the main channel announced, and no packet number is missing, which would be on
//! a channel that never came. Connections that have not shown to belong to the migration do not count. What goes wrong
//! on one connection must end the others.

use crate::failure::Failure;
use qevm_multifd::{ChannelSet, Init};
use qevm_savevm::ram::{RamBlock, RamBlocks};
use qevm_wire::PageGeometry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
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
    eos: u64,
    flushes: u64,
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
    delivered: Delivered,
    ended: bool,
}

/// What a page channel has brought up to its last SYNC packet.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Delivered {
    pub(super) syncs: u64,
    /// How many packet numbers were used.
    pub(super) numbers: u64,
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
            eos: 0,
            flushes: 0,
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
        self.locked().pages.get_or_insert(pages.unwrap_or(PageGeometry::X86));
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
                let channel = Channel { init: init.clone(), delivered: Delivered::default(), ended: false };
                state.channels.insert(init.channel, channel);
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

    pub(super) fn channel_sync(&self, channel: u8, delivered: Delivered) {
        if let Some(channel) = self.locked().channels.get_mut(&channel) {
            channel.delivered = delivered;
        }
        self.changed.notify_all();
    }

    pub(super) fn channel_ended(&self, channel: u8) {
        if let Some(channel) = self.locked().channels.get_mut(&channel) {
            channel.ended = true;
        }
        self.changed.notify_all();
    }

    /// The main channel ends a RAM section.
    pub(super) fn eos(&self) {
        let mut state = self.locked();
        state.eos += 1;
        state.first_mark.get_or_insert_with(Instant::now);
    }

    /// The main channel flushes the page channels.
    pub(super) fn flush(&self) {
        let mut state = self.locked();
        state.flushes += 1;
        state.first_mark.get_or_insert_with(Instant::now);
    }

    /// Fails if page channels are missing although the main channel has waited for them longer than `patience`.
    pub(super) fn check_missing(&self, patience: Duration) {
        let state = self.locked();
        let late = state.first_mark.is_some_and(|since| since.elapsed() > patience);
        let unexpected = self.expected == Some(0) && state.flushes > 0;
        let Some(message) = self.missing(&state).filter(|_| late || unexpected) else { return };
        drop(state);
        self.fail(Failure::mismatch(&self.address, 0, "multifd channels", message));
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
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All pages may be under way on channels that nobody has announced: sources before 8.1 do not flush.
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
        // A source that flushes once a round says so; otherwise every RAM section ends in a SYNC.
        let waits = if state.flushes > 0 { state.flushes } else { state.eos };
        if let Some((number, channel)) = state.channels.iter().find(|(_, c)| c.delivered.syncs < waits) {
            let found = channel.delivered.syncs;
            let message = format!("channel {number} brought {found} SYNC packets, the main channel waits for {waits}");
            return Some(Missing { message, hopeless: channel.ended });
        }
        self.missing_numbers(state)
    }

    /// Packets are numbered over all channels. Up to QEMU 7.2 a race gives some numbers to two packets, so that fewer
    /// can be missing than there are packets; but not more.
    fn missing_numbers(&self, state: &State) -> Option<Missing> {
        let used: u64 = state.channels.values().map(|channel| channel.delivered.numbers).sum();
        let ranges = state.channels.values().filter_map(|channel| channel.delivered.range);
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
            Some(0) if state.flushes > 0 => {
                Some("the main channel waits for multifd channels, but none is expected here".into())
            }
            Some(expected) if came < usize::from(expected) => {
                Some(format!("{came} of {expected} multifd channels came: {hint}"))
            }
            None if came == 0 && state.flushes > 0 => {
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
