//! The VFIO devices of a machine.

use super::Machine;
use crate::devices::pci::PciBus;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::vfio::{Host, VfioDevices, VfioSlot};

/// Puts devices on the bus.
pub(super) fn plug(slots: Vec<VfioSlot>, bus: Option<&mut PciBus>, host: Host) -> Result<VfioDevices> {
    match bus {
        Some(bus) => VfioDevices::plug(slots, bus, host),
        None if slots.is_empty() => Ok(VfioDevices::default()),
        // The beginning is QEMU's.
        None => Err(Error::Config(
            "No 'PCI' bus found for device 'vfio-pci': start the machine with --machine microvm,pcie=on".to_owned(),
        )),
    }
}

impl Machine {
    /// The VFIO devices.
    pub fn vfio(&self) -> &VfioDevices {
        &self.vfio
    }

    /// The numbers of the devices on the PCI bus beside the host bridge; `None` without a bus.
    pub fn pci_slots(&self) -> Option<Vec<usize>> {
        self.devices.pci.as_ref().map(|bus| lock(bus).slots())
    }
}
