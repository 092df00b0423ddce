//! The guest's RAM as devices reach it, and which pages they have written to.

use super::ioctl;
use crate::memory::{GuestMemory, Mapping, PAGE_SIZE};
use crate::vfio::{DmaLog, Failure, Tracking, VfioError};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::sync::Arc;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps};

/// The block with the machine's RAM. Firmware and tables are not for devices.
const RAM: usize = 0;
const START: &str = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START";
const REPORT: &str = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT";
const STOP: &str = "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP";
const DIRTY_PAGES: &str = "VFIO_IOMMU_DIRTY_PAGES of its container";

/// Lets devices reach the RAM through a container or an IOAS.
pub(super) fn map(ops: &dyn VfioOps, memory: &GuestMemory) -> Result<(), vfio_ioctls::VfioError> {
    for Mapping { gpa, offset, len, .. } in ranges(memory) {
        let host = memory.ram().host_address().wrapping_add(offset as usize);
        // SAFETY: what holds a device of this container or IOAS holds the memory as well, so that it stays mapped,
        // and there is no reference into it: it is reached by volatile accesses only.
        unsafe { ops.vfio_dma_map(gpa, len as usize, host) }?;
    }
    Ok(())
}

fn ranges(memory: &GuestMemory) -> impl Iterator<Item = Mapping> {
    memory.mappings().iter().filter(|mapping| mapping.block == RAM).copied()
}

/// A device, and its name in messages.
pub(super) type Named = (String, Arc<VfioDevice>);

/// What devices of one container or IOAS write to.
pub(super) struct KernelLog {
    devices: Vec<Named>,
    container: Option<Arc<VfioContainer>>,
    /// Goes after the devices, which reach it.
    memory: Arc<GuestMemory>,
    running: Mutex<Tracking>,
}

fn fails(name: &str, call: &'static str, errno: Errno) -> VfioError {
    VfioError { device: name.to_owned(), failure: Failure::Log { call, errno } }
}

impl KernelLog {
    pub(super) fn new(
        devices: Vec<Named>,
        container: Option<Arc<VfioContainer>>,
        memory: Arc<GuestMemory>,
    ) -> KernelLog {
        KernelLog { devices, container, memory, running: Mutex::new(Tracking::Nobody) }
    }

    /// Some kernels have the beginning of a log and not its report, so both are tried.
    fn start_devices(&self) -> Result<(), VfioError> {
        let ranges: Vec<_> = ranges(&self.memory).map(|range| (range.gpa, range.len)).collect();
        let started = self.devices.iter().try_for_each(|(name, device)| {
            ioctl::start_log(&**device, VFIO_DEVICE_FEATURE_DMA_LOGGING_START, PAGE_SIZE, &ranges)
                .map_err(|errno| fails(name, START, errno))?;
            ranges.iter().try_for_each(|range| report_device(name, device, *range).map(drop))
        });
        if started.is_err() {
            // One that did not begin has nothing to end.
            self.stop_devices().for_each(drop);
        }
        started
    }

    /// Gives what failed.
    fn stop_devices(&self) -> impl Iterator<Item = VfioError> {
        self.devices.iter().filter_map(|(name, device)| {
            let stopped = ioctl::set(&**device, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, []);
            stopped.err().map(|errno| fails(name, STOP, errno))
        })
    }

    fn track(&self, flags: u32) -> Result<(), Errno> {
        self.container.as_ref().map_or(Err(Errno::NOTTY), |container| ioctl::track(&**container, flags))
    }
}

fn report_device(name: &str, device: &VfioDevice, range: (u64, u64)) -> Result<Vec<u64>, VfioError> {
    let report = ioctl::report(device, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, PAGE_SIZE, range);
    report.map_err(|errno| fails(name, REPORT, errno))
}

impl DmaLog for KernelLog {
    fn start(&self) -> Tracking {
        let mut running = self.running.lock();
        *running = match self.start_devices() {
            Ok(()) => Tracking::Devices,
            Err(error) => {
                match error.failure {
                    // What it does not have is no failure.
                    Failure::Log { errno: Errno::NOTTY | Errno::OPNOTSUPP, .. } => tracing::debug!("{error}"),
                    _ => tracing::warn!("{error}: what the device writes to has to be learnt otherwise"),
                }
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

    fn report(&self, found: &mut dyn FnMut(u64, &[u64])) -> Result<(), VfioError> {
        let running = *self.running.lock();
        for Mapping { gpa, offset, len, .. } in ranges(&self.memory) {
            let (first, range) = (offset / PAGE_SIZE, (gpa, len));
            match (running, &self.container) {
                (Tracking::Devices, _) => {
                    for (name, device) in &self.devices {
                        found(first, &report_device(name, device, range)?);
                    }
                }
                (Tracking::Container, Some(container)) => {
                    let get = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
                    let name = self.devices.first().map_or("", |(name, _)| name);
                    let pages = ioctl::dirty_pages(&**container, get, PAGE_SIZE, range);
                    found(first, &pages.map_err(|errno| fails(name, DIRTY_PAGES, errno))?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn stop(&self) {
        match std::mem::replace(&mut *self.running.lock(), Tracking::Nobody) {
            Tracking::Devices => self.stop_devices().for_each(|error| tracing::warn!("{error}")),
            Tracking::Container => drop(self.track(VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)),
            Tracking::Nobody => {}
        }
    }
}
