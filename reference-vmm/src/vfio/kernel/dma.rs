//! The guest's RAM as devices reach it, and which pages they have written to.

use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioOps};

use super::ioctl;
use crate::devices::lock;
use crate::memory::{GuestMemory, Mapping, PAGE_SIZE};
use crate::vfio::{DmaLog, Tracking};

/// The block with the machine's RAM. Firmware and tables are not for devices.
const RAM: usize = 0;

/// Lets devices reach the RAM through a container or an IOAS.
pub(super) fn map(ops: &dyn VfioOps, memory: &GuestMemory) -> Result<(), VfioError> {
    for Mapping { gpa, offset, len, .. } in ranges(memory) {
        let host = memory.ram().host_address().wrapping_add(offset as usize);
        // SAFETY: whoever holds a device of this container or IOAS holds the memory as well, so that it stays mapped, and nobody has a
        // reference into it: it is reached by volatile accesses only.
        unsafe { ops.vfio_dma_map(gpa, len as usize, host) }?;
    }
    Ok(())
}

fn ranges(memory: &GuestMemory) -> impl Iterator<Item = Mapping> {
    memory.mappings().iter().filter(|mapping| mapping.block == RAM).copied()
}

/// What devices of one container or IOAS write to.
pub(super) struct KernelLog {
    devices: Vec<Arc<VfioDevice>>,
    container: Option<Arc<VfioContainer>>,
    /// Goes after the devices, which reach it.
    memory: Arc<GuestMemory>,
    running: Mutex<Tracking>,
}

impl KernelLog {
    pub(super) fn new(
        devices: Vec<Arc<VfioDevice>>,
        container: Option<Arc<VfioContainer>>,
        memory: Arc<GuestMemory>,
    ) -> KernelLog {
        KernelLog { devices, container, memory, running: Mutex::new(Tracking::Nobody) }
    }

    /// Some kernels have the beginning of a log and not its report, so both are tried.
    fn start_devices(&self) -> Result<(), Errno> {
        let ranges: Vec<_> = ranges(&self.memory).map(|range| (range.gpa, range.len)).collect();
        let started = self.devices.iter().try_for_each(|device| {
            ioctl::start_log(&**device, VFIO_DEVICE_FEATURE_DMA_LOGGING_START, PAGE_SIZE, &ranges)?;
            ranges.iter().try_for_each(|range| self.report_device(device, *range).map(drop))
        });
        if started.is_err() {
            self.stop_devices();
        }
        started
    }

    fn report_device(&self, device: &VfioDevice, range: (u64, u64)) -> Result<Vec<u64>, Errno> {
        ioctl::report(device, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, PAGE_SIZE, range)
    }

    fn stop_devices(&self) {
        for device in &self.devices {
            // One that did not begin has nothing to end.
            let _ = ioctl::set(&**device, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, []);
        }
    }

    fn track(&self, flags: u32) -> Result<(), Errno> {
        self.container.as_ref().map_or(Err(Errno::NOTTY), |container| ioctl::track(&**container, flags))
    }
}

impl DmaLog for KernelLog {
    fn start(&self) -> Tracking {
        let mut running = lock(&self.running);
        *running = match self.start_devices() {
            Ok(()) => Tracking::Devices,
            Err(errno) => {
                tracing::debug!(%errno, "the devices do not log what they write to");
                match self.track(VFIO_IOMMU_DIRTY_PAGES_FLAG_START) {
                    Ok(()) => Tracking::Container,
                    Err(errno) => {
                        tracing::debug!(%errno, "nor does their container");
                        Tracking::Nobody
                    }
                }
            }
        };
        *running
    }

    fn report(&self, found: &mut dyn FnMut(u64, &[u64])) -> Result<(), Errno> {
        let running = *lock(&self.running);
        for Mapping { gpa, offset, len, .. } in ranges(&self.memory) {
            let (first, range) = (offset / PAGE_SIZE, (gpa, len));
            match (running, &self.container) {
                (Tracking::Devices, _) => {
                    for device in &self.devices {
                        found(first, &self.report_device(device, range)?);
                    }
                }
                (Tracking::Container, Some(container)) => {
                    let get = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
                    found(first, &ioctl::dirty_pages(&**container, get, PAGE_SIZE, range)?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn stop(&self) {
        match std::mem::replace(&mut *lock(&self.running), Tracking::Nobody) {
            Tracking::Devices => self.stop_devices(),
            Tracking::Container => drop(self.track(VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)),
            Tracking::Nobody => {}
        }
    }
}
