//! The pauses that slow all vCPUs down: what their threads look at.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Says when a vCPU is to pause, and for how long.
#[derive(Debug, Default)]
pub(crate) struct ThrottleGate {
    /// Counts the pauses that were asked for.
    pauses: AtomicU64,
    /// Length of a pause in nanoseconds.
    length: AtomicU64,
}

impl ThrottleGate {
    /// The pause to make now, if one was asked for since `seen`.
    pub(crate) fn due(&self, seen: &mut u64) -> Option<Duration> {
        let pauses = self.pauses.load(Ordering::Acquire);
        let length = Duration::from_nanos(self.length.load(Ordering::Relaxed));
        let due = pauses != std::mem::replace(seen, pauses);
        Some(length).filter(|length| due && !length.is_zero())
    }

    pub(super) fn request_pause(&self, length: Duration) {
        self.length.store(length.as_nanos() as u64, Ordering::Relaxed);
        self.pauses.fetch_add(1, Ordering::Release);
    }

    /// Whether nothing slows vCPUs down any more.
    pub(crate) fn released(&self) -> bool {
        self.length.load(Ordering::Relaxed) == 0
    }

    pub(super) fn release(&self) {
        self.length.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_made_once() {
        const LENGTH: Duration = Duration::from_millis(10);
        let (gate, mut seen) = (ThrottleGate::default(), 0);
        assert_eq!(gate.due(&mut seen), None);
        gate.request_pause(LENGTH);
        gate.request_pause(LENGTH);
        assert_eq!(gate.due(&mut seen), Some(LENGTH));
        assert_eq!(gate.due(&mut seen), None);
        gate.request_pause(LENGTH);
        gate.release();
        assert_eq!(gate.due(&mut seen), None);
    }
}
