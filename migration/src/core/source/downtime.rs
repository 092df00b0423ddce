//! What the guest is paused for: every moment of a pause goes to one part of it.

use super::SourceCore;
use super::phase::{Phase, Postcopy, Rest, Snapshot, Stopped};
use crate::DowntimeParts;
use std::time::Duration;

impl SourceCore {
    /// Adds what has passed since the last step to the part that the step was of. Called before each step.
    pub(super) fn account_for_pause(&mut self, now: Duration) {
        let Some(pause) = self.pause.filter(|_| !self.departed) else { return };
        let since = self.pause_accounted.replace(now).unwrap_or(pause.since);
        if let Some(part) = part(&self.phase, &mut self.statistics.downtime_parts) {
            *part += now.saturating_sub(since);
        }
    }
}

/// The part that the actions before this phase were of.
fn part<'p>(phase: &Phase, parts: &'p mut DowntimeParts) -> Option<&'p mut Duration> {
    Some(match phase {
        Phase::Stopping | Phase::Stopped(Stopped::Save) | Phase::Snapshot(Snapshot::Stopped) => &mut parts.stop,
        Phase::PreSwitchover => &mut parts.pre_switchover,
        Phase::Stopped(Stopped::Saved(_)) | Phase::Snapshot(Snapshot::Saved(_)) => &mut parts.device_state,
        Phase::Stopped(Stopped::ReadLast(_)) | Phase::Postcopy(Postcopy::Begin(_)) => &mut parts.last_round,
        Phase::Completing(completing) => match completing.step {
            // Page channels are synchronised before the first device.
            Rest::Begin | Rest::Pages | Rest::Device(0) => &mut parts.last_round,
            Rest::Device(_) | Rest::DeviceRead(_) => &mut parts.device_state,
            Rest::Sent => &mut parts.send,
        },
        Phase::Snapshot(Snapshot::GoesOn { .. }) => &mut parts.protect,
        Phase::Postcopy(_) | Phase::Ending => &mut parts.send,
        Phase::AwaitAnswers { .. } | Phase::AwaitVerdict { .. } | Phase::Settling(_) | Phase::Committing { .. } => {
            &mut parts.load
        }
        Phase::Confirming { .. } => &mut parts.confirm,
        _ => return None,
    })
}
