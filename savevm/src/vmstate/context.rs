//! The facts outside a device that decide how its state is laid out.

use super::PciFacts;
use qevm_wire::{Limits, Profile, QemuVersion};

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Accel {
    /// `accel=tcg`
    Tcg,
    /// `accel=kvm`
    Kvm,
}

/// How a description numbers the elements of an array that does not fit one entry (`docs/format/device-state.md`, the
/// description).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IndexNotation {
    /// Every element has an `index` (seen in 5.2 and 7.2).
    All,
    /// Every element but the last has an `index` (seen in 10.0).
    AllButLast,
    /// No element has an `index` (seen in 11.1).
    None,
}

/// What the predicates of a declaration may ask, and what a decoder may allocate.
///
/// ```
/// use qevm_savevm::vmstate::{Accel, Context};
/// use qevm_wire::QemuVersion;
///
/// let ctx = Context::new(QemuVersion::new(11, 1), "microvm").with_accel(Accel::Kvm);
/// assert!(ctx.profile.kvmclock_always_reliable);
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Context {
    /// The release and machine type that write (encoding) or wrote (decoding) the state.
    pub profile: Profile,
    /// Bounds for a decoder.
    pub limits: Limits,
    /// What the guest runs on; [`Accel::Tcg`] unless told.
    pub accel: Accel,
    /// `-m slots=`: the elements of `acpi-ged/memhp`'s `devs`, whose count is not on the wire. 0 on microvm.
    pub memory_slots: u32,
    /// Possible CPUs of machines that can plug them: the elements of `acpi-ged/cpuhp`'s `devs`. 0 on microvm.
    pub hotplug_cpus: u32,
    /// What of a virtio device's transport state decides the layout of the rest; set while that rest is walked.
    pub virtio: VirtioFacts,
    /// What the destination knows of a PCI device and the wire does not say.
    pub pci: PciFacts,
}

/// See [`Context::virtio`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VirtioFacts {
    /// Feature bits 0 to 31 that the guest accepted.
    pub guest_features: u32,
    /// Queues of a block device, queue pairs of a network device; from the device's configuration space.
    pub queues: u16,
    /// The device offers `VIRTIO_F_RING_PACKED`, so that requests in flight are preceded by a descriptor count.
    pub packed_ring: bool,
}

impl Context {
    /// The context of release `qemu` running `machine`, with default limits.
    pub fn new(qemu: QemuVersion, machine: &str) -> Self {
        Self::from_profile(Profile::new(qemu, machine))
    }

    /// The context of a known profile, with default limits.
    pub fn from_profile(profile: Profile) -> Self {
        Context {
            profile,
            limits: Limits::default(),
            accel: Accel::Tcg,
            memory_slots: 0,
            hotplug_cpus: 0,
            virtio: VirtioFacts::default(),
            pci: PciFacts::default(),
        }
    }

    /// The same with another accelerator.
    #[must_use]
    pub fn with_accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// How this release numbers array elements in its description.
    pub fn index_notation(&self) -> IndexNotation {
        // Only 5.2, 7.2, 10.0 and 11.1 were examined; what lies between keeps the older notation.
        if self.profile.qemu >= QemuVersion::new(11, 0) {
            IndexNotation::None
        } else if self.profile.qemu >= QemuVersion::new(10, 0) {
            IndexNotation::AllButLast
        } else {
            IndexNotation::All
        }
    }
}
