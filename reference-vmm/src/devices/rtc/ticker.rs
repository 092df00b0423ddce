//! The clock with the thread that raises its interrupts when their time comes.

use super::Rtc;
use crate::devices::ticker::{Ticker, Timed};
use std::time::{SystemTime, UNIX_EPOCH};

/// The host's time in ns since 1970.
pub(crate) fn wall_clock() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128)
}

/// The clock and its thread.
pub(crate) type Clock = Ticker<Rtc>;

impl Timed for Rtc {
    fn next_event(&self) -> Option<i128> {
        Rtc::next_event(self)
    }

    fn catch_up(&mut self, now: i128) {
        Rtc::catch_up(self, now);
    }
}
