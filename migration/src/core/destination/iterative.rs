//! The iterative devices of a destination, and what has come of each.

use crate::LoadError;
use crate::core::DeviceOptions;
use qevm_savevm::framing::{SectionHeader, SectionKind};

/// The devices whose state comes in parts.
#[derive(Debug)]
pub(super) struct Iterative {
    devices: Vec<Device>,
    /// The device whose section came last.
    current: Option<usize>,
}

#[derive(Debug)]
struct Device {
    options: DeviceOptions,
    /// The section's id, after START.
    section_id: Option<u32>,
    /// After END.
    ended: bool,
}

impl Iterative {
    pub(super) fn new(devices: &[DeviceOptions]) -> Self {
        let device = |options: &DeviceOptions| Device { options: options.clone(), section_id: None, ended: false };
        Iterative { devices: devices.iter().map(device).collect(), current: None }
    }

    /// A device that the guest has begins.
    pub(super) fn start(&mut self, header: SectionHeader) {
        let SectionHeader { idstr, section_id, .. } = header;
        let known = self.devices.iter().position(|device| device.options.idstr == idstr);
        let place = known.unwrap_or_else(|| {
            self.devices.push(Device { options: DeviceOptions::new(idstr), section_id: None, ended: false });
            self.devices.len() - 1
        });
        self.devices[place].section_id = Some(section_id);
        self.current = Some(place);
    }

    /// A section goes on, or ends.
    pub(super) fn part(&mut self, kind: SectionKind, section_id: u32) {
        self.current = self.devices.iter().position(|device| device.section_id == Some(section_id));
        if let Some(device) = self.current {
            self.devices[device].ended |= kind == SectionKind::End;
        }
    }

    /// A section of something else begins.
    pub(super) fn leave(&mut self) {
        self.current = None;
    }

    /// The name of the device whose section is open.
    pub(super) fn current(&self) -> String {
        self.current.map_or_else(String::new, |device| self.devices[device].options.idstr.to_string())
    }

    /// Whether the state of the device of this section comes over page channels.
    pub(super) fn transfers(&self, header: &SectionHeader) -> bool {
        self.devices.iter().any(|device| device.options.transfer && device.options.idstr == header.idstr)
    }

    /// Whether the state of any device does.
    pub(super) fn has_transfers(&self) -> bool {
        self.devices.iter().any(|device| device.options.transfer)
    }

    /// Refuses a stream that has not brought all of them.
    pub(super) fn check_complete(&self) -> Result<(), LoadError> {
        for Device { options, section_id, ended } in &self.devices {
            let missing = match (section_id, ended) {
                (None, _) => "START",
                (_, false) => "END",
                _ => continue,
            };
            return Err(LoadError::DeviceIncomplete { idstr: options.idstr.clone(), missing });
        }
        Ok(())
    }
}
