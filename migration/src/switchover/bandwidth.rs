//! How fast the link is.

use super::per_second;
use crate::rate::WINDOW;
use std::time::Duration;

/// The bandwidth of a link, measured over windows of at least 100 ms of sending.
///
/// Time that the rate limit makes the source wait counts, as in QEMU: the estimate is what the migration gets.
#[derive(Debug, Clone, Default)]
pub struct Bandwidth {
    bytes: u64,
    time: Duration,
    estimate: Option<u64>,
    /// Bytes per second when it was the link that was measured last.
    link: Option<u64>,
}

impl Bandwidth {
    /// Adds what was sent in some time.
    pub fn add(&mut self, bytes: u64, time: Duration) {
        self.note(bytes, time);
        self.link = self.estimate();
    }

    /// Adds pages that were sent in some time, in fewer bytes than they have (capability `xbzrle`), which say nothing
    /// of the link: `bytes` is what they have. It counts how fast pages go, but not as faster than in full over the
    /// link as it was before.
    pub fn add_differences(&mut self, bytes: u64, time: Duration) {
        let most = u128::from(self.link.unwrap_or(0)) * time.as_nanos() / 1_000_000_000;
        self.note(bytes.min(u64::try_from(most).unwrap_or(u64::MAX)), time);
    }

    fn note(&mut self, bytes: u64, time: Duration) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.time += time;
        if self.time >= WINDOW {
            self.estimate = Some(per_second(self.bytes, self.time).max(1));
            (self.bytes, self.time) = (0, Duration::ZERO);
        }
    }

    /// Bytes per second: of the last full window, or, before there was one, of what was sent so far.
    pub fn estimate(&self) -> Option<u64> {
        self.estimate.or((self.bytes > 0 && !self.time.is_zero()).then(|| per_second(self.bytes, self.time).max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A link of 100 MB/s, over which pages go as differences at 2 MB/s: at most they take the time that they would
    /// take in full.
    #[test]
    fn pages_that_go_as_differences_do_not_make_the_link_slow_or_fast() {
        let mut bandwidth = Bandwidth::default();
        bandwidth.add(10_000_000, 100 * MS);
        bandwidth.add_differences(20_000_000, 100 * MS);
        assert_eq!(bandwidth.estimate(), Some(100_000_000));
        // A processor that makes fewer of them than the link would carry is what counts.
        bandwidth.add_differences(4_000_000, 100 * MS);
        assert_eq!(bandwidth.estimate(), Some(40_000_000));
        bandwidth.add_differences(20_000_000, 100 * MS);
        assert_eq!(bandwidth.estimate(), Some(100_000_000));
        // The link has become slower.
        bandwidth.add(1_000_000, 100 * MS);
        bandwidth.add_differences(20_000_000, 100 * MS);
        assert_eq!(bandwidth.estimate(), Some(10_000_000));
        // Before anything is known of it, nothing is promised of it.
        let mut unknown = Bandwidth::default();
        unknown.add_differences(20_000_000, 100 * MS);
        assert_eq!(unknown.estimate(), Some(1));
    }

    #[test]
    fn bandwidth_is_what_the_last_window_gave() {
        let mut bandwidth = Bandwidth::default();
        assert_eq!(bandwidth.estimate(), None);
        bandwidth.add(1000, 10 * MS);
        assert_eq!(bandwidth.estimate(), Some(100_000));
        bandwidth.add(1000, 90 * MS);
        assert_eq!(bandwidth.estimate(), Some(20_000));
        bandwidth.add(5, 10 * MS);
        assert_eq!(bandwidth.estimate(), Some(20_000));
    }
}
