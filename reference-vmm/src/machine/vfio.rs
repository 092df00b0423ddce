//! The VFIO devices of a machine.

use super::Machine;
use crate::vfio::VfioDevices;

impl Machine {
    /// The VFIO devices.
    pub fn vfio(&self) -> &VfioDevices {
        &self.vfio
    }

    /// The numbers of the devices on the PCI bus beside the host bridge; `None` without a bus.
    pub fn pci_slots(&self) -> Option<Vec<usize>> {
        self.devices.pci.as_ref().map(|bus| bus.lock().slots())
    }
}
