//! virtio-mmio transports and the devices on them, as QEMU's microvm has them.
//!
//! There are 24 transports (with two IOAPICs, from 7.2 on), [`STRIDE`] bytes apart, and the last of them belongs to the
//! first device of the command line. Transport `n` interrupts by pin `n` of the second IOAPIC. All are legacy
//! (`force-legacy=on`, microvm's default): register interface version 1 and guest-endian rings at a page frame number
//! (virtio 1.2, 4.2.4 and 2.7.2). Addresses, order and pins were read from `info qtree`, the registers and migrated
//! guests of 7.2, 10.0 and 11.1.
//!
//! Read: [`qevm_microvm::virtio`] (what sits where), `transport` (registers), `model` (what is on it), `queue` and
//! `chain` (rings in guest memory), then the models: `block`, `rng`, `serial`, `net`; `pump` is the thread of those
//! that get input from the host. A device without a model is kept with everything that a guest's source said about it,
//! and goes back to a QEMU, but its guest cannot run.

mod block;
mod chain;
mod image_lock;
mod model;
mod net;
mod pump;
mod queue;
mod rng;
mod serial;
mod transport;
mod wake;

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Instant;

pub use block::{Block, BlockOptions};
pub(crate) use model::Model;
pub use net::Net;
pub(crate) use pump::start as start_pump;
pub use rng::Rng;
pub use serial::Serial as VirtioSerial;
pub(crate) use transport::{Transport, drain, settle};

use crate::error::Result;
use qevm_microvm::virtio::{BASE, STRIDE, TRANSPORTS, VirtioDevice};

/// A device on a transport.
pub struct VirtioSlot {
    device: VirtioDevice,
    model: Option<Box<dyn Model>>,
}

impl VirtioSlot {
    /// A device without a model: its state is kept, and the guest does not run.
    pub fn kept(device: VirtioDevice) -> VirtioSlot {
        VirtioSlot { device, model: None }
    }

    /// A disk.
    pub fn block(block: Block) -> VirtioSlot {
        VirtioSlot { device: VirtioDevice::Block, model: Some(Box::new(block)) }
    }

    /// A network card.
    pub fn net(net: Net) -> VirtioSlot {
        VirtioSlot { device: VirtioDevice::Net, model: Some(Box::new(net)) }
    }

    /// A source of random numbers.
    pub fn rng(rng: Rng) -> VirtioSlot {
        VirtioSlot { device: VirtioDevice::Rng, model: Some(Box::new(rng)) }
    }

    /// A serial bus.
    pub fn serial(serial: VirtioSerial) -> VirtioSlot {
        VirtioSlot { device: VirtioDevice::Serial, model: Some(Box::new(serial)) }
    }

    /// Which device it is.
    pub fn device(&self) -> VirtioDevice {
        self.device
    }

    pub(crate) fn into_model(self) -> Option<Box<dyn Model>> {
        self.model
    }
}

/// What a device that has no model was not given.
pub(crate) fn missing(device: VirtioDevice) -> &'static str {
    match device {
        VirtioDevice::Block => "no drive (drive=ID)",
        VirtioDevice::Net => "no netdev (netdev=ID)",
        VirtioDevice::Rng => "no source of random numbers",
        VirtioDevice::Serial => "no port (virtconsole or virtserialport on it)",
        _ => "no model",
    }
}

/// All transports, by the position of their devices; `None` where the device has no model.
#[derive(Default)]
pub(crate) struct Transports(pub(crate) Vec<Option<Arc<Mutex<Transport>>>>);

impl Transports {
    /// Does something with each device that has a model, up to the first error.
    pub(crate) fn each(&self, mut what: impl FnMut(&mut Transport) -> Result<()>) -> Result<()> {
        self.0.iter().flatten().try_for_each(|device| what(&mut device.lock()))
    }

    /// The machine has stopped: no device does anything that the guest could see from now on. What they have begun they
    /// finish until the deadline; requests that are left are done when the guest goes on, here or where it has gone.
    pub(crate) fn drain(&self, deadline: Instant) {
        self.0.iter().flatten().for_each(|device| drain(device, deadline));
    }

    /// Waits until no device has anything under way at the host. On failure, the first device by its position that
    /// still had at the deadline.
    pub(crate) fn settle(&self, deadline: Instant) -> Result<(), usize> {
        let devices = self.0.iter().enumerate().filter_map(|(position, device)| Some((position, device.as_ref()?)));
        devices.into_iter().try_for_each(|(position, device)| settle(device, deadline).then_some(()).ok_or(position))
    }

    /// The transport at an address, if there is a device with a model, and the offset in it. `None` if no transport is
    /// there.
    fn find(&self, gpa: u64) -> Option<(Option<&Arc<Mutex<Transport>>>, u64)> {
        let at = gpa.checked_sub(BASE)?;
        let index = usize::try_from(at / STRIDE).ok().filter(|index| *index < TRANSPORTS)?;
        let device = self.0.get(TRANSPORTS - 1 - index).and_then(Option::as_ref);
        Some((device, at % STRIDE))
    }

    /// A read; false if no transport is there.
    pub(crate) fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        match self.find(gpa) {
            Some((Some(device), offset)) => device.lock().read(offset, data),
            Some((None, offset)) => transport::read_empty(offset, data),
            None => return false,
        }
        true
    }

    /// A write; false if no transport is there.
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> bool {
        match self.find(gpa) {
            Some((Some(device), offset)) => device.lock().write(offset, data),
            Some((None, _)) => {}
            None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests;
