//! The migration protocol, call by call.

use super::ioctl;
use crate::vfio::{DataFile, Driver, PrecopyInfo};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::RawFd;
use std::sync::Arc;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_PRECOPY_INFO_REINIT,
};
use vfio_ioctls::VfioDevice;

/// The kernel's driver of a device.
pub(super) struct KernelDriver(pub(super) Arc<VfioDevice>);

impl Driver for KernelDriver {
    fn migration_flags(&self) -> Result<u64, Errno> {
        ioctl::get::<1>(&*self.0, VFIO_DEVICE_FEATURE_MIGRATION).map(|[flags]| flags)
    }

    fn set_state(&self, state: u32) -> Result<Option<Box<dyn DataFile>>, Errno> {
        // State in the lower half, descriptor in the upper.
        let nothing = u64::from(u32::MAX) << 32;
        let [answer] = ioctl::set(&*self.0, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, [nothing | u64::from(state)])?;
        let file = ioctl::owned((answer >> 32) as RawFd).map(File::from);
        Ok(file.map(|file| Box::new(Data(file)) as Box<dyn DataFile>))
    }

    fn state(&self) -> Result<u32, Errno> {
        ioctl::get::<1>(&*self.0, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE).map(|[answer]| answer as u32)
    }

    fn data_size(&self) -> Result<u64, Errno> {
        ioctl::get::<1>(&*self.0, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE).map(|[size]| size)
    }

    fn tell_reinit(&self) -> Result<(), Errno> {
        ioctl::set(&*self.0, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, []).map(drop)
    }

    fn reset(&self) -> Result<(), Errno> {
        ioctl::reset(&*self.0)
    }
}

/// The data of a device's state.
struct Data(File);

impl DataFile for Data {
    fn read(&mut self, into: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.0, into)
    }

    fn write(&mut self, from: &[u8]) -> Result<usize, Errno> {
        rustix::io::write(&self.0, from)
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        let (flags, initial, dirty) = ioctl::precopy_info(&self.0)?;
        Ok(PrecopyInfo { reinit: flags & VFIO_PRECOPY_INFO_REINIT != 0, initial, dirty })
    }
}
