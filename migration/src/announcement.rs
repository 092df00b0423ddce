//! When a guest that has moved tells its network where it is: `announce-*` and `announce-self`.

use crate::Parameters;
use std::time::Duration;

/// How often a guest is announced, and how long to wait in between: switches forget, and packets are lost.
///
/// ```
/// use qevm_migration::{Announcement, Parameters};
///
/// let delays: Vec<u128> = Announcement::of(&Parameters::default()).delays().map(|delay| delay.as_millis()).collect();
/// assert_eq!(delays, [0, 50, 150, 250, 350]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announcement {
    /// `announce-initial`: between the first and the second.
    pub initial: Duration,
    /// `announce-max`: the longest time between two.
    pub max: Duration,
    /// `announce-rounds`: how often.
    pub rounds: u64,
    /// `announce-step`: by how much the time between two grows.
    pub step: Duration,
}

impl Announcement {
    /// As the parameters say.
    pub fn of(parameters: &Parameters) -> Self {
        let milliseconds = Duration::from_millis;
        Announcement {
            initial: milliseconds(parameters.announce_initial_ms),
            max: milliseconds(parameters.announce_max_ms),
            rounds: parameters.announce_rounds,
            step: milliseconds(parameters.announce_step_ms),
        }
    }

    /// How long to wait before each one, after the one before it: the first is at once.
    pub fn delays(self) -> impl Iterator<Item = Duration> {
        let Announcement { initial, max, rounds, step } = self;
        let after = move |round: u64| {
            let steps = u32::try_from(round - 1).unwrap_or(u32::MAX);
            step.checked_mul(steps).and_then(|steps| initial.checked_add(steps)).map_or(max, |delay| delay.min(max))
        };
        (0..rounds).map(move |round| if round == 0 { Duration::ZERO } else { after(round) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 11.1.3 does on `announce-self`, to the millisecond that its clock allows.
    #[test]
    fn the_time_between_grows_up_to_its_limit() {
        let announcement = |initial, max, rounds, step| {
            let ms = Duration::from_millis;
            let announcement = Announcement { initial: ms(initial), max: ms(max), rounds, step: ms(step) };
            announcement.delays().map(|delay| delay.as_millis()).collect::<Vec<_>>()
        };
        assert_eq!(announcement(20, 100, 3, 20), [0, 20, 40]);
        assert_eq!(announcement(50, 120, 5, 100), [0, 50, 120, 120, 120]);
        assert_eq!(announcement(50, 550, 0, 100), [0; 0]);
        assert_eq!(announcement(u64::MAX, 7, 2, u64::MAX), [0, 7]);
    }
}
