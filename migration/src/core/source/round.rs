//! The end of a round: the dirty log is read, vCPUs are throttled if they dirty too much, and it is decided whether to
//! pause the guest.

use super::phase::{Phase, Precopy, RoundEnd, Step};
use super::{Action, Answers, Pending, RoundStatistics, SourceCore, Wake};
use crate::MigrationError;
use crate::statistics::PartStatistics;
use crate::switchover::{Decision, Remaining, Round, expected_downtime, per_second, shrink_rate};
use qevm_wire::PageGeometry;
use std::time::Duration;

/// With less than this much to do until the dirty log is read again, the source waits: where only a device is in the
/// way of the switchover, it would else do nothing but read the log. It reads it less than twenty times a second then.
const PACE: Duration = Duration::from_millis(60);
/// How long to wait for the destination to answer and to agree to the switchover before what was dirtied meanwhile is
/// sent.
const ACK_POLL: Duration = Duration::from_millis(100);

impl SourceCore {
    pub(super) fn end_round(
        &mut self,
        precopy: Precopy,
        step: Step,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        match step {
            Step::Read { sent_at } => {
                let new = self.pass_read(now);
                self.phase = Phase::Precopy(precopy, Step::Measure { sent_at, new });
                Ok(())
            }
            Step::Measure { sent_at, new } => {
                self.accounted.1 = now;
                let end = RoundEnd {
                    at: now,
                    took: now.saturating_sub(precopy.begin),
                    overhead: now.saturating_sub(sent_at),
                    new,
                };
                if !self.options.devices.is_empty() {
                    self.do_next(Action::AskDevices { exact: false });
                }
                self.phase = Phase::Precopy(precopy, Step::Sized(end));
                Ok(())
            }
            Step::Sized(end) => self.decide(precopy, end, now, answers),
            Step::SizedExactly(end, reason) => {
                let mut precopy = precopy;
                let pending = self.account.answered(&self.sizes, end.at, now);
                let decision = self.with_round(&end, &pending, |round| match reason {
                    Some(reason) => precopy.switchover.confirm(reason, round),
                    None => precopy.switchover.decide(round),
                });
                self.follow(precopy, decision, end, &pending, now, answers)
            }
            // The pause says nothing about the link.
            _ => {
                self.accounted.1 = now;
                self.phase = Phase::Precopy(precopy, Step::Begin);
                Ok(())
            }
        }
    }

    /// A pass begins with what the dirty log had. Gives the number of pages that were newly dirty.
    pub(super) fn pass_read(&mut self, now: Duration) -> u64 {
        let new = self.sweep_begins();
        self.passes += 1;
        self.statistics.ram.dirty_sync_count = self.passes;
        self.throttle(now, new * PageGeometry::X86.size());
        new
    }

    pub(super) fn sweep_begins(&mut self) -> u64 {
        let new = std::mem::take(&mut self.found) + self.sweep.begin();
        self.statistics.ram.remaining = self.remaining_bytes();
        new
    }

    /// Throttles a running guest if it dirties too much for the link (capabilities `auto-converge` and `dirty-limit`).
    fn throttle(&mut self, now: Duration, dirtied: u64) {
        if self.pause.is_some() || self.passes == 1 {
            return;
        }
        if self.options.capabilities.auto_converge
            && let Some(per_cent) = self.converge.dirty_log_read(now, dirtied, self.transferred, &self.parameters)
        {
            tracing::info!(per_cent, "auto-converge slows the vCPUs down");
            self.do_next(Action::Throttle(per_cent));
            self.throttled = true;
            self.statistics.throttled = Some(per_cent);
        }
        if self.options.capabilities.dirty_limit {
            let exceeded = self.trigger.dirty_log_read(now, dirtied, self.transferred, &self.parameters).is_some();
            // The parameter may change while the limit holds.
            let limit = Some(self.parameters.vcpu_dirty_limit).filter(|limit| self.limit != Some(*limit));
            if let Some(mib_per_second) = limit.filter(|_| exceeded || self.limit.is_some()) {
                tracing::info!(limit = mib_per_second, "dirty-limit slows the vCPUs down");
                let period = Duration::from_millis(self.parameters.vcpu_dirty_limit_period_ms);
                self.do_next(Action::LimitDirtyRate { mib_per_second, period });
                self.limit = Some(mib_per_second);
            }
        }
    }

    /// Decides by estimates, and asks exactly where that matters.
    fn decide(
        &mut self,
        mut precopy: Precopy,
        end: RoundEnd,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let ram_bytes = self.remaining_bytes();
        let due = self.with_round(&end, &[], |round| {
            let fits = |devices: u64| {
                let downtime = expected_downtime(ram_bytes.saturating_add(devices), round);
                downtime.is_some_and(|time| time <= round.downtime_limit)
            };
            self.account.is_due(&self.sizes, end.at, fits)
        });
        if due {
            self.do_next(Action::AskDevices { exact: true });
            self.phase = Phase::Precopy(precopy, Step::SizedExactly(end, None));
            return Ok(());
        }
        let pending = self.account.estimate(&self.sizes);
        let decision = self.with_round(&end, &pending, |round| precopy.switchover.decide(round));
        match decision {
            Decision::SwitchOver(reason) if !self.options.devices.is_empty() => {
                self.do_next(Action::AskDevices { exact: true });
                self.phase = Phase::Precopy(precopy, Step::SizedExactly(end, Some(reason)));
                Ok(())
            }
            decision => self.follow(precopy, decision, end, &pending, now, answers),
        }
    }

    /// What was measured, with `pending` of the devices.
    fn with_round<T>(&self, end: &RoundEnd, pending: &[Pending], with: impl FnOnce(&Round<'_>) -> T) -> T {
        let devices = self.names.iter().zip(pending).map(|(name, pending)| Remaining {
            name,
            bytes: pending.precopy,
            stopcopy: pending.stopcopy,
        });
        let remaining = self.remaining().map(|(name, bytes)| Remaining::ram(name, bytes)).chain(devices);
        let available = self.parameters.avail_switchover_bandwidth;
        with(&Round {
            remaining: &remaining.collect::<Vec<_>>(),
            took: end.took,
            overhead: end.overhead,
            bandwidth: self.bandwidth.estimate(),
            switchover_bandwidth: Some(available).filter(|bandwidth| *bandwidth > 0),
            downtime_limit: self.parameters.downtime_limit(),
        })
    }

    /// Does what was decided.
    fn follow(
        &mut self,
        mut precopy: Precopy,
        decision: Decision,
        end: RoundEnd,
        pending: &[Pending],
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let devices = pending.iter().fold(0, |sum: u64, pending| sum.saturating_add(pending.total()));
        let total = self.remaining_bytes().saturating_add(devices);
        tracing::trace!(?decision, ?pending, total, "round");
        let rate = per_second(end.new, end.took);
        let expected = self.with_round(&end, &[], |round| expected_downtime(total, round));
        let stall = match &decision {
            Decision::Iterate { stalled } => stalled.as_ref().map(|stall| stall.name.as_str()),
            Decision::SwitchOver(_) => None,
        };
        let parts = self.parts(pending, stall, end.took);
        let statistics = &mut self.statistics;
        statistics.devices_remaining = devices;
        statistics.parts = parts;
        statistics.ram.dirty_pages_rate = rate;
        statistics.expected_downtime = expected.unwrap_or(self.parameters.downtime_limit());
        statistics.rounds.push(RoundStatistics {
            start: precopy.begin,
            took: end.took,
            pages: precopy.pages,
            bytes: self.transferred - precopy.bytes_before,
            dirty_rate: rate * PageGeometry::X86.size(),
        });
        statistics.stalled = match &decision {
            Decision::Iterate { stalled: Some(stall) } => Some(stall.to_string()),
            _ => None,
        };
        precopy.begin = end.at;
        // Not the first, as with QEMU 11.1. A watcher that is notified finds what the round has left.
        self.do_next(Action::Pass(self.passes));
        match decision {
            Decision::Iterate { stalled } => {
                if let Some(stall) = stalled.filter(|stall| precopy.warned_of.as_ref() != Some(&stall.name)) {
                    tracing::warn!("{stall}");
                    precopy.warned_of = Some(stall.name);
                }
                // What fits is waited for no longer: another pass at once is to leave less.
                let fits = expected.is_some_and(|time| time <= self.parameters.downtime_limit());
                let step = if !fits && self.is_worth_a_pause(pending) {
                    self.wait(Some(now + PACE), Wake::Operator);
                    Step::Paced
                } else {
                    Step::Begin
                };
                self.phase = Phase::Precopy(precopy, step);
                Ok(())
            }
            Decision::SwitchOver(reason) => {
                tracing::debug!(?reason, remaining = total, "switchover");
                self.await_ack(precopy, now + ACK_POLL, now, answers)
            }
        }
    }

    /// What remains of each part, and how that has changed in this time.
    fn parts(&self, pending: &[Pending], stall: Option<&str>, time: Duration) -> Vec<PartStatistics> {
        let devices = self.names.iter().map(String::as_str).zip(pending.iter().map(|pending| pending.total()));
        let mut before = self.statistics.parts.iter().map(|part| part.remaining);
        let part = |(name, remaining): (&str, u64)| {
            let before = before.next().unwrap_or(remaining);
            let rate = shrink_rate(before, remaining, time);
            PartStatistics { name: name.to_owned(), remaining, rate, stalled: stall == Some(name) }
        };
        self.remaining().chain(devices).map(part).collect()
    }

    /// Whether there is hardly anything to send before the dirty log is read again, though the guest cannot be paused.
    fn is_worth_a_pause(&self, pending: &[Pending]) -> bool {
        let sendable = pending.iter().map(|pending| pending.precopy).fold(self.remaining_bytes(), u64::saturating_add);
        let enough = self.bandwidth.estimate().unwrap_or(0) / u64::from(1000 / PACE.subsec_millis());
        pending.iter().any(|pending| pending.stopcopy > 0) && sendable < enough
    }

    /// Pauses the guest when the destination has answered and agreed, and sends what it dirties meanwhile.
    pub(super) fn await_ack(
        &mut self,
        precopy: Precopy,
        until: Duration,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        self.agrees(now, answers.as_deref())?;
        answers.as_deref().map_or(Ok(()), |answers| self.is_answered_in_time(now, answers))?;
        let Some((waiting, ended)) = answers.and_then(|answers| Some((answers.unready()?, answers.has_ended()))) else {
            if self.postcopy && self.open_preempt() {
                self.phase = Phase::AwaitAck { until, precopy };
                return Ok(());
            }
            self.pause(now);
            self.phase = Phase::Stopping;
            return Ok(());
        };
        if now < until && !ended {
            self.wait(Some(until), Wake::Answers);
            self.phase = Phase::AwaitAck { until, precopy };
            return Ok(());
        }
        self.statistics.stalled = Some(waiting);
        // The wait says nothing about the link.
        self.accounted.1 = now;
        self.phase = Phase::Precopy(precopy, Step::Begin);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
