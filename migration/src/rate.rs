//! The rate limit of a migration: this many bytes per window of 100 ms, as QEMU counts them.

use std::time::Duration;

/// Length of an accounting window (QEMU 5.2 to 11.1).
pub const WINDOW: Duration = Duration::from_millis(100);

/// Windows in a second.
const WINDOWS_PER_SECOND: u64 = 10;

/// Counts what is sent in windows of 100 ms. Time is given from outside, as the time since any fixed moment.
///
/// ```
/// use qevm_migration::rate::{RateLimiter, WINDOW};
/// use std::time::Duration;
///
/// let mut limiter = RateLimiter::new(10_000, Duration::ZERO); // 1000 bytes per window
/// assert_eq!(limiter.allowance(Duration::ZERO), 1000);
/// limiter.sent(1200);
/// assert_eq!(limiter.allowance(Duration::from_millis(40)), 0);
/// assert_eq!(limiter.wait(Duration::from_millis(40)), Duration::from_millis(60));
/// // What went over the limit counts against the next window.
/// assert_eq!(limiter.allowance(WINDOW), 800);
/// ```
#[derive(Debug, Clone)]
pub struct RateLimiter {
    per_window: u64,
    start: Duration,
    spent: u64,
}

impl RateLimiter {
    /// A limiter for `bytes_per_second` (0: unlimited) whose first window starts `now`.
    pub fn new(bytes_per_second: u64, now: Duration) -> Self {
        RateLimiter { per_window: per_window(bytes_per_second), start: now, spent: 0 }
    }

    /// Changes the limit from here on.
    pub fn set_limit(&mut self, bytes_per_second: u64) {
        self.per_window = per_window(bytes_per_second);
    }

    /// How many bytes may still be sent in the window that `now` is in.
    pub fn allowance(&mut self, now: Duration) -> u64 {
        let elapsed = now.saturating_sub(self.start);
        if elapsed >= WINDOW {
            let windows = (elapsed.as_nanos() / WINDOW.as_nanos()) as u64;
            self.start += WINDOW * u32::try_from(windows).unwrap_or(u32::MAX);
            // Debt is carried over; an allowance that was not used is not.
            self.spent = self.spent.saturating_sub(self.per_window.saturating_mul(windows));
        }
        self.per_window.saturating_sub(self.spent)
    }

    /// Counts bytes that were sent.
    pub fn sent(&mut self, bytes: u64) {
        self.spent = self.spent.saturating_add(bytes);
    }

    /// How long the window that `now` is in still lasts.
    pub fn wait(&self, now: Duration) -> Duration {
        (self.start + WINDOW).saturating_sub(now)
    }
}

fn per_window(bytes_per_second: u64) -> u64 {
    match bytes_per_second {
        0 => u64::MAX,
        limit => (limit / WINDOWS_PER_SECOND).max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unlimited_never_waits() {
        let mut limiter = RateLimiter::new(0, Duration::ZERO);
        limiter.sent(1 << 60);
        assert!(limiter.allowance(Duration::ZERO) > 1 << 60);
    }

    #[test]
    fn an_unused_window_is_not_saved_up() {
        let mut limiter = RateLimiter::new(10_000, Duration::ZERO);
        assert_eq!(limiter.allowance(Duration::from_secs(60)), 1000);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Over any run of windows no more is sent than the limit allows, plus one unit that was under way.
        #[test]
        fn the_limit_holds(limit in 100_000u64..1_000_000_000, unit in 1u64..2_000_000, pauses in prop::collection::vec(0u64..30, 1..300)) {
            let mut limiter = RateLimiter::new(limit, Duration::ZERO);
            let (mut now, mut total) = (Duration::ZERO, 0u64);
            for pause in pauses {
                now += Duration::from_millis(pause);
                if limiter.allowance(now) > 0 {
                    limiter.sent(unit);
                    total += unit;
                } else {
                    now += limiter.wait(now);
                }
            }
            let windows = (now.as_millis() / 100) as u64 + 1;
            prop_assert!(total <= limit / 10 * windows + unit, "{total} in {windows} windows");
        }
    }
}
