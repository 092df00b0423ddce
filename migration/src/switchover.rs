//! The decision to switch over: when to stop the guest and send the rest.
//!
//! QEMU stops the guest as soon as what remains fits the downtime limit. So does this engine at the latest; but as long
//! as another round is cheap and leaves clearly less, it goes on, because a downtime limit is a limit and no goal.
//! The machine here is pure: it is told what was measured and says what to do.

mod bandwidth;

use std::fmt;
use std::time::Duration;

pub use bandwidth::Bandwidth;

/// What was measured when the dirty log was read at the end of a round.
#[derive(Debug, Clone, Copy)]
pub struct Round<'a> {
    /// Bytes that remain, by what they belong to: RAM blocks and iterable devices.
    pub remaining: &'a [Remaining<'a>],
    /// How long the round took, from one reading of the dirty log to the next.
    pub took: Duration,
    /// How much of that went by without sending, for reading the dirty log.
    pub overhead: Duration,
    /// Bytes per second that the link gives while the guest runs; `None` before it was measured.
    pub bandwidth: Option<u64>,
    /// `avail-switchover-bandwidth`, if it is set: bytes per second to reckon with for the switchover.
    pub switchover_bandwidth: Option<u64>,
    /// `downtime-limit`.
    pub downtime_limit: Duration,
}

/// A part of what is migrated and how much of it remains.
#[derive(Debug, Clone, Copy)]
pub struct Remaining<'a> {
    /// Name for messages, e.g. the RAM block's.
    pub name: &'a str,
    /// Bytes that can be sent while the guest runs.
    pub bytes: u64,
    /// Bytes that can be sent only when it has stopped; RAM has none.
    pub stopcopy: u64,
}

impl<'a> Remaining<'a> {
    /// This many bytes of RAM.
    pub fn ram(name: &'a str, bytes: u64) -> Self {
        Remaining { name, bytes, stopcopy: 0 }
    }

    fn total(&self) -> u64 {
        self.bytes.saturating_add(self.stopcopy)
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Send what remains while the guest runs, and read the dirty log again.
    Iterate {
        /// Set when what remains does not fit the downtime limit and no longer shrinks.
        stalled: Option<Stall>,
    },
    /// Stop the guest and send the rest.
    SwitchOver(Reason),
}

/// Why the guest may be stopped now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// What remains takes no time worth mentioning.
    Negligible,
    /// It fits the downtime limit and another round would leave hardly less.
    NoGain,
    /// It fits the downtime limit, and enough rounds were spent on less.
    Enough,
}

/// What does not shrink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stall {
    /// The part that remains largest.
    pub name: String,
    /// What remains of it in bytes.
    pub remaining: u64,
    /// By how many bytes a second that has shrunk since the round before; negative if it has grown.
    pub rate: i64,
    /// How much of that can be sent only when the guest has stopped.
    pub stopcopy: u64,
    /// Bytes per second at which the guest dirties memory.
    pub dirty_rate: u64,
    /// Bytes per second that the link gives.
    pub bandwidth: u64,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stall { name, remaining, rate, stopcopy, dirty_rate, bandwidth } = self;
        let by = Bytes(rate.unsigned_abs());
        write!(f, "'{name}' no longer shrinks: {} of it remain, ", Bytes(*remaining))?;
        match rate {
            0 => write!(f, "as many as before, ")?,
            1.. => write!(f, "{by}/s fewer than before, ")?,
            _ => write!(f, "{by}/s more than before, ")?,
        }
        match stopcopy {
            0 => write!(f, "the guest dirties {}/s", Bytes(*dirty_rate))?,
            stopcopy => write!(f, "{} of them to be sent when the guest has stopped,", Bytes(*stopcopy))?,
        }
        write!(f, " and the link carries {}/s", Bytes(*bandwidth))
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MB", self.0 as f64 / 1e6)
    }
}

/// A downtime that is not worth another round.
const NEGLIGIBLE: Duration = Duration::from_millis(1);
/// Another round is worth it if it is expected to leave less than this part (in percent) of what remains now.
const WORTHWHILE_PERCENT: u128 = 80;
/// Rounds that are spent at most on getting below what would fit the limit.
const MAX_EXTRA_ROUNDS: u32 = 30;
/// Time that is spent at most on that, in downtime limits…
const EXTRA_LIMITS: u32 = 2;
/// …or as a part of the time the migration has taken so far, whichever is more.
const EXTRA_PART: u32 = 8;
/// Rounds in a row without shrinking that make a stall…
const STALL_ROUNDS: u32 = 3;
/// …if they took at least this long: rounds are short where a device alone is in the way.
const STALL_TIME: Duration = Duration::from_secs(1);

/// Decides after every round.
///
/// ```
/// use qevm_migration::switchover::{Decision, Reason, Remaining, Round, Switchover};
/// use std::time::Duration;
///
/// let mut switchover = Switchover::default();
/// let mut round = |bytes, took| {
///     let remaining = [Remaining::ram("microvm.ram", bytes)];
///     switchover.decide(&Round {
///         remaining: &remaining,
///         took: Duration::from_millis(took),
///         overhead: Duration::ZERO,
///         bandwidth: Some(100_000_000),
///         switchover_bandwidth: None,
///         downtime_limit: Duration::from_millis(300),
///     })
/// };
/// // 40 MB were dirtied in a second: too much for 300 ms at 100 MB/s.
/// assert_eq!(round(40_000_000, 1000), Decision::Iterate { stalled: None });
/// // 16 MB would fit, but sending them leaves less still.
/// assert_eq!(round(16_000_000, 400), Decision::Iterate { stalled: None });
/// // 60 kB take 0.6 ms.
/// assert_eq!(round(60_000, 2), Decision::SwitchOver(Reason::Negligible));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Switchover {
    elapsed: Duration,
    extra_rounds: u32,
    extra_time: Duration,
    total: Shrinking,
    /// Of every part, in the order of the rounds.
    parts: Vec<Shrinking>,
}

/// Whether something shrinks.
#[derive(Debug, Clone, Copy, Default)]
struct Shrinking {
    /// What there was when it last shrank, and for how long it has not.
    from: Option<u64>,
    rounds: u32,
    time: Duration,
    /// What there was last, and by how many bytes a second that was less than before.
    last: Option<u64>,
    rate: i64,
}

impl Shrinking {
    /// By less than a tenth is not at all.
    fn note(&mut self, now: u64, took: Duration) {
        self.rate = shrink_rate(self.last.unwrap_or(now), now, took);
        self.last = Some(now);
        if self.from.is_none_or(|from| u128::from(now) * 10 < u128::from(from) * 9) {
            (self.from, self.rounds, self.time) = (Some(now), 0, Duration::ZERO);
        } else {
            (self.rounds, self.time) = (self.rounds + 1, self.time + took);
            // What has grown shrinks when it is less than that.
            self.from = self.from.max(Some(now));
        }
    }

    fn has_stalled(&self) -> bool {
        self.rounds >= STALL_ROUNDS && self.time >= STALL_TIME
    }
}

impl Switchover {
    /// Takes note of a round and says what to do next.
    pub fn decide(&mut self, round: &Round<'_>) -> Decision {
        let total = total(round.remaining);
        let stopcopy = round.remaining.iter().fold(0, |sum: u64, part| sum.saturating_add(part.stopcopy));
        self.elapsed += round.took;
        self.total.note(total, round.took);
        self.parts.resize(round.remaining.len(), Shrinking::default());
        self.parts.iter_mut().zip(round.remaining).for_each(|(part, now)| part.note(now.total(), round.took));

        let Some(downtime) = expected_downtime(total, round) else {
            return Decision::Iterate { stalled: None };
        };
        if downtime > round.downtime_limit {
            return self.too_much(round);
        }
        if downtime <= NEGLIGIBLE {
            return Decision::SwitchOver(Reason::Negligible);
        }
        if expected_after_another(total - stopcopy, stopcopy, round) * 100 >= u128::from(total) * WORTHWHILE_PERCENT {
            return Decision::SwitchOver(Reason::NoGain);
        }
        let allowed = (round.downtime_limit * EXTRA_LIMITS).max(self.elapsed / EXTRA_PART);
        if self.extra_rounds >= MAX_EXTRA_ROUNDS || self.extra_time >= allowed {
            return Decision::SwitchOver(Reason::Enough);
        }
        self.extra_rounds += 1;
        let sending = time_to_send(total - stopcopy, round.bandwidth.unwrap_or(0)).unwrap_or_default();
        self.extra_time += sending + round.overhead;
        Decision::Iterate { stalled: None }
    }

    /// Says what to do when [`decide`](Switchover::decide) was for switching over, by estimates, and this is what
    /// remains exactly.
    pub fn confirm(&mut self, reason: Reason, exact: &Round<'_>) -> Decision {
        match expected_downtime(total(exact.remaining), exact) {
            Some(downtime) if downtime <= exact.downtime_limit => Decision::SwitchOver(reason),
            _ => self.too_much(exact),
        }
    }

    fn too_much(&mut self, round: &Round<'_>) -> Decision {
        (self.extra_rounds, self.extra_time) = (0, Duration::ZERO);
        Decision::Iterate { stalled: self.stall(round) }
    }

    fn stall(&self, round: &Round<'_>) -> Option<Stall> {
        if !self.total.has_stalled() {
            return None;
        }
        let parts = self.parts.iter().zip(round.remaining);
        let (shrinking, part) = parts.max_by_key(|(shrinking, part)| (shrinking.has_stalled(), part.total()))?;
        Some(Stall {
            name: part.name.into(),
            remaining: part.total(),
            rate: shrinking.rate,
            stopcopy: part.stopcopy,
            dirty_rate: per_second(total(round.remaining), round.took),
            bandwidth: round.bandwidth.unwrap_or(0),
        })
    }
}

fn total(remaining: &[Remaining<'_>]) -> u64 {
    remaining.iter().fold(0, |sum, part| sum.saturating_add(part.total()))
}

/// How long the guest would be paused if it were stopped now; `None` if the bandwidth is not known.
pub fn expected_downtime(remaining: u64, round: &Round<'_>) -> Option<Duration> {
    if remaining == 0 {
        return Some(Duration::ZERO);
    }
    time_to_send(remaining, round.switchover_bandwidth.or(round.bandwidth)?)
}

/// Bytes per second.
pub(crate) fn per_second(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// By how many bytes a second what remains has become less in this time; negative if it has become more.
pub(crate) fn shrink_rate(before: u64, now: u64, time: Duration) -> i64 {
    let rate = per_second(before.abs_diff(now), time).min(i64::MAX as u64) as i64;
    if now > before { -rate } else { rate }
}

/// What would remain after another round: as much as the guest dirties meanwhile, at the rate of the round before, and
/// no more than now, because a round before that was no longer would else have found more; and what waits for the stop.
fn expected_after_another(precopy: u64, stopcopy: u64, round: &Round<'_>) -> u128 {
    let sending = round.bandwidth.and_then(|bandwidth| time_to_send(precopy, bandwidth)).unwrap_or(Duration::MAX);
    let next = sending.saturating_add(round.overhead).as_nanos();
    u128::from(stopcopy) + (u128::from(precopy) * next / round.took.as_nanos().max(1)).min(precopy.into())
}

pub(super) fn time_to_send(bytes: u64, bandwidth: u64) -> Option<Duration> {
    let nanos = u128::from(bytes) * 1_000_000_000;
    (bandwidth > 0).then(|| Duration::from_nanos(u64::try_from(nanos / u128::from(bandwidth)).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    /// Runs a migration of a guest that dirties `hot` bytes over and over at `dirty_rate` bytes per second, over a link
    /// of `bandwidth`, and gives the rounds and what was left at the switchover.
    fn simulate(ram: u64, hot: u64, dirty_rate: u64, bandwidth: u64, limit: Duration) -> Option<(u32, u64)> {
        let mut switchover = Switchover::default();
        let overhead = Duration::from_micros(200);
        let mut to_send = ram;
        for rounds in 1..200 {
            let took = time_to_send(to_send, bandwidth).unwrap() + overhead;
            let dirtied = (u128::from(dirty_rate) * took.as_nanos() / 1_000_000_000) as u64;
            let bytes = dirtied.min(hot);
            let decision = switchover.decide(&Round {
                remaining: &[Remaining::ram("ram", bytes)],
                took,
                overhead,
                bandwidth: Some(bandwidth),
                switchover_bandwidth: None,
                downtime_limit: limit,
            });
            match decision {
                Decision::SwitchOver(_) => return Some((rounds, bytes)),
                Decision::Iterate { .. } => to_send = bytes,
            }
        }
        None
    }

    #[test]
    fn a_guest_that_converges_stops_far_below_the_limit() {
        let (rounds, left) = simulate(1 << 30, 64 << 20, 40 << 20, 128 << 20, 300 * MS).unwrap();
        assert!(left < (128 << 20) / 300, "{left} bytes take more than 3 ms");
        assert!((4..12).contains(&rounds), "{rounds}");
    }

    #[test]
    fn a_small_hot_set_is_not_chased() {
        // 1 MiB is dirtied anew in every round, however short.
        let (rounds, left) = simulate(256 << 20, 1 << 20, 10 << 30, 128 << 20, 300 * MS).unwrap();
        assert_eq!(left, 1 << 20);
        assert!(rounds <= 3, "{rounds}");
    }

    #[test]
    fn a_guest_faster_than_the_link_is_never_stopped_and_the_stall_is_named() {
        assert_eq!(simulate(1 << 30, 512 << 20, 200 << 20, 100 << 20, 300 * MS), None);
        let mut switchover = Switchover::default();
        let mut last = Decision::SwitchOver(Reason::Enough);
        for _ in 0..5 {
            last = switchover.decide(&Round {
                remaining: &[Remaining::ram("pc.bios", 4096), Remaining::ram("microvm.ram", 200_000_000)],
                took: Duration::from_secs(2),
                overhead: MS,
                bandwidth: Some(50_000_000),
                switchover_bandwidth: None,
                downtime_limit: 300 * MS,
            });
        }
        let Decision::Iterate { stalled: Some(stall) } = last else { panic!("{last:?}") };
        assert_eq!((&*stall.name, stall.bandwidth, stall.dirty_rate), ("microvm.ram", 50_000_000, 100_002_048));
        assert_eq!(stall.rate, 0);
    }

    #[test]
    fn a_device_that_stalls_is_told_with_what_it_has_and_how_that_changes() {
        let mut switchover = Switchover::default();
        let mut round = |bytes, stopcopy| {
            let remaining = [Remaining::ram("ram", 4096), Remaining { name: "vf0", bytes, stopcopy }];
            let decision = switchover.decide(&Round {
                remaining: &remaining,
                took: 500 * MS,
                overhead: MS,
                bandwidth: Some(50_000_000),
                switchover_bandwidth: None,
                downtime_limit: 300 * MS,
            });
            match decision {
                Decision::Iterate { stalled } => stalled.map(|stall| stall.to_string()),
                decision => panic!("{decision:?}"),
            }
        };
        for _ in 0..3 {
            assert_eq!(round(2_000_000, 1 << 30), None);
        }
        let begin = "'vf0' no longer shrinks: 1075.7 MB of it remain, ";
        let end = "1073.7 MB of them to be sent when the guest has stopped, and the link carries 50.0 MB/s";
        assert_eq!(round(2_000_000, 1 << 30).unwrap(), format!("{begin}as many as before, {end}"));
        round(1_000_000, 1 << 30);
        assert_eq!(round(2_000_000, 1 << 30).unwrap(), format!("{begin}2.0 MB/s more than before, {end}"));
        round(3_000_000, 1 << 30);
        assert_eq!(round(2_000_000, 1 << 30).unwrap(), format!("{begin}2.0 MB/s fewer than before, {end}"));
    }

    #[test]
    fn nothing_left_needs_no_bandwidth_and_something_does() {
        let round = |remaining| Round {
            remaining,
            took: MS,
            overhead: MS,
            bandwidth: None,
            switchover_bandwidth: None,
            downtime_limit: Duration::ZERO,
        };
        let one = [Remaining::ram("ram", 4096)];
        assert_eq!(Switchover::default().decide(&round(&[])), Decision::SwitchOver(Reason::Negligible));
        assert_eq!(Switchover::default().decide(&round(&one)), Decision::Iterate { stalled: None });
    }

    #[test]
    fn the_switchover_bandwidth_replaces_the_measured_one_for_the_limit() {
        let remaining = [Remaining::ram("ram", 10_000_000)];
        let mut round = Round {
            remaining: &remaining,
            took: 10 * MS,
            overhead: MS,
            bandwidth: Some(10_000_000),
            switchover_bandwidth: None,
            downtime_limit: 100 * MS,
        };
        assert_eq!(Switchover::default().decide(&round), Decision::Iterate { stalled: None });
        round.switchover_bandwidth = Some(1_000_000_000);
        assert_eq!(Switchover::default().decide(&round), Decision::SwitchOver(Reason::NoGain));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Whatever the guest does, it is never stopped while the rest does not fit, and a rest that fits is not
        /// chased for ever.
        #[test]
        fn it_stops_only_what_fits_and_always_stops_it(
            rounds in prop::collection::vec((0u64..1 << 28, 1u64..2000), 1..100),
            bandwidth in 1u64..1 << 30,
            limit in 0u64..1000,
        ) {
            let mut switchover = Switchover::default();
            let mut fitting = 0;
            for (bytes, took) in rounds {
                let remaining = [Remaining::ram("ram", bytes)];
                let round = Round {
                    remaining: &remaining,
                    took: Duration::from_millis(took),
                    overhead: MS,
                    bandwidth: Some(bandwidth),
                    switchover_bandwidth: None,
                    downtime_limit: Duration::from_millis(limit),
                };
                let fits = expected_downtime(bytes, &round).unwrap() <= round.downtime_limit;
                fitting = if fits { fitting + 1 } else { 0 };
                match switchover.decide(&round) {
                    Decision::SwitchOver(_) => {
                        prop_assert!(fits);
                        return Ok(());
                    }
                    Decision::Iterate { .. } => prop_assert!(fitting <= MAX_EXTRA_ROUNDS),
                }
            }
        }
    }
}
