//! A pass over the memory of a running guest: its dirty pages within the rate limit, and what its iterative devices
//! have.

use super::phase::{Phase, Precopy, Step};
use super::{Action, Answers, FLUSH_AT, PageRoute, RAM_SECTION, SourceCore, Wake};
use crate::MigrationError;
use crate::switchover::time_to_send;
use qevm_multifd::SourceSync;
use qevm_wire::PageGeometry;
use std::time::Duration;

/// A PART ends at the latest after this time, so that other sections get their turn (QEMU 5.2 to 11.1).
const PART_TIME: Duration = Duration::from_millis(50);
/// Looking ahead in the dirty log takes at most one part in this many of the first sweep.
const LOOKAHEAD_SHARE: u32 = 32;
/// Bytes of a device's state in one record (QEMU 8.1 to 11.1).
pub(super) const RECORD: usize = 1 << 20;
/// Bytes on the way that are not worth waiting for: less than a millisecond on a link of 1 Gbit/s.
const NEGLIGIBLE: u64 = 64 << 10;
/// How long to wait at least, and at most, before asking again what is on its way.
const BACKLOG_POLL: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(10));

impl SourceCore {
    pub(super) fn pass(
        &mut self,
        mut precopy: Precopy,
        step: Step,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let next = match step {
            Step::FirstRead => {
                self.pass_read(now);
                precopy.begin = now;
                Step::Begin
            }
            Step::Begin => {
                precopy.bytes_before = self.transferred;
                precopy.pages = self.sweep.remaining().sum();
                precopy.look_at = Duration::ZERO;
                Step::Sweep
            }
            Step::Sweep if self.postcopy_may_start(answers.as_deref()) => {
                if self.open_preempt() {
                    // It may take long, or fail, and the guest runs on.
                    self.phase = Phase::Precopy(precopy, Step::Sweep);
                    return Ok(());
                }
                self.pause(now);
                self.phase = Phase::Stopping;
                return Ok(());
            }
            Step::Sweep if self.sweep.is_over() => self.ask_device(0),
            Step::Sweep => self.next_section(&precopy, now)?,
            Step::Looked { since } => {
                self.look_ahead = false;
                let resets = self.sweep.reset_lead();
                self.do_next(Action::Reset(resets));
                Step::LookedAhead { since }
            }
            Step::LookedAhead { since } => {
                precopy.look_at = since + now.saturating_sub(since) * LOOKAHEAD_SHARE;
                self.stream.section_part(RAM_SECTION)?;
                Step::Section { since }
            }
            Step::Section { since } => {
                let pages = self.limiter.allowance(now) / PageGeometry::X86.size();
                match self.batch(pages, true)? {
                    Some(batch) => {
                        self.do_next(Action::Pages(batch));
                        Step::Batched { since }
                    }
                    None => self.end_section()?,
                }
            }
            Step::Batched { since } => {
                self.flush_zero_pages();
                if now.saturating_sub(since) >= PART_TIME || self.limiter.allowance(now) == 0 {
                    self.end_section()?
                } else {
                    Step::Section { since }
                }
            }
            Step::SectionSent => {
                self.account_for(now);
                Step::Sweep
            }
            Step::Device { .. } | Step::DeviceLeft { .. } | Step::DeviceRead { .. } => {
                self.device_step(step, now, answers)?
            }
            Step::Drain if self.backlog > NEGLIGIBLE => {
                let (least, most) = BACKLOG_POLL;
                let left = self.bandwidth.estimate();
                let left = left.and_then(|bandwidth| time_to_send(self.backlog - NEGLIGIBLE, bandwidth));
                self.wait(Some(now + left.unwrap_or(least).clamp(least, most)), Wake::Operator);
                Step::DrainAgain
            }
            Step::DrainAgain => self.drain(),
            Step::Drain => {
                self.account_for(now);
                self.do_next(Action::ReadLog);
                Step::Read { sent_at: now }
            }
            Step::Read { .. } | Step::Measure { .. } | Step::Sized(_) | Step::SizedExactly(..) | Step::Paced => {
                return self.end_round(precopy, step, now, answers);
            }
        };
        self.phase = Phase::Precopy(precopy, next);
        Ok(())
    }

    /// Asks an iterative device what it has, and sends that within the rate limit, until it is the next one's turn.
    fn device_step(
        &mut self,
        step: Step,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<Step, MigrationError> {
        Ok(match step {
            Step::Device { device } => match self.sizes.get(device).map(|size| size.estimate.precopy) {
                Some(left) => {
                    self.device_told(device, answers)?;
                    Step::DeviceLeft { device, left }
                }
                None => self.drain(),
            },
            Step::DeviceLeft { device, left: 0 } if self.initial_data_are_due(device) => {
                self.stream.section_part(Self::device_section(device))?;
                self.end_device_part(device, 0, answers)?;
                self.do_next(Action::Send { doing: "the state of a device" });
                Step::DeviceLeft { device, left: 0 }
            }
            Step::DeviceLeft { device, left: 0 } => self.ask_device(device + 1),
            Step::DeviceLeft { device, left } if self.within_rate(now) => {
                self.stream.section_part(Self::device_section(device))?;
                let limit = RECORD.min(usize::try_from(left).unwrap_or(RECORD));
                self.do_next(Action::ReadDevice { device, limit });
                Step::DeviceRead { device, left }
            }
            Step::DeviceRead { device, left } => {
                self.end_device_part(device, self.record, answers)?;
                self.do_next(Action::Send { doing: "the state of a device" });
                let left = if self.record == 0 { 0 } else { left.saturating_sub(self.record) };
                Step::DeviceLeft { device, left }
            }
            step => step,
        })
    }

    /// Opens the next section, unless the rate limit or a look ahead comes first.
    fn next_section(&mut self, precopy: &Precopy, now: Duration) -> Result<Step, MigrationError> {
        if !self.within_rate(now) {
            return Ok(Step::Sweep);
        }
        if let Some(bandwidth) = self.bandwidth.estimate() {
            self.sweep.expect(bandwidth / PageGeometry::X86.size());
        }
        if self.passes == 1 && now >= precopy.look_at {
            self.look_ahead = true;
            self.do_next(Action::ReadLog);
            return Ok(Step::Looked { since: now });
        }
        self.stream.section_part(RAM_SECTION)?;
        Ok(Step::Section { since: now })
    }

    fn end_section(&mut self) -> Result<Step, MigrationError> {
        if self.sweep.is_over() {
            self.synchronise(SourceSync::round_end)?;
        }
        self.synchronise(SourceSync::section_end)?;
        self.stream.footer()?;
        self.do_next(Action::Send { doing: "the end of a RAM section" });
        Ok(Step::SectionSent)
    }

    /// Beside page channels, only zero pages fill the stream.
    pub(super) fn flush_zero_pages(&mut self) {
        if self.options.route != PageRoute::Main && self.stream.bytes().len() >= FLUSH_AT {
            self.do_next(Action::Send { doing: "zero pages" });
        }
    }

    /// Whether something may be sent now; otherwise the next window has to come.
    fn within_rate(&mut self, now: Duration) -> bool {
        self.limiter.set_limit(self.parameters.max_bandwidth);
        let allowed = self.limiter.allowance(now) > 0;
        if !allowed {
            self.wait(Some(now + self.limiter.wait(now)), Wake::Operator);
        }
        allowed
    }

    /// A device sends in a pass what it has at its turn, and no more: one that goes on making state does not make the
    /// pass endless.
    fn ask_device(&mut self, device: usize) -> Step {
        if device < self.options.devices.len() {
            self.do_next(Action::AskDevices { exact: false });
        }
        Step::Device { device }
    }

    /// Waits until what was sent has left this host.
    ///
    /// The kernel takes megabytes that a slow link carries in tens of milliseconds. A round that ended before they are
    /// gone would look cheaper than it was, and at the switchover the guest would be paused while they go.
    fn drain(&mut self) -> Step {
        self.do_next(Action::MeasureBacklog { all: true });
        Step::Drain
    }
}
