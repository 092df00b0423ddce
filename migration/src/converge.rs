//! Capabilities `auto-converge` and `dirty-limit`: when and by how much to slow vCPUs down, so that a guest that
//! dirties memory faster than the link carries it comes to an end. The rules are QEMU 11.1's.

use super::Parameters;
use std::time::Duration;

/// The dirty log is judged over at least this time.
const PERIOD: Duration = Duration::from_secs(1);
/// In this many periods the guest must have dirtied too much before it is slowed down (further).
const PERIODS: u32 = 2;

/// Says when a guest dirties too much, for `auto-converge` and `dirty-limit`.
#[derive(Debug, Default)]
pub(super) struct Trigger {
    /// When the period began, and what had been sent by then.
    since: (Duration, u64),
    /// Bytes dirtied in this period.
    dirtied: u64,
    /// Periods with too much since the last time.
    exceeded: u32,
}

/// Too much was dirtied.
pub(super) struct Exceeded {
    /// Bytes in the last period.
    dirtied: u64,
    /// Bytes that would not have been too much.
    threshold: u128,
}

impl Trigger {
    /// To be told of every reading of the dirty log: when (from the start of the migration), how many bytes were newly
    /// dirty, and how many have been sent in all.
    pub(super) fn dirty_log_read(
        &mut self,
        now: Duration,
        dirtied: u64,
        transferred: u64,
        parameters: &Parameters,
    ) -> Option<Exceeded> {
        self.dirtied += dirtied;
        if now.saturating_sub(self.since.0) <= PERIOD {
            return None;
        }
        let sent = transferred.saturating_sub(self.since.1);
        let dirtied = std::mem::take(&mut self.dirtied);
        self.since = (now, transferred);
        let threshold = u128::from(sent) * u128::from(parameters.throttle_trigger_threshold) / 100;
        if u128::from(dirtied) <= threshold {
            return None;
        }
        self.exceeded += 1;
        if self.exceeded < PERIODS {
            return None;
        }
        self.exceeded = 0;
        Some(Exceeded { dirtied, threshold })
    }
}

/// What was seen of the guest so far.
#[derive(Debug, Default)]
pub(super) struct AutoConverge {
    trigger: Trigger,
    per_cent: u8,
}

impl AutoConverge {
    /// To be told of every reading of the dirty log: when (from the start of the migration), how many bytes were newly
    /// dirty, and how many have been sent in all. Says how many per cent of their time vCPUs are to be paused from now
    /// on, when that changes.
    pub(super) fn dirty_log_read(
        &mut self,
        now: Duration,
        dirtied: u64,
        transferred: u64,
        parameters: &Parameters,
    ) -> Option<u8> {
        let Exceeded { dirtied, threshold } = self.trigger.dirty_log_read(now, dirtied, transferred, parameters)?;
        let before = self.per_cent;
        self.per_cent = match before {
            0 => parameters.cpu_throttle_initial,
            _ => before.saturating_add(step(before, dirtied, threshold, parameters)),
        };
        self.per_cent = self.per_cent.min(parameters.max_cpu_throttle).max(before);
        Some(self.per_cent).filter(|per_cent| *per_cent != before)
    }
}

fn step(per_cent: u8, dirtied: u64, threshold: u128, parameters: &Parameters) -> u8 {
    let increment = parameters.cpu_throttle_increment;
    if !parameters.cpu_throttle_tailslow {
        return increment;
    }
    // What the guest may run if what it dirties follows from it, in per cent.
    let running = u128::from(100 - per_cent.min(100));
    let ideal = running * threshold / u128::from(dirtied.max(1));
    increment.min((running - ideal.min(running)) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    /// Plays periods of just over a second in which this many MB were dirtied and sent.
    fn play(parameters: &Parameters, periods: &[(u64, u64)]) -> Vec<Option<u8>> {
        let (mut converge, mut sent) = (AutoConverge::default(), 0);
        let mut read = |(i, (dirtied, more)): (usize, &(u64, u64))| {
            sent += more * MB;
            let now = Duration::from_millis(1001) * (i as u32 + 1);
            converge.dirty_log_read(now, dirtied * MB, sent, parameters)
        };
        periods.iter().enumerate().map(&mut read).collect()
    }

    #[test]
    fn every_second_bad_period_slows_the_guest_down_further() {
        let parameters = Parameters::default();
        let said = play(&parameters, &[(100, 100); 8]);
        assert_eq!(said, [None, Some(20), None, Some(30), None, Some(40), None, Some(50)]);
        // The periods need not follow each other.
        assert_eq!(play(&parameters, &[(51, 100), (50, 100), (51, 100)]), [None, None, Some(20)]);
        assert_eq!(play(&parameters, &[(50, 100); 10]), [None; 10]);
    }

    #[test]
    fn it_ends_at_the_most_that_is_allowed() {
        let parameters = Parameters { max_cpu_throttle: 35, ..Parameters::default() };
        let said: Vec<u8> = play(&parameters, &[(100, 100); 20]).into_iter().flatten().collect();
        assert_eq!(said, [20, 30, 35]);
    }

    #[test]
    fn near_the_goal_the_steps_may_be_smaller() {
        let parameters = Parameters { cpu_throttle_tailslow: true, ..Parameters::default() };
        // 80 % running dirties 52 where 50 are allowed: 76 % would do.
        let said = play(&parameters, &[(100, 100), (100, 100), (52, 100), (52, 100)]);
        assert_eq!(said, [None, Some(20), None, Some(24)]);
    }

    #[test]
    fn short_rounds_count_together() {
        let (mut converge, parameters) = (AutoConverge::default(), Parameters::default());
        let mut said = Vec::new();
        for i in 1..=30_u32 {
            let now = Duration::from_millis(100) * i;
            said.extend(converge.dirty_log_read(now, 10 * MB, u64::from(i) * 10 * MB, &parameters));
        }
        assert_eq!(said, [20]);
    }
}
