//! A KVM virtual machine monitor that is laid out like QEMU's `microvm`, and its payload guest.
//!
//! Linux on x86-64. Read in this order:
//!
//! 1. [`payload`]: the guest that notices lost pages.
//! 2. [`memory`]: RAM blocks and where the guest sees them.
//! 3. [`devices`]: what the guest finds behind ports and addresses.
//! 4. [`machine`]: the machine as a whole, with its vCPU threads; [`boot`]: Linux without firmware.
//! 5. [`qevm_microvm`]: what is saved and restored, as plain values and as the device sections of QEMU's stream, which
//!    [`qevm_migration`] moves.
//! 6. [`dirty_log`]: which pages changed.
//! 7. [`vfio`]: VFIO devices and their migration.
//! 8. [`vmm`]: the machine with its run state and migrations; [`qmp`]: its control socket.
//! 9. [`command`]: the program.
//!
//! # Example: a guest that runs, and is paused
//!
//! ```no_run
//! use reference_vmm::machine::{Machine, MachineConfig};
//! use reference_vmm::payload::IMAGE;
//!
//! // On a host with KVM. The payload is the machine's firmware.
//! let config = MachineConfig { memory: 64 << 20, bios: IMAGE.to_vec(), ..MachineConfig::default() };
//! let machine = Machine::new(config)?;
//! machine.resume()?;
//! std::thread::sleep(std::time::Duration::from_secs(1));
//! machine.pause();
//! let state = machine.save_state()?;
//! assert_eq!(state.vcpus.len(), 1);
//! # Ok::<(), reference_vmm::Error>(())
//! ```
//!
//! Every error is an [`Error`]; nothing here panics on what a guest or a saved state says.

// The program uses the library by its name, as any other user does.
extern crate self as reference_vmm;

pub mod boot;
pub mod command;
pub mod descriptors;
pub mod devices;
pub mod dirty_log;
pub mod error;
mod log;
pub mod machine;
pub mod memory;
mod non_blocking;
pub mod objects;
pub mod payload;
mod private;
pub mod qmp;
pub mod vfio;
pub mod vmm;

pub use error::{Error, Result};
