//! What can go wrong in the monitor, by cause.

use crate::boot::BootError;
use crate::devices::pci::PciError;
use crate::memory::BackendError;
use crate::vfio::{HostDeviceError, VfioError};
use std::io;
use std::path::PathBuf;

/// An error of the monitor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The KVM device cannot be opened.
    #[error(
        "cannot open {}: {cause}; this needs a Linux host with KVM and read-write access to that device (load kvm_intel or \
         kvm_amd, enable nested virtualisation in a virtual machine, or join the group kvm)", path.display()
    )]
    KvmUnavailable {
        /// The device.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The host's KVM lacks something the machine cannot do without.
    #[error("this host's KVM lacks {capability}, which the machine needs")]
    KvmCapability {
        /// Name of the capability, as in the KVM API document.
        capability: &'static str,
    },
    /// A KVM call failed.
    #[error("KVM refused to {what}: {cause}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// The error code.
        cause: kvm_ioctls::Error,
    },
    /// The host refused a resource.
    #[error("cannot {what}: {cause}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// The error code.
        cause: io::Error,
    },
    /// A machine was asked for that cannot be built.
    #[error("{0}")]
    Config(String),
    /// The memory that the machine's RAM is to be made of.
    #[error(transparent)]
    MemoryBackend(#[from] BackendError),
    /// A PCI device, or its state.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A VFIO device that cannot go on.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A device of the host that cannot be used. The beginning is QEMU's.
    #[error("vfio {}: {cause}", path.display())]
    HostDevice {
        /// Its folder in sysfs.
        path: PathBuf,
        /// Why.
        cause: Box<HostDeviceError>,
    },
    /// A kernel that cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// An access outside a RAM block or outside guest RAM.
    #[error("{len} bytes at {address:#x} are not within {what}")]
    OutOfRange {
        /// The RAM block's name, or "guest RAM".
        what: String,
        /// Offset in the block, or guest-physical address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// The call needs stopped vCPUs.
    #[error("the machine must be paused to {0}")]
    NotPaused(&'static str),
    /// The guest or its vCPU cannot go on.
    #[error("vCPU {vcpu}: {reason} at rip {rip:#x}")]
    Vcpu {
        /// Number of the vCPU.
        vcpu: usize,
        /// KVM's exit reason and its details.
        reason: String,
        /// Instruction pointer.
        rip: u64,
    },
    /// A disk hangs, so that another machine cannot have its guest.
    #[error("virtio device {device} has had something under way at the host for {seconds} s: its disk hangs")]
    DiskHangs {
        /// The device's position on the command line, from 0.
        device: usize,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A saved state that does not fit this machine.
    #[error("the saved state does not fit this machine: {0}")]
    State(String),
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names the KVM call that failed.
pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |cause| Error::Kvm { what, cause }
}
