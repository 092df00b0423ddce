//! What all connections of one migration know together: whether everything that the source sent has arrived.
//!
//! The destination's last word, SHUT 0, makes the source give up its guest. It may only be said when every page channel
//! has delivered as many SYNC packets as the main channel announced; and what goes wrong on one connection must end
//! the others.

use crate::failure::Failure;
use qevm_multifd::{ChannelSet, Init};
use qevm_wire::PageGeometry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    set: ChannelSet,
    /// By number.
    channels: BTreeMap<u8, Channel>,
    /// Once the configuration section is over.
    pages: Option<PageGeometry>,
    eos: u64,
    flushes: u64,
    /// Connections that have not shown yet what they are.
    unrecognised: usize,
    /// The main channel is over.
    main_over: bool,
    /// After that, no connection was waiting to be accepted.
    all_accepted: bool,
    /// When the main channel waited for the page channels for the first time.
    first_mark: Option<Instant>,
    failure: Option<Failure>,
}

#[derive(Debug, Default)]
struct Channel {
    syncs: u64,
    ended: bool,
}

impl Ledger {
    pub(super) fn new(address: String, expected: Option<u8>) -> Self {
        let set = ChannelSet::new(expected.unwrap_or(u8::MAX), None);
        let state = State {
            set,
            channels: BTreeMap::new(),
            pages: None,
            eos: 0,
            flushes: 0,
            unrecognised: 0,
            main_over: false,
            all_accepted: false,
            first_mark: None,
            failure: None,
        };
        Ledger { address, expected, state: Mutex::new(state), changed: Condvar::new(), bytes: AtomicU64::new(0) }
    }

    /// Bytes that arrived on all connections.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The first failure; from then on nothing that arrives means anything.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.locked().failure.clone()
    }

    pub(super) fn fail(&self, failure: Failure) {
        self.locked().failure.get_or_insert(failure);
        self.changed.notify_all();
    }

    /// The main channel is past its configuration section, in which only large pages are announced.
    pub(super) fn configured(&self, pages: Option<PageGeometry>) {
        self.locked().pages.get_or_insert(pages.unwrap_or(PageGeometry::X86));
        self.changed.notify_all();
    }

    /// Waits for the page size, which page channels need behind their first packet; `None` after a failure.
    pub(super) fn page_geometry(&self) -> Option<PageGeometry> {
        let mut state = self.locked();
        while state.pages.is_none() && state.failure.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.pages.filter(|_| state.failure.is_none())
    }

    /// A connection was accepted.
    pub(super) fn accepted(&self) {
        self.locked().unrecognised += 1;
    }

    /// An accepted connection has shown what it is: a page channel also its first packet.
    pub(super) fn recognised(&self) {
        self.locked().unrecognised -= 1;
        self.changed.notify_all();
    }

    /// No connection is waiting to be accepted.
    pub(super) fn nobody_waits(&self) {
        let mut state = self.locked();
        if state.main_over && !state.all_accepted {
            state.all_accepted = true;
            drop(state);
            self.changed.notify_all();
        }
    }

    /// A page channel, called `name`, has shown its first packet.
    ///
    /// # Errors
    /// It does not belong to this migration, or the migration has other channels than expected.
    pub(super) fn channel_opened(&self, name: &str, init: &Init) -> Result<(), Failure> {
        let mut state = self.locked();
        if self.expected == Some(0) {
            let message = "a multifd channel came, but none is expected here";
            return Err(Failure::mismatch(name, 0, "multifd channel", message));
        }
        state.set.arrived(init).map_err(|error| Failure::located(name, error))?;
        state.channels.insert(init.channel, Channel::default());
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn channel_sync(&self, channel: u8) {
        if let Some(channel) = self.locked().channels.get_mut(&channel) {
            channel.syncs += 1;
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
        let mut state = self.locked();
        let late = state.first_mark.is_some_and(|since| since.elapsed() > patience);
        if late && let Some(message) = self.missing(&state) {
            let failure = Failure::mismatch(&self.address, 0, "multifd channels", message);
            state.failure.get_or_insert(failure);
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The main channel is over: waits until every page channel has delivered what was announced, for `patience` at
    /// most, and gives what is missing then. A channel can still be on its way into the program when the main channel
    /// is over: so no connection may be left that has not shown what it is.
    pub(super) fn settle(&self, patience: Duration) -> Option<Failure> {
        let deadline = Instant::now() + patience;
        let mut state = self.locked();
        state.main_over = true;
        loop {
            if state.failure.is_some() {
                return state.failure.clone();
            }
            let behind = self.behind(&state);
            let unknown = state.unrecognised > 0 || !state.all_accepted;
            let left = deadline.saturating_duration_since(Instant::now());
            match behind {
                Some((message, hopeless)) if hopeless || left.is_zero() => {
                    let failure = Failure::mismatch(&self.address, 0, "multifd channels", message);
                    return Some(state.failure.get_or_insert(failure).clone());
                }
                // A connection that is still silent then is no channel: those start with a packet.
                None if !unknown || left.is_zero() => return None,
                _ => {}
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What is still missing, and whether it cannot come any more.
    fn behind(&self, state: &State) -> Option<(String, bool)> {
        if let Some(message) = self.missing(state) {
            return Some((message, false));
        }
        // A source that flushes once a round says so; otherwise every RAM section ends in a SYNC.
        let waits = if state.flushes > 0 { state.flushes } else { state.eos };
        let (number, channel) = state.channels.iter().find(|(_, channel)| channel.syncs < waits)?;
        let found = channel.syncs;
        Some((
            format!("channel {number} brought {found} SYNC packets, the main channel waits for {waits}"),
            channel.ended,
        ))
    }

    fn missing(&self, state: &State) -> Option<String> {
        let came = state.channels.len();
        let hint = "multifd-channels must be equal on both sides";
        match self.expected {
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
mod tests {
    use super::*;
    use qevm_multifd::Uuid;

    const SOON: Duration = Duration::from_millis(20);

    fn ledger(expected: Option<u8>) -> Ledger {
        let ledger = Ledger::new("tcp:here:1".into(), expected);
        ledger.locked().all_accepted = true;
        ledger
    }

    fn open(ledger: &Ledger, number: u8) {
        if let Err(failure) = ledger.channel_opened("a channel", &Init::new(Uuid::default(), number)) {
            ledger.fail(failure);
        }
    }

    #[test]
    fn a_plain_migration_waits_for_nobody() {
        for expected in [None, Some(0)] {
            let ledger = ledger(expected);
            ledger.eos();
            assert_eq!(ledger.settle(Duration::ZERO), None);
        }
    }

    #[test]
    fn all_is_there_when_every_channel_has_brought_what_was_announced() {
        for per_round in [false, true] {
            let ledger = ledger(Some(2));
            open(&ledger, 1);
            open(&ledger, 0);
            ledger.eos();
            if per_round {
                ledger.flush();
                ledger.eos(); // means nothing
            }
            ledger.channel_sync(0);
            assert!(ledger.settle(SOON).is_some_and(|f| f.message.contains("channel 1 brought 0")), "{per_round}");
        }
        let ledger = ledger(Some(1));
        open(&ledger, 0);
        ledger.flush();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(SOON);
                ledger.channel_sync(0);
            });
            assert_eq!(ledger.settle(Duration::from_secs(20)), None);
        });
    }

    /// A source that is not asked for its number of channels can be done before its last channel was accepted.
    #[test]
    fn a_connection_that_is_not_recognised_yet_is_waited_for() {
        let ledger = Ledger::new("tcp:here:1".into(), None);
        ledger.accepted();
        open(&ledger, 0);
        ledger.recognised();
        ledger.flush();
        ledger.channel_sync(0);
        std::thread::scope(|scope| {
            let settled = scope.spawn(|| ledger.settle(Duration::from_secs(20)));
            while !ledger.locked().main_over {
                std::thread::yield_now();
            }
            ledger.accepted();
            ledger.nobody_waits();
            std::thread::sleep(SOON);
            assert!(!settled.is_finished());
            open(&ledger, 1);
            ledger.recognised();
            ledger.channel_sync(1);
            assert_eq!(settled.join().unwrap(), None);
        });
    }

    #[test]
    fn a_channel_that_ended_is_not_waited_for() {
        let ledger = ledger(None);
        open(&ledger, 0);
        ledger.flush();
        ledger.channel_ended(0);
        assert!(ledger.settle(Duration::from_secs(1000)).is_some());
    }

    #[test]
    fn a_wrong_number_of_channels_is_a_failure() {
        let few = ledger(Some(2));
        open(&few, 0);
        few.check_missing(Duration::ZERO);
        assert_eq!(few.failure(), None, "the main channel does not wait yet");
        few.flush();
        std::thread::sleep(SOON);
        few.check_missing(SOON / 2);
        assert!(few.failure().is_some_and(|f| f.message.starts_with("1 of 2")));

        let many = ledger(Some(1));
        open(&many, 1);
        assert!(many.failure().is_some_and(|f| f.message.contains("multifd-channels is 1")));
        let none = ledger(Some(0));
        open(&none, 0);
        assert!(none.failure().is_some());
        let twice = ledger(None);
        open(&twice, 0);
        open(&twice, 0);
        assert!(twice.failure().is_some_and(|f| f.message.contains("second connection")));
        let gap = ledger(None);
        open(&gap, 1);
        assert!(gap.settle(SOON).is_some());
        let silent = ledger(None);
        silent.flush();
        assert!(silent.settle(SOON).is_some());
    }

    #[test]
    fn a_failure_wakes_everybody() {
        let ledger = ledger(Some(1));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ledger.page_geometry());
            ledger.fail(Failure::mismatch("main", 0, "", "broken"));
            assert_eq!(waiting.join().unwrap(), None);
        });
        assert!(ledger.settle(Duration::from_secs(1000)).is_some());
    }
}
