//! What can be wrong with a device of the host.

use crate::devices::pci::PciError;
use crate::error::Error;
use iommufd_ioctls::IommufdError;
use rustix::io::Errno;
use std::io;
use vfio_ioctls::VfioError;

/// Why a device of the host cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostDeviceError {
    /// There is no such folder.
    #[error("no such host device: {0}")]
    Missing(io::Error),
    /// It has no group, so that it is no device that VFIO knows.
    #[error("no iommu_group found: {0}: is it bound to a VFIO driver?")]
    NoGroup(io::Error),
    /// Its iommufd cannot be used.
    #[error("{0}")]
    Iommufd(IommufdError),
    /// VFIO does not give it.
    #[error("{}", with_sources(.0))]
    Vfio(VfioError),
    /// Its RAM cannot be mapped for it.
    #[error("the guest's RAM cannot be mapped for it: {}", with_sources(.0))]
    Map(VfioError),
    /// It does not answer.
    #[error("it does not {what}: {errno}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// The driver's answer.
        errno: Errno,
    },
    /// Its interrupts cannot be used.
    #[error("its interrupts cannot be used: {0}")]
    Interrupts(Box<Error>),
    /// It cannot migrate, and has to.
    #[error("its driver offers no migration ({0}), which enable-migration=on asks for")]
    NoMigration(Errno),
    /// It is no PCI device that can be on the bus.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// An error of the crate, which leaves out what its cause says.
fn with_sources(error: &VfioError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
