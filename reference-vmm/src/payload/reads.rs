//! How long the guest's reads of pages took.

use std::time::Duration;

/// Counters for each doubling.
const PER_OCTAVE: usize = 16;
/// The first counter is of reads that took so long, as a power of two of nanoseconds.
const FIRST_OCTAVE: u32 = 12;
/// Counters.
const SLOTS: usize = 24 * PER_OCTAVE;

/// One `qevm-payload reads total=…` line: pages that the guest has read at random (key `reader`), and how many of these
/// reads took how long.
///
/// A counter is of times that differ by a sixteenth at most, from 4096 ns on. Faster reads are in the total alone.
///
/// ```
/// use reference_vmm::payload::Reads;
/// use std::time::Duration;
///
/// let reads = Reads::parse("qevm-payload reads total=1000 0:3 16:2").unwrap();
/// assert_eq!((reads.total, reads.slower(Duration::ZERO).count()), (1000, 5));
/// // From 8192 ns to a sixteenth more; the middle of that.
/// assert_eq!(reads.slower(Duration::from_micros(8)).mean(), Some(Duration::from_nanos(8448)));
/// assert!(Reads::parse("qevm-payload reads total=1000 0:3 16").is_none());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reads {
    /// Pages read.
    pub total: u64,
    /// How many took as long as the counter says.
    times: Vec<u64>,
}

impl Reads {
    /// Reads a line; `None` for any other line and for one that is damaged. The end of a line that was cut off may look
    /// whole.
    pub fn parse(line: &str) -> Option<Reads> {
        let mut words = line.trim_end().strip_prefix("qevm-payload reads total=")?.split(' ');
        let total = words.next()?.parse().ok()?;
        let mut times = vec![0; SLOTS];
        for word in words {
            let (slot, count) = word.split_once(':')?;
            *times.get_mut(slot.parse::<usize>().ok()?)? = count.parse().ok()?;
        }
        Some(Reads { total, times })
    }

    /// What was counted after `before`.
    pub fn since(&self, before: &Reads) -> Reads {
        let times = self.times.iter().zip(&before.times).map(|(now, before)| now.saturating_sub(*before)).collect();
        Reads { total: self.total.saturating_sub(before.total), times }
    }

    /// Those alone that took at least `time`, by their counters.
    pub fn slower(&self, time: Duration) -> Reads {
        let of_slot = |(slot, count): (usize, &u64)| if bounds(slot).0 >= time { *count } else { 0 };
        let times: Vec<u64> = self.times.iter().enumerate().map(of_slot).collect();
        Reads { total: times.iter().sum(), times }
    }

    /// The same without one of the slowest, if that took at least `time`.
    pub fn without_one(mut self, time: Duration) -> Reads {
        let slowest = self.times.iter().rposition(|count| *count > 0);
        if let Some(slot) = slowest.filter(|slot| bounds(*slot).1 >= time) {
            self.times[slot] -= 1;
            self.total = self.total.saturating_sub(1);
        }
        self
    }

    /// How many were counted by their time.
    pub fn count(&self) -> u64 {
        self.times.iter().sum()
    }

    /// Their mean; `None` if there are none.
    pub fn mean(&self) -> Option<Duration> {
        let sum: f64 =
            self.times.iter().enumerate().map(|(slot, count)| middle(slot).as_secs_f64() * *count as f64).sum();
        (self.count() > 0).then(|| Duration::from_nanos((sum / self.count() as f64 * 1e9).round() as u64))
    }

    /// The time that `part` of them (0 to 1) did not exceed; `None` if there are none.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let rank = (self.count() as f64 * part).ceil().max(1.0) as u64;
        let mut seen = 0;
        let reaches = |count: &u64| {
            seen += count;
            seen >= rank
        };
        self.times.iter().position(reaches).map(middle)
    }
}

/// The least time of a counter, and the first that is too long.
fn bounds(slot: usize) -> (Duration, Duration) {
    let of = |slot: usize| {
        let (octave, step) = (slot / PER_OCTAVE, slot % PER_OCTAVE);
        let width = (1u64 << FIRST_OCTAVE << octave) / PER_OCTAVE as u64;
        Duration::from_nanos(width * (PER_OCTAVE + step) as u64)
    };
    (of(slot), of(slot + 1))
}

fn middle(slot: usize) -> Duration {
    let (least, most) = bounds(slot);
    (least + most) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_follow_one_another() {
        assert_eq!(bounds(0), (Duration::from_nanos(4096), Duration::from_nanos(4352)));
        for slot in 1..SLOTS {
            assert_eq!(bounds(slot - 1).1, bounds(slot).0);
        }
    }

    #[test]
    fn quantiles_and_differences() {
        let before = Reads::parse("qevm-payload reads total=10 0:4 383:1").unwrap();
        let now = Reads::parse("qevm-payload reads total=210 0:103 32:1 383:1").unwrap();
        let since = now.since(&before);
        assert_eq!((since.total, since.count()), (200, 100));
        assert_eq!((since.quantile(0.99), since.quantile(1.0)), (Some(middle(0)), Some(middle(32))));
        assert_eq!(since.clone().without_one(Duration::from_millis(1)).count(), 100, "none took as long");
        assert_eq!(since.without_one(Duration::from_micros(16)).quantile(1.0), Some(middle(0)));
        assert_eq!(Reads::parse("qevm-payload reads total=7").unwrap().mean(), None);
        assert!(Reads::parse("qevm-payload reads total=7 384:1").is_none(), "there is no such counter");
    }
}
