//! Devices of the host's kernel, by group and container or by device file and iommufd.

mod dma;
mod driver;
mod error;
mod function;
mod ioctl;
mod irq;

use iommufd_ioctls::IommuFd;
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioIommufd, VfioOps};

use self::dma::KernelLog;
use self::driver::KernelDriver;
pub use self::error::HostDeviceError;
use self::function::KernelFunction;
use self::irq::Interrupts;
use super::{DmaLog, Driver, Tracking};
use crate::devices::pci::{FIRST_GSI, Function, PciError, line_of};
use crate::error::{Error, Result, kvm};
use crate::machine::Routes;
use crate::memory::GuestMemory;

/// A device of the host's kernel (QEMU's `-device vfio-pci`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostDevice {
    /// Its folder in sysfs (`sysfsdev`).
    pub sysfsdev: PathBuf,
    /// The [`Iommufd`] that it is attached to; without one it is reached by its group (`iommufd`).
    pub iommufd: Option<String>,
    /// Whether it has to be able to migrate, or must not; `None` takes what there is (`enable-migration`).
    pub migration: Option<bool>,
}

/// What devices are attached to, other than a container (QEMU's `-object iommufd`).
#[derive(Debug)]
pub struct Iommufd {
    /// Its name.
    pub id: String,
    /// `/dev/iommu` as the caller has opened it; opened here without one.
    pub fd: Option<OwnedFd>,
}

/// A device that is ready for the bus.
pub(crate) struct Opened {
    /// What the guest sees of it.
    pub(crate) function: Box<dyn Function>,
    /// What migrates it, or why nothing does.
    pub(crate) driver: Result<Box<dyn Driver>, String>,
}

/// Devices that share a container or an IOAS.
struct Attachment {
    devices: Vec<dma::Named>,
    ops: Arc<dyn VfioOps>,
    container: Option<Arc<VfioContainer>>,
}

/// Opens the devices of a machine that is being made.
pub(crate) struct Host {
    attachments: BTreeMap<Option<String>, Attachment>,
    /// Of the command line, and not opened yet.
    iommufds: BTreeMap<String, Option<OwnedFd>>,
    /// KVM's knowledge of devices.
    kvm_device: Option<Arc<VfioDeviceFd>>,
    /// KVM tells when the guest has dealt with an interrupt of a line.
    resamples: bool,
    memory: Arc<GuestMemory>,
    routes: Arc<Routes>,
    vm: Arc<VmFd>,
}

impl Host {
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        memory: &Arc<GuestMemory>,
        split_irqchip: bool,
        iommufds: Vec<Iommufd>,
    ) -> Host {
        Host {
            attachments: BTreeMap::new(),
            iommufds: iommufds.into_iter().map(|Iommufd { id, fd }| (id, fd)).collect(),
            kvm_device: None,
            resamples: !split_irqchip,
            memory: memory.clone(),
            routes: routes.clone(),
            vm: vm.clone(),
        }
    }

    /// Opens a device that is to have this number on the bus, and this name in messages, or that of its folder.
    pub(crate) fn open(
        &mut self,
        device: &HostDevice,
        number: Result<usize, PciError>,
        id: Option<&str>,
    ) -> Result<Opened> {
        let fails = |cause| Error::HostDevice { path: device.sysfsdev.clone(), cause: Box::new(cause) };
        let number = number.map_err(HostDeviceError::Pci).map_err(fails)?;
        std::fs::metadata(&device.sysfsdev).map_err(HostDeviceError::Missing).map_err(fails)?;
        if device.iommufd.is_none() {
            let group = std::fs::metadata(device.sysfsdev.join("iommu_group"));
            group.map_err(HostDeviceError::NoGroup).map_err(fails)?;
        }
        self.know()?;
        self.try_open(device, number, id).map_err(fails)
    }

    /// Makes KVM ready to be told of devices.
    fn know(&mut self) -> Result<()> {
        if self.kvm_device.is_none() {
            let mut create = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
            let device = self.vm.create_device(&mut create).map_err(kvm("learn of VFIO devices"))?;
            self.kvm_device = Some(Arc::new(VfioDeviceFd::new_from_kvm(device)));
        }
        Ok(())
    }

    fn try_open(&mut self, device: &HostDevice, number: usize, id: Option<&str>) -> Result<Opened, HostDeviceError> {
        let HostDevice { sysfsdev, iommufd, migration } = device;
        let ops = self.attachment(iommufd.as_ref())?.ops.clone();
        let opened = VfioDevice::new(sysfsdev, ops.clone(), iommufd.is_some()).map_err(HostDeviceError::Vfio)?;
        let (opened, memory) = (Arc::new(opened), self.memory.clone());
        let attachment = self.attachment(iommufd.as_ref())?;
        let is_first = attachment.devices.is_empty();
        let name = sysfsdev.display().to_string();
        attachment.devices.push((id.unwrap_or(&name).to_owned(), opened.clone()));
        if is_first {
            // A container can map when it has its first device.
            dma::map(&*ops, &memory).map_err(HostDeviceError::Map)?;
        }
        let driver = KernelDriver(opened.clone());
        let driver: Result<Box<dyn Driver>, String> = match (migration, driver.migration_flags()) {
            (Some(false), _) => Err("enable-migration=off".to_owned()),
            (Some(true), Err(errno)) => return Err(HostDeviceError::NoMigration(errno)),
            _ => Ok(Box::new(driver)),
        };
        let interrupts = |pin: Option<usize>| {
            let line = pin.map(|pin| FIRST_GSI + line_of(number, pin) as u32).filter(|_| self.resamples);
            if pin.is_some() && line.is_none() {
                tracing::warn!(
                    device = name,
                    "the device's interrupt pin is not connected: KVM has no lines with kernel-irqchip=split, and the guest has to use MSI or MSI-X"
                );
            }
            Interrupts::new(opened.clone(), self.vm.clone(), self.routes.clone(), line)
        };
        let function = KernelFunction::new(name.clone(), opened.clone(), memory, interrupts)?;
        Ok(Opened { function: Box::new(function), driver })
    }

    fn attachment(&mut self, iommufd: Option<&String>) -> Result<&mut Attachment, HostDeviceError> {
        let handle = self.kvm_device.clone();
        match self.attachments.entry(iommufd.cloned()) {
            std::collections::btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let (ops, container): (Arc<dyn VfioOps>, _) = match iommufd {
                    None => {
                        let container = Arc::new(VfioContainer::new(handle).map_err(HostDeviceError::Vfio)?);
                        (container.clone(), Some(container))
                    }
                    Some(id) => {
                        let iommufd = match self.iommufds.remove(id).flatten() {
                            Some(fd) => IommuFd::new_from_fd(File::from(fd)),
                            None => IommuFd::new().map_err(HostDeviceError::Iommufd)?,
                        };
                        let ioas = VfioIommufd::new(Arc::new(iommufd), None, handle).map_err(HostDeviceError::Vfio)?;
                        (Arc::new(ioas), None)
                    }
                };
                Ok(entry.insert(Attachment { devices: Vec::new(), ops, container }))
            }
        }
    }

    /// The logs of what the devices write to. What has none is said.
    pub(crate) fn logs(self) -> Vec<Box<dyn DmaLog>> {
        let log = |attachment: Attachment| {
            let log = KernelLog::new(attachment.devices, attachment.container, self.memory.clone());
            let tracking = log.start();
            log.stop();
            if tracking == Tracking::Nobody {
                tracing::warn!(
                    "neither the VFIO devices nor their container tell which pages the devices write to: in a migration all of RAM is sent \
                     once more when the guest has stopped"
                );
            }
            Box::new(log) as Box<dyn DmaLog>
        };
        self.attachments.into_values().map(log).collect()
    }
}
