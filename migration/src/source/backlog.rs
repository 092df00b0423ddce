//! What was written to the connections and is still on its way.

use super::Engine;
use crate::{MigrationError, switchover::time_to_send};
use std::time::Duration;

/// Bytes on the way that are not worth waiting for: less than a millisecond on a link of 1 Gbit/s.
const NEGLIGIBLE: u64 = 64 << 10;
/// How long to wait at least, and at most, before looking again.
const POLL: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(10));

impl Engine<'_> {
    /// Waits until what was sent has left this host.
    ///
    /// The kernel takes megabytes that a slow link carries in tens of milliseconds. A round that ended before they are gone
    /// would look cheaper than it was, and at the switchover the guest would stand still while they go.
    pub(super) fn drain(&mut self) -> Result<(), MigrationError> {
        loop {
            let backlog = self.connections.all().try_fold(0, |sum, channel| Ok(sum + channel.backlog()?));
            let backlog: u64 =
                backlog.map_err(|source| MigrationError::Send { doing: "what is on the way already", source })?;
            if backlog <= NEGLIGIBLE {
                return Ok(());
            }
            self.check()?;
            let (least, most) = POLL;
            let left = self.bandwidth.estimate().and_then(|bandwidth| time_to_send(backlog - NEGLIGIBLE, bandwidth));
            self.job.sleep(left.unwrap_or(least).clamp(least, most))?;
        }
    }
}
