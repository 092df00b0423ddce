//! The sections of iterative devices, and what of their state goes over page channels.

use super::{Action, Answers, RAM_SECTION, SourceCore};
use crate::{DeviceSection, MigrationError, handover};
use qevm_returnpath::switchover::SwitchoverAckFlow;
use qevm_savevm::event::Event;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::vfio::{VfioRecord, flag};
use qevm_wire::CountedString;
use std::time::Duration;

/// `version_id` of the sections of iterative devices.
const VERSION: u32 = 1;

/// How long after its answer a destination may take for what it should have said before.
const GRACE: Duration = Duration::from_millis(500);

/// What the destination knows of the devices' initial data.
#[derive(Debug, Default)]
pub(super) struct InitialData {
    /// Of each device.
    devices: Vec<Completion>,
    /// There were some, and the destination was not asked whether it has loaded all of them.
    pub(super) told: bool,
    /// Since when it has answered everything, and has not agreed to the switchover.
    disagrees: Option<Duration>,
}

/// Whether the destination knows that a device's initial data are complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Completion {
    /// It does not want to.
    Unasked,
    /// It has to be told.
    Owed,
    /// It was told.
    Sent,
}

impl SourceCore {
    /// How acks of the switchover are counted, where the capability is on.
    fn ack_flow(&self) -> Option<SwitchoverAckFlow> {
        self.options.profile.switchover_ack.filter(|_| self.options.capabilities.switchover_ack)
    }

    /// Opens the sections of iterative devices.
    pub(super) fn begin_devices(&mut self, mut answers: Option<&mut Answers>) -> Result<(), MigrationError> {
        let acks = self.ack_flow().is_some();
        for device in 0..self.options.devices.len() {
            self.do_next(Action::BeginDevice(device));
            self.stream.section_start(&self.device_header(device))?;
            self.stream.event(&Event::Vfio(VfioRecord::Setup))?;
            self.end_device_section(VfioRecord::EndOfState)?;
            let asks = acks && self.options.devices[device].switchover_ack;
            if let Some(answers) = answers.as_deref_mut().filter(|_| asks) {
                answers.request_ack(&self.names[device])?;
            }
            self.initial.devices.push(if asks { Completion::Owed } else { Completion::Unasked });
            self.initial.told |= asks;
        }
        Ok(())
    }

    /// The id of the section of an iterative device.
    pub(super) fn device_section(device: usize) -> u32 {
        RAM_SECTION + 1 + device as u32
    }

    fn device_header(&self, device: usize) -> SectionHeader {
        let idstr = self.options.devices[device].idstr.clone();
        SectionHeader { section_id: Self::device_section(device), idstr, instance_id: 0, version_id: VERSION }
    }

    /// Appends the state of a device that was read.
    pub(super) fn device_record(&mut self, state: &[u8]) -> Result<(), MigrationError> {
        let len = state.len() as u64;
        if len > 0 {
            self.stream.event(&Event::Vfio(VfioRecord::Data { len }))?;
            self.stream.payload(state)?;
            self.statistics.device_bytes += len;
        }
        Ok(())
    }

    pub(super) fn end_device_section(&mut self, last: VfioRecord) -> Result<(), MigrationError> {
        self.stream.event(&Event::Vfio(last))?;
        Ok(self.stream.footer()?)
    }

    /// A device has told its size. If its initial data begin anew, the destination has to agree anew (11.1).
    pub(super) fn device_told(&mut self, device: usize, answers: Option<&mut Answers>) -> Result<(), MigrationError> {
        let again =
            self.ack_flow() == Some(SwitchoverAckFlow::Counted) && self.initial.devices[device] == Completion::Sent;
        if let Some(answers) = answers.filter(|_| again && self.sizes[device].initial > 0) {
            answers.request_ack(&self.names[device])?;
            self.initial.devices[device] = Completion::Owed;
        }
        Ok(())
    }

    /// Whether the destination has to be told now that a device's initial data are complete.
    pub(super) fn initial_data_are_due(&self, device: usize) -> bool {
        let left = self.sizes.get(device).map(|size| size.initial);
        self.initial.devices.get(device) == Some(&Completion::Owed) && left == Some(0)
    }

    /// Ends a PART that carried this many bytes of the device's state.
    pub(super) fn end_device_part(
        &mut self,
        device: usize,
        sent: u64,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        if let Some(size) = self.sizes.get_mut(device) {
            // They come first.
            size.initial = size.initial.saturating_sub(sent);
        }
        if self.initial_data_are_due(device) {
            self.initial.devices[device] = Completion::Sent;
            self.end_device_section(VfioRecord::InitDataSent)?;
        } else {
            self.end_device_section(VfioRecord::EndOfState)?;
        }
        let complete = self.initial_data_are_complete();
        if let Some(answers) = answers.filter(|_| complete && self.initial.told) {
            // Answered when it has loaded them, which tells the same as an ack, and to a source without that
            // capability, too.
            self.stream.command(answers.ping(handover::INITIAL_DATA)?)?;
            self.initial.told = false;
        }
        Ok(())
    }

    fn initial_data_are_complete(&self) -> bool {
        !self.initial.devices.contains(&Completion::Owed) && self.sizes.iter().all(|size| size.initial == 0)
    }

    /// Fails for a destination that has loaded all initial data and does not agree to the switchover, as it counts
    /// otherwise.
    pub(super) fn agrees(&mut self, now: Duration, answers: Option<&Answers>) -> Result<(), MigrationError> {
        let answered = self.initial_data_are_complete() && !self.initial.told;
        let Some(waiting) = answers.filter(|_| answered).and_then(Answers::disagreement) else {
            self.initial.disagrees = None;
            return Ok(());
        };
        let since = *self.initial.disagrees.get_or_insert(now);
        if now.saturating_sub(since) < GRACE {
            return Ok(());
        }
        let flow = match self.ack_flow() {
            Some(SwitchoverAckFlow::Legacy) => "counted as QEMU 10.0 does, one for all devices",
            _ => "counted as QEMU 11.1 does, one for each device",
        };
        Err(MigrationError::SwitchoverAcks { waiting: waiting.to_string(), flow })
    }

    /// Lets the page channels send what is left of devices, each with its configuration.
    pub(super) fn begin_transfers(&mut self, sections: &[DeviceSection]) -> Result<(), MigrationError> {
        let mut configurations = Vec::new();
        for (number, device) in self.options.devices.iter().enumerate().filter(|(_, device)| device.transfer) {
            let section = sections.iter().find(|section| is_of(section, &device.idstr));
            let section = section.ok_or_else(|| MigrationError::Guest {
                doing: "send the configuration of a device",
                source: format!("no section '{}' was saved", device.idstr).into(),
            })?;
            let (front, end) = (flag::DEV_CONFIG_STATE.to_be_bytes(), flag::END_OF_STATE.to_be_bytes());
            configurations.push((number, [&front[..], &section.body, &end].concat()));
        }
        if !configurations.is_empty() {
            self.do_next(Action::TransferDevices(configurations));
        }
        Ok(())
    }

    /// Waits until they have.
    pub(super) fn finish_transfers(&mut self) {
        if self.options.devices.iter().any(|device| device.transfer) {
            self.do_next(Action::FinishTransfers);
        }
    }

    /// The FULL sections. The configuration of an iterative device is under the id of its section.
    pub(super) fn device_sections(&mut self, sections: &[DeviceSection]) -> Result<(), MigrationError> {
        let first = Self::device_section(self.options.devices.len());
        for (section_id, section) in (first..).zip(sections) {
            match self.options.devices.iter().position(|device| is_of(section, &device.idstr)) {
                Some(device) => self.configuration_section(device, section)?,
                None => {
                    let DeviceSection { idstr, instance_id, version_id, body } = section;
                    let (instance_id, version_id) = (*instance_id, *version_id);
                    let header = SectionHeader { section_id, idstr: idstr.clone(), instance_id, version_id };
                    self.stream.section_full(&header, body)?;
                }
            }
        }
        Ok(())
    }

    fn configuration_section(&mut self, device: usize, section: &DeviceSection) -> Result<(), MigrationError> {
        self.stream.event(&Event::Section { kind: SectionKind::Full, header: self.device_header(device) })?;
        if !self.options.devices[device].transfer {
            self.stream.event(&Event::Vfio(VfioRecord::Config))?;
            self.stream.event(&Event::Body(&section.body))?;
        }
        self.end_device_section(VfioRecord::EndOfState)
    }
}

fn is_of(section: &DeviceSection, idstr: &CountedString) -> bool {
    section.idstr == *idstr && section.instance_id == 0
}

#[cfg(test)]
mod tests;
