//! QEMU's `microvm` as plain values, and as the device sections of QEMU's stream.
//!
//! What a monitor of this machine has to do for its guests to move to a QEMU and back is to convert between
//! [`MachineState`] and its own devices and vCPUs: which sections there are in which release, in which order, with
//! which subsections, and what of a section that came is kept for when the guest goes on, is known here. It knows
//! neither KVM nor how the state is moved.
//!
//! | module | what |
//! |---|---|
//! | [`state`] | the state of a machine, apart from everything that runs |
//! | [`sections`] | that state as sections: [`save`](sections::save) and [`load`](sections::load) |
//! | [`virtio`] | which virtio devices sit on which transport |
//!
//! [`MachineState`]: state::MachineState
//!
//! # Example: the name of a section
//!
//! ```
//! use qevm_microvm::{sections::has_device, virtio::VirtioDevice};
//! use qevm_wire::CountedString;
//!
//! // What arrives for the first virtio device of the command line, on a machine with one vCPU.
//! let idstr = CountedString::new(VirtioDevice::Block.idstr(0)).expect("short enough");
//! assert_eq!(idstr, *"virtio-mmio@00000000feb02e00/virtio-blk");
//! assert!(has_device(&idstr, 0, 1, false, None, &[VirtioDevice::Block]));
//! assert!(!has_device(&idstr, 0, 1, false, None, &[VirtioDevice::Rng]));
//! ```
#![forbid(unsafe_code)]

pub mod sections;
pub mod state;
pub mod virtio;

/// The machine type, by QEMU's name.
pub const MACHINE_TYPE: &str = "microvm";
