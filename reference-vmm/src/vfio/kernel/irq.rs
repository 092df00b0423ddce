//! How a device's interrupts get to the guest: by events that KVM turns into interrupts.

use super::ioctl::set_irqs;
use crate::devices::pci::PciMessage;
use crate::error::{Error, Result, kvm};
use crate::machine::Routes;
use kvm_ioctls::VmFd;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_ioctls::VfioDevice;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const TRIGGER_BY_EVENT: u32 = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD;
const UNMASK_BY_EVENT: u32 = VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_EVENTFD;
const UNMASK_NOW: u32 = VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_NONE;
/// With no vectors.
const DISABLE: u32 = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_NONE;

/// Which kind of messages is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Msi,
    MsiX,
}

impl Kind {
    fn index(self) -> u32 {
        match self {
            Kind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Kind::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
        }
    }
}

fn event(flags: i32) -> Result<EventFd> {
    EventFd::new(flags).map_err(|cause| Error::Host { what: "make an event for an interrupt", cause })
}

fn refused(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Host { what, cause: errno.into() }
}

/// The interrupts of a device.
pub(super) struct Interrupts {
    intx: Option<Intx>,
    kind: Option<Kind>,
    vectors: Vec<Vector>,
    /// The interrupt that its pin raises, if it can.
    line: Option<u32>,
    routes: Arc<Routes>,
    vm: Arc<VmFd>,
    device: Arc<VfioDevice>,
}

/// A vector and its event, which counts while the guest holds the vector back.
struct Vector {
    event: EventFd,
    /// The interrupt's number, once there was a message for it.
    gsi: Option<u32>,
    /// KVM listens to the event.
    heard: bool,
}

impl Interrupts {
    pub(super) fn new(device: Arc<VfioDevice>, vm: Arc<VmFd>, routes: Arc<Routes>, line: Option<u32>) -> Interrupts {
        Interrupts { intx: None, kind: None, vectors: Vec::new(), line, routes, vm, device }
    }

    /// Turns the pin on, if there is one and nothing else is on.
    pub(super) fn begin_intx(&mut self) -> Result<()> {
        if let (Some(line), None, None) = (self.line, &self.intx, self.kind) {
            self.intx = Some(Intx::new(&self.device, &self.vm, line)?);
        }
        Ok(())
    }

    /// Turns messages on, `count` of them.
    pub(super) fn begin(&mut self, kind: Kind, count: usize) -> Result<()> {
        self.end()?;
        // A device has one kind at a time.
        self.intx = None;
        while self.vectors.len() < count {
            self.vectors.push(Vector { event: event(EFD_NONBLOCK)?, gsi: None, heard: false });
        }
        let events: Vec<RawFd> = self.vectors[..count].iter().map(|vector| vector.event.as_raw_fd()).collect();
        set_irqs(&*self.device, TRIGGER_BY_EVENT, kind.index(), count as u32, &events)
            .map_err(refused("turn a device's messages on"))?;
        self.kind = Some(kind);
        Ok(())
    }

    /// Turns messages off. What they had to tell and could not is forgotten.
    pub(super) fn end(&mut self) -> Result<()> {
        let Some(kind) = self.kind.take() else { return Ok(()) };
        (0..self.vectors.len()).try_for_each(|vector| self.silence(vector))?;
        set_irqs(&*self.device, DISABLE, kind.index(), 0, &[]).map_err(refused("turn a device's messages off"))?;
        // An event without a count has nothing to read.
        self.vectors.iter().for_each(|vector| drop(vector.event.read()));
        Ok(())
    }

    /// A vector sends this message; `None` holds it back.
    pub(super) fn set(&mut self, vector: usize, message: Option<PciMessage>) -> Result<()> {
        let Some(message) = message else { return self.silence(vector) };
        let Some(found) = self.vectors.get_mut(vector).filter(|_| self.kind.is_some()) else { return Ok(()) };
        let gsi = match found.gsi {
            Some(gsi) => self.routes.update(gsi, message).map(|()| gsi)?,
            None => self.routes.add(message)?,
        };
        found.gsi = Some(gsi);
        if !found.heard {
            // What has been told meanwhile is delivered now.
            self.vm.register_irqfd(&found.event, gsi).map_err(kvm("raise an interrupt by an event"))?;
            found.heard = true;
        }
        Ok(())
    }

    /// A vector has something to tell, as if the device had told it.
    pub(super) fn raise(&self, vector: usize) {
        if let Some(found) = self.vectors.get(vector)
            && let Err(error) = found.event.write(1)
        {
            tracing::error!(%error, vector, "a device's interrupt is lost");
        }
    }

    /// Whether a vector has told something that is held back.
    pub(super) fn is_pending(&self, vector: usize) -> bool {
        self.vectors.get(vector).filter(|vector| !vector.heard).is_some_and(|vector| {
            // Put back what was read: nothing is lost.
            vector.event.read().is_ok_and(|count| count > 0 && vector.event.write(count).is_ok())
        })
    }

    /// The device raises its pin again, if it is up.
    pub(super) fn unmask(&self) {
        if self.intx.is_some()
            && let Err(errno) = set_irqs(&*self.device, UNMASK_NOW, VFIO_PCI_INTX_IRQ_INDEX, 1, &[])
        {
            tracing::debug!(%errno, "a device's interrupt pin is not unmasked");
        }
    }

    fn silence(&mut self, vector: usize) -> Result<()> {
        let Some(found) = self.vectors.get_mut(vector).filter(|vector| vector.heard) else { return Ok(()) };
        found.heard = false;
        let gsi = found.gsi.unwrap_or_default();
        self.vm.unregister_irqfd(&found.event, gsi).map_err(kvm("no longer raise an interrupt by an event"))
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::debug!(%error, "a device's interrupts stay on");
        }
    }
}

/// The pin. KVM raises the line by an event, and tells by another that the guest has dealt with the interrupt; then the
/// kernel lets the device raise it again.
struct Intx {
    device: Arc<VfioDevice>,
    vm: Arc<VmFd>,
    line: u32,
    trigger: EventFd,
    resample: Arc<EventFd>,
    /// Unmasks by hand, where the kernel takes no event for it.
    thread: Option<JoinHandle<()>>,
    ended: Arc<AtomicBool>,
}

impl Intx {
    fn new(device: &Arc<VfioDevice>, vm: &Arc<VmFd>, line: u32) -> Result<Intx> {
        // A thread may wait for the second.
        let (trigger, resample) = (event(EFD_NONBLOCK)?, Arc::new(event(0)?));
        vm.register_irqfd_with_resample(&trigger, &resample, line).map_err(kvm("raise a line by an event"))?;
        let (device, vm) = (device.clone(), vm.clone());
        let mut intx = Intx { device, vm, line, trigger, resample, thread: None, ended: Arc::default() };
        intx.set(TRIGGER_BY_EVENT, &[intx.trigger.as_raw_fd()]).map_err(refused("turn a device's interrupt pin on"))?;
        if let Err(errno) = intx.set(UNMASK_BY_EVENT, &[intx.resample.as_raw_fd()]) {
            tracing::debug!(%errno, "the kernel takes no event to unmask a device's interrupt pin");
            intx.unmask_by_hand()?;
        }
        Ok(intx)
    }

    fn set(&self, flags: u32, events: &[RawFd]) -> Result<(), Errno> {
        set_irqs(&*self.device, flags, VFIO_PCI_INTX_IRQ_INDEX, 1, events)
    }

    fn unmask_by_hand(&mut self) -> Result<()> {
        let (device, resample, ended) = (self.device.clone(), self.resample.clone(), self.ended.clone());
        let work = move || {
            while resample.read().is_ok() && !ended.load(Ordering::SeqCst) {
                if let Err(errno) = set_irqs(&*device, UNMASK_NOW, VFIO_PCI_INTX_IRQ_INDEX, 1, &[]) {
                    tracing::error!(%errno, "a device's interrupt pin stays masked");
                }
            }
        };
        let spawned = thread::Builder::new().name("vfio-intx".to_owned()).spawn(work);
        self.thread = Some(spawned.map_err(|cause| Error::Host { what: "start a thread for a device's pin", cause })?);
        Ok(())
    }
}

impl Drop for Intx {
    fn drop(&mut self) {
        let _ = set_irqs(&*self.device, DISABLE, VFIO_PCI_INTX_IRQ_INDEX, 0, &[]);
        let _ = self.vm.unregister_irqfd(&self.trigger, self.line);
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = self.resample.write(1);
            let _ = thread.join();
        }
    }
}
