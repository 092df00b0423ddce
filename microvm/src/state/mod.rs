//! The saved state of a machine, as plain values apart from everything that runs.
//!
//! A monitor converts it from and to what its accelerator hands out; what goes on the wire is made from these values.
//! RAM is not part of it.

mod devices;
mod opaque;
mod pci;
mod vcpu;
mod virtio;

use crate::virtio::VirtioDevice;

pub use devices::{
    ClockState, FwCfgState, GedState, IoapicState, PicState, PitChannelState, PitState, RtcState, SerialState,
};
pub use opaque::OpaqueState;
pub use pci::{PciFunctionState, PciState};
pub use vcpu::{DebugRegisters, DescriptorTable, Events, Msr, Registers, Segment, SpecialRegisters, VcpuState};
pub use virtio::{
    VirtioDeviceState, VirtioNetFilter, VirtioNetState, VirtioPortState, VirtioQueueState, VirtioRequest, VirtioState,
};

/// Everything about a paused machine but its RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    /// One for each vCPU, in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// The 8259s: master, slave.
    pub pics: [PicState; 2],
    /// The first IOAPIC.
    pub ioapic: IoapicState,
    /// The second IOAPIC.
    pub ioapic2: IoapicState,
    /// Interrupt controllers and PIT are in the monitor.
    pub split_irqchip: bool,
    /// The i8254.
    pub pit: PitState,
    /// The paravirtual clock.
    pub clock: ClockState,
    /// The virtual clock, which is stopped while the machine is paused, in ns. Times of the PIT refer to it.
    pub virtual_clock: i64,
    /// The serial port.
    pub serial: SerialState,
    /// The real-time clock, if the machine has one.
    pub rtc: Option<RtcState>,
    /// The firmware configuration device.
    pub fw_cfg: FwCfgState,
    /// The generic event device.
    pub ged: GedState,
    /// The PCI bus, if the machine has one.
    pub pci: Option<PciState>,
    /// The virtio devices, in the order of the command line.
    pub virtio: Vec<VirtioDevice>,
    /// Their states, in the same order; `None` where the device has no model and its state is opaque.
    pub virtio_states: Vec<Option<VirtioState>>,
    /// What the machine was loaded from and does not use itself.
    pub opaque: OpaqueState,
}
