//! The sections of the PCI bus.

use super::SectionKind;
use crate::state::{PciFunctionState, PciState};
use qevm_devices::DeviceState;
use qevm_devices::gpex::{GpexRoot, PciBus, PciHost};
use qevm_devices::pci::{PciDevice, PciIrqState};
use qevm_savevm::vmstate::Buffer;

/// In QEMU's order.
pub(super) fn save(state: &PciState) -> [(SectionKind, DeviceState); 3] {
    let PciFunctionState { config, levels, .. } = &state.bridge;
    let config = config.first_chunk().map(|config| Buffer(*config));
    let pci = PciDevice { config, irq_state: PciIrqState(levels.map(u32::from)), ..PciDevice::default() };
    [
        (SectionKind::GpexRoot, DeviceState::GpexRoot(GpexRoot { pci })),
        (SectionKind::PciHost, DeviceState::PciHost(PciHost { config_reg: state.config_reg })),
        (SectionKind::PciBus, DeviceState::PciBus(PciBus { irq_count: state.counts, ..PciBus::default() })),
    ]
}

pub(super) fn load_bridge(from: &GpexRoot, into: &mut PciState) {
    let levels = from.pci.irq_state.0.map(|level| level != 0);
    into.bridge = PciFunctionState { config: from.pci.config_space().to_vec(), levels, ..PciFunctionState::default() };
}
