//! The sections of the PCI bus.

use crate::state::{PciFunctionState, PciState};
use qevm_devices::{
    DeviceState,
    gpex::{GpexRoot, PciBus, PciHost},
    pci::{PciDevice, PciIrqState},
};
use qevm_savevm::vmstate::Buffer;

/// The host bridge.
pub(super) const GPEX_ROOT: &str = "0000:00:00.0/gpex_root";
/// The host.
pub(super) const HOST: &str = "PCIHost";
/// The bus.
pub(super) const BUS: &str = "PCIBUS";

/// In QEMU's order.
pub(super) fn save(state: &PciState) -> [(&'static str, DeviceState); 3] {
    let PciFunctionState { config, levels, .. } = &state.bridge;
    let config = config.first_chunk().map(|config| Buffer(*config));
    let pci = PciDevice { config, irq_state: PciIrqState(levels.map(u32::from)), ..PciDevice::default() };
    [
        (GPEX_ROOT, DeviceState::GpexRoot(GpexRoot { pci })),
        (HOST, DeviceState::PciHost(PciHost { config_reg: state.config_reg })),
        (BUS, DeviceState::PciBus(PciBus { irq_count: state.counts, ..PciBus::default() })),
    ]
}

pub(super) fn load_bridge(from: &GpexRoot, into: &mut PciState) {
    let levels = from.pci.irq_state.0.map(|level| level != 0);
    into.bridge = PciFunctionState { config: from.pci.config_space().to_vec(), levels, ..PciFunctionState::default() };
}
