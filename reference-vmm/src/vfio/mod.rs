//! VFIO devices and their migration.
//!
//! A machine has [`VfioDevices`] on its PCI bus; each is an [`IterativeDevice`](qevm_migration::IterativeDevice).
//! [`Migration`] takes a device through the states of the kernel's protocol ([`DeviceState`]): it knows which follow
//! each other, counts what is left to send, and deals with what fails. It does no I/O of its own. What the kernel does
//! is behind the trait [`Driver`], and which pages devices write to is behind [`DmaLog`]; a [`Double`] does the same as
//! the kernel within the process, and fails where it is told to.

mod device;
mod dma;
mod double;
mod driver;
mod error;
mod kernel;
mod migration;
mod state;
#[cfg(test)]
mod tests;

pub use device::{MultifdTransfer, VfioBacking, VfioDevice, VfioDevices, VfioSlot};
pub use dma::{DmaLog, Tracking};
pub use double::{Double, Fault, Garbage, Shape};
pub use driver::{DataFile, Driver, PrecopyInfo};
pub use error::{Failure, VfioError};
pub(crate) use kernel::{Host, Opened};
pub use kernel::{HostDevice, HostDeviceError, Iommufd};
pub use migration::{Migration, Watcher};
pub use state::{DeviceState, Support};
