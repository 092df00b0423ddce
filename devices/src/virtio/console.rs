//! Section `virtio-console`: the virtio-serial bus with its ports.

use super::element::VirtQueueElement;
use super::{DevicePart, MmioVirtio};
use qevm_savevm::vmstate::VmState;

/// Section `virtio-console` version 3.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-console", version = 3)]
pub struct VirtioConsole {
    /// The state.
    pub virtio: MmioVirtio<Console>,
}

/// The serial bus' part.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-serial-device", version = 3)]
pub struct Console {
    /// Columns, as the configuration space has them.
    pub cols: u16,
    /// Rows, as the configuration space has them.
    pub rows: u16,
    /// Ports that the bus can have.
    pub max_nr_ports: u32,
    /// A bit for each port that there is.
    #[vmstate(len = max_nr_ports.div_ceil(32))]
    pub ports_map: Vec<u32>,
    /// How many ports follow.
    pub nr_ports: u32,
    /// The ports.
    #[vmstate(len = *nr_ports)]
    pub ports: Vec<Port>,
}

impl DevicePart for Console {}

/// A port.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-serial-port", version = 3)]
pub struct Port {
    /// Its number.
    pub id: u32,
    /// The guest has it open.
    pub guest_connected: u8,
    /// The host has it open.
    pub host_connected: u8,
    /// Not 0: a buffer of the guest is partly consumed.
    pub elem_popped: u32,
    /// That buffer.
    #[vmstate(exists = *elem_popped != 0)]
    pub element: Option<PortElement>,
}

/// A buffer of the guest that the host did not take completely.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-serial-port-element", version = 3)]
pub struct PortElement {
    /// The piece of it that is being consumed.
    pub iov_idx: u32,
    /// Bytes consumed of that piece.
    pub iov_offset: u64,
    /// Its descriptors.
    pub element: VirtQueueElement,
}
