//! The VFIO devices of a machine.

use super::Machine;
use crate::devices::lock;
use crate::devices::pci::PciBus;
use crate::error::{Error, Result};
use crate::vfio::{VfioDevices, VfioSlot};

/// Puts devices on the bus.
pub(super) fn plug(slots: Vec<VfioSlot>, bus: Option<&mut PciBus>) -> Result<VfioDevices> {
    match bus {
        Some(bus) => Ok(VfioDevices::plug(slots, bus)?),
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

    /// How many devices there are on the PCI bus beside the host bridge; `None` without a bus.
    pub fn pci_devices(&self) -> Option<usize> {
        self.devices.pci.as_ref().map(|bus| lock(bus).device_count() - 1)
    }
}
