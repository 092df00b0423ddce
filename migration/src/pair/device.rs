//! A device whose state goes in parts, of which it tells as little as a real one.

use crate::{GuestError, IterativeDevice, Pending};
use parking_lot::Mutex;
use std::time::{Duration, Instant};

pub(crate) const DEVICE: &str = "0000:00:04.0/vfio";

/// What its state does during a migration.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Behaviour {
    /// Bytes that it has to send while the guest runs.
    pub(crate) precopy: u64,
    /// How many bytes it makes anew for every byte that was sent while the guest runs.
    pub(crate) grows: u64,
    /// Bytes that it has to send when the guest has stopped, which only an exact answer tells.
    pub(crate) stopcopy: u64,
    /// Until so long after the beginning it claims to have this much more of them.
    pub(crate) more: Option<(Duration, u64)>,
}

pub(crate) struct FakeDevice {
    behaviour: Behaviour,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    begun: Option<Instant>,
    stopped: bool,
    sent: u64,
    /// Still to be sent: while the guest runs, and after that.
    precopy: u64,
    stopcopy: u64,
    asked: u32,
    ended: u32,
    loaded: Vec<u8>,
}

impl FakeDevice {
    pub(crate) fn new(behaviour: Behaviour) -> Self {
        FakeDevice { behaviour, state: Mutex::default() }
    }

    /// The guest has stopped: what is left may be sent.
    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
    }

    /// How often it was asked exactly.
    pub(crate) fn asked(&self) -> u32 {
        self.state.lock().asked
    }

    /// How many migrations it took part in that are over.
    pub(crate) fn ended(&self) -> u32 {
        self.state.lock().ended
    }

    /// All of its state has arrived at the other, in order.
    pub(crate) fn assert_arrived(&self, other: &FakeDevice) {
        let (here, there) = (self.state.lock(), other.state.lock());
        assert_eq!((here.precopy, here.stopcopy, here.sent), (0, 0, there.loaded.len() as u64));
        assert!(here.sent >= self.behaviour.precopy + self.behaviour.stopcopy);
        assert!(there.loaded.iter().enumerate().all(|(at, byte)| *byte == content(at as u64)));
    }
}

fn content(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl IterativeDevice for FakeDevice {
    fn idstr(&self) -> &str {
        DEVICE
    }

    fn begin(&self) -> Result<(), GuestError> {
        let Behaviour { precopy, stopcopy, .. } = self.behaviour;
        let mut state = self.state.lock();
        let (asked, ended) = (state.asked, state.ended);
        *state = State { begun: Some(Instant::now()), precopy, stopcopy, asked, ended, ..State::default() };
        Ok(())
    }

    fn estimate(&self) -> Pending {
        Pending { precopy: self.state.lock().precopy, stopcopy: 0 }
    }

    fn exact(&self) -> Result<Pending, GuestError> {
        let mut state = self.state.lock();
        state.asked += 1;
        let age = state.begun.ok_or("the migration has not begun")?.elapsed();
        let more = self.behaviour.more.filter(|(until, _)| age < *until).map_or(0, |(_, more)| more);
        Ok(Pending { precopy: state.precopy, stopcopy: state.stopcopy + more })
    }

    fn read(&self, into: &mut Vec<u8>, limit: usize) -> Result<(), GuestError> {
        let mut state = self.state.lock();
        let left = if state.precopy > 0 || !state.stopped { state.precopy } else { state.stopcopy };
        let count = left.min(limit as u64);
        into.extend((state.sent..state.sent + count).map(content));
        state.sent += count;
        if state.precopy > 0 {
            state.precopy -= count;
            if !state.stopped {
                state.precopy += count * self.behaviour.grows;
            }
        } else {
            state.stopcopy -= count;
        }
        Ok(())
    }

    fn load(&self, bytes: &[u8]) -> Result<(), GuestError> {
        self.state.lock().loaded.extend_from_slice(bytes);
        Ok(())
    }

    fn end(&self) {
        self.state.lock().ended += 1;
    }
}
