//! What is on its way on each connection, and for how long nothing of it has got anywhere.

use std::time::Duration;

/// The most that counts between two looks: a process that was stopped has not waited.
const LONGEST: Duration = Duration::from_millis(250);

/// The backlogs of a migration's connections, in their order.
#[derive(Debug, Default)]
pub(super) struct Backlogs {
    channels: Vec<Backlog>,
    /// When they were looked at last.
    at: Duration,
}

#[derive(Debug, Clone, Copy, Default)]
struct Backlog {
    bytes: u64,
    still: Duration,
}

impl Backlogs {
    /// Takes the backlogs of all connections in, and says how long they have not changed: by number the connection that
    /// has waited longest, if one has something on its way.
    pub(super) fn look(&mut self, now: Duration, backlogs: &[u64]) -> Option<(usize, Duration)> {
        let passed = now.saturating_sub(std::mem::replace(&mut self.at, now)).min(LONGEST);
        self.channels.resize(backlogs.len(), Backlog::default());
        for (channel, bytes) in self.channels.iter_mut().zip(backlogs) {
            let same = channel.bytes == *bytes && *bytes > 0;
            *channel = Backlog { bytes: *bytes, still: if same { channel.still + passed } else { Duration::ZERO } };
        }
        let still = self.channels.iter().map(|channel| channel.still).enumerate();
        still.max_by_key(|(_, still)| *still).filter(|(_, still)| !still.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_on_which_nothing_moves_is_named() {
        let ms = Duration::from_millis;
        let mut backlogs = Backlogs::default();
        assert_eq!(backlogs.look(ms(10), &[5, 7]), None);
        assert_eq!(backlogs.look(ms(20), &[5, 6]), Some((0, ms(10))));
        assert_eq!(backlogs.look(ms(60), &[5, 6]), Some((0, ms(50))));
        // It moves, and the other has stood longer now.
        assert_eq!(backlogs.look(ms(70), &[4, 6]), Some((1, ms(50))));
        // Nothing is on its way any more, on either.
        assert_eq!(backlogs.look(ms(80), &[0, 0]), None);
        assert_eq!(backlogs.look(ms(90), &[0, 0]), None);
        // A process that was stopped for a minute has waited for a moment.
        assert_eq!(backlogs.look(ms(100), &[3, 0]), None);
        assert_eq!(backlogs.look(ms(60_100), &[3, 0]), Some((0, LONGEST)));
    }
}
