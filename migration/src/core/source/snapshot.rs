//! A snapshot of a guest that runs on (capability `background-snapshot`): its devices and its memory as of one instant.
//!
//! At that instant the guest is paused, its devices are saved and its memory is protected against writes; then it runs
//! on. What is sent after that is memory as it was: a thread that writes to a page first waits until the page was
//! copied.

use super::phase::{Phase, Snapshot};
use super::{Action, PageRoute, RAM_SECTION, SourceCore, Wake};
use crate::connections::Reader;
use crate::{MigrationError, PAGE_SIZE, Status};
use std::time::Duration;

/// Pages in a batch: they are copied before they are sent, so that no vCPU waits for the peer.
const AT_A_TIME: u64 = 64;

impl SourceCore {
    pub(super) fn snapshot(&mut self, step: Snapshot, now: Duration) -> Result<(), MigrationError> {
        let next = match step {
            Snapshot::Begin => {
                self.pause(now);
                Snapshot::Stopped
            }
            Snapshot::Stopped => {
                let running = self.pause.is_some_and(|pause| pause.was_running);
                self.do_next(Action::SaveDevices { running });
                Snapshot::Saved(None)
            }
            // Without its devices, memory is no guest.
            Snapshot::Saved(None) => Snapshot::Stopped,
            Snapshot::Saved(Some(devices)) => {
                self.do_next(Action::Protect);
                self.do_next(match self.pause {
                    Some(pause) if pause.was_running => Action::Resume,
                    _ => Action::StayStopped,
                });
                Snapshot::GoesOn { devices, result: Ok(()) }
            }
            Snapshot::GoesOn { devices, result } => {
                result.map_err(MigrationError::guest("let the guest run on"))?;
                if let Some(pause) = self.pause.take() {
                    self.statistics.downtime = Some(now.saturating_sub(pause.since));
                }
                self.stream.section_part(RAM_SECTION)?;
                Snapshot::Pages(devices)
            }
            Snapshot::Pages(devices) => {
                self.account_for(now);
                self.limiter.set_limit(self.parameters.max_bandwidth);
                let pages = (self.limiter.allowance(now) / PAGE_SIZE).min(AT_A_TIME);
                if pages == 0 {
                    self.wait(Some(now + self.limiter.wait(now)), Wake::Operator);
                    Snapshot::Pages(devices)
                } else if let Some(batch) = self.batch(pages, false)? {
                    self.do_next(Action::Pages(batch));
                    Snapshot::Pages(devices)
                } else {
                    self.do_next(Action::Unprotect);
                    Snapshot::AllCopied(devices)
                }
            }
            Snapshot::AllCopied(devices) => {
                if matches!(self.options.route, PageRoute::File | PageRoute::FileByThreads) {
                    self.do_next(Action::FinishFile);
                }
                self.stream.eos()?;
                self.stream.footer()?;
                // QEMU's snapshots go without, and it is unknown whether their memory is whole.
                self.stream.section_end(RAM_SECTION)?;
                self.stream.eos()?;
                self.stream.footer()?;
                self.device_sections(devices.sections())?;
                self.end_stream(&devices)?;
                self.do_next(Action::Send { doing: "the state of the devices" });
                Snapshot::Sent
            }
            Snapshot::Sent => {
                if self.options.reader != Reader::Nobody {
                    self.do_next(Action::Settle);
                }
                Snapshot::Settled(Ok(()))
            }
            Snapshot::Settled(result) => {
                result.map_err(|source| MigrationError::Send { doing: "the end of the stream", source })?;
                self.do_next(Action::End(Ok(())));
                self.phase = Phase::Over;
                return Ok(());
            }
        };
        self.phase = Phase::Snapshot(next);
        Ok(())
    }

    /// Setting up is over.
    pub(super) fn begin_snapshot(&mut self) {
        self.do_next(Action::Status(Status::Active));
        self.phase = Phase::Snapshot(Snapshot::Begin);
    }
}
