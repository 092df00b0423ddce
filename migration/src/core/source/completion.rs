//! The guest is paused: its devices are saved, and all that is left is sent but the end of the stream.

use super::phase::{Completing, Phase, Postcopy, Rest, Stopped};
use super::precopy::RECORD;
use super::{Action, Answers, PageRoute, Pause, RAM_SECTION, SourceCore, Wake};
use crate::{MigrationError, SavedDevices, Status, handover};
use qevm_multifd::SourceSync;
use qevm_savevm::command::Command;
use qevm_savevm::vfio::VfioRecord;
use std::time::Duration;

/// How often the return path is looked at while the guest waits for `migrate-continue`.
const PRE_SWITCHOVER_POLL: Duration = Duration::from_millis(100);

impl SourceCore {
    /// Pauses the guest, unless the mode did it already.
    pub(super) fn pause(&mut self, now: Duration) {
        if self.pause.is_none() {
            self.pause = Some(Pause { since: now, was_running: false });
            self.do_next(Action::Pause);
        }
    }

    pub(super) fn stopping(&mut self) -> Result<(), MigrationError> {
        self.statistics.ram.precopy_bytes = self.transferred;
        self.phase = if self.options.capabilities.pause_before_switchover {
            self.do_next(Action::Status(Status::PreSwitchover));
            Phase::PreSwitchover
        } else {
            Phase::Stopped(Stopped::Save)
        };
        Ok(())
    }

    pub(super) fn pre_switchover(&mut self, now: Duration) -> Result<(), MigrationError> {
        self.phase = if self.may_switch_over {
            Phase::Stopped(Stopped::Save)
        } else {
            self.wait(Some(now + PRE_SWITCHOVER_POLL), Wake::Continue);
            Phase::PreSwitchover
        };
        Ok(())
    }

    pub(super) fn stopped(&mut self, step: Stopped) -> Result<(), MigrationError> {
        self.phase = match step {
            Stopped::Save => {
                self.do_next(Action::Status(Status::Device));
                self.save_devices()
            }
            // A guest without its devices does not leave.
            Stopped::Saved(None) => self.save_devices(),
            Stopped::Saved(Some(devices)) => {
                self.do_next(Action::ReadLog);
                Phase::Stopped(Stopped::ReadLast(devices))
            }
            Stopped::ReadLast(devices) => {
                // It is no pass, as in QEMU 11.1.
                self.sweep_begins();
                // The destination takes the disks as soon as it has everything.
                self.do_next(Action::Inactivate);
                self.inactive = true;
                if self.postcopy {
                    self.phase = Phase::Postcopy(Postcopy::Begin(devices));
                    return Ok(());
                }
                Phase::Completing(Completing { devices, step: Rest::Begin })
            }
        };
        Ok(())
    }

    /// Saving comes before the last read of the log: whatever it changes in guest memory is then in the log.
    fn save_devices(&mut self) -> Phase {
        let running = self.pause.is_some_and(|pause| pause.was_running);
        self.do_next(Action::SaveDevices { running });
        Phase::Stopped(Stopped::Saved(None))
    }

    pub(super) fn complete(
        &mut self,
        mut rest: Completing,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        rest.step = match rest.step {
            Rest::Begin => {
                if self.options.profile.switchover_start {
                    self.stream.command(Command::SwitchoverStart)?;
                }
                self.begin_transfers(rest.devices.sections())?;
                self.stream.section_end(RAM_SECTION)?;
                Rest::Pages
            }
            Rest::Pages => {
                self.flush_zero_pages();
                match self.batch(u64::MAX, false)? {
                    Some(batch) => {
                        self.do_next(Action::Pages(batch));
                        Rest::Pages
                    }
                    None => {
                        self.synchronise(SourceSync::round_end)?;
                        if matches!(self.options.route, PageRoute::File | PageRoute::FileByThreads) {
                            self.do_next(Action::FinishFile);
                        }
                        self.synchronise(SourceSync::completion)?;
                        self.stream.footer()?;
                        Rest::Device(0)
                    }
                }
            }
            Rest::Device(device) if self.options.devices.get(device).is_some_and(|device| device.transfer) => {
                self.stream.section_end(Self::device_section(device))?;
                self.end_device_section(VfioRecord::EndOfState)?;
                Rest::Device(device + 1)
            }
            Rest::Device(device) if device < self.options.devices.len() => {
                self.stream.section_end(Self::device_section(device))?;
                self.do_next(Action::ReadDevice { device, limit: RECORD });
                Rest::DeviceRead(device)
            }
            Rest::DeviceRead(device) if self.record > 0 => {
                self.do_next(Action::Send { doing: "the rest of the state of a device" });
                self.do_next(Action::ReadDevice { device, limit: RECORD });
                Rest::DeviceRead(device)
            }
            Rest::DeviceRead(device) => {
                self.end_device_section(VfioRecord::EndOfState)?;
                Rest::Device(device + 1)
            }
            Rest::Device(_) => {
                self.device_sections(rest.devices.sections())?;
                if let Some(answers) = answers.filter(|answers| !answers.agreed()) {
                    self.stream.command(answers.ping(handover::LOADED)?)?;
                }
                self.do_next(Action::Send { doing: "the state of the devices" });
                self.finish_transfers();
                Rest::Sent
            }
            Rest::Sent => {
                self.phase = Phase::AwaitAnswers { devices: rest.devices, since: now };
                return Ok(());
            }
        };
        self.phase = Phase::Completing(rest);
        Ok(())
    }

    /// The end of the stream, which makes the destination complete.
    pub(super) fn end_stream(&mut self, devices: &SavedDevices) -> Result<(), MigrationError> {
        self.stream.eof()?;
        if self.options.profile.vmdesc {
            self.stream.vmdesc(devices.description())?;
        }
        Ok(())
    }
}
