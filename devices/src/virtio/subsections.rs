//! The subsections of the VMSD `virtio`.

use qevm_savevm::vmstate::{Table, VmState};
use qevm_wire::QemuVersion;

/// Queues that a device can have.
pub const MAX_QUEUES: usize = 1024;

/// Subsection `virtio/device_endian`: a legacy device whose byte order is not the target's own.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/device_endian", version = 1)]
pub struct DeviceEndian {
    /// 1 little-endian, 2 big-endian.
    pub device_endian: u8,
}

/// Subsection `virtio/128bit_features`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/128bit_features", version = 1)]
pub struct Features128Bit {
    /// Feature bits 64 to 127 that the guest accepted.
    #[vmstate(name = "guest_features_ex[1]")]
    pub guest_features: u64,
}

/// Subsection `virtio/64bit_features`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/64bit_features", version = 1)]
pub struct Features64Bit {
    /// Feature bits 0 to 63 that the guest accepted.
    pub guest_features: u64,
}

/// Subsection `virtio/virtqueues`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/virtqueues", version = 1)]
pub struct VirtQueues {
    /// One for each queue a device can have.
    pub vq: Table<VirtQueueRings, MAX_QUEUES>,
}

/// Structure `virtqueue_state`: guest-physical addresses of the rings.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "virtqueue_state", version = 1)]
pub struct VirtQueueRings {
    /// Available ring (driver area).
    #[vmstate(name = "vring.avail")]
    pub avail: u64,
    /// Used ring (device area).
    #[vmstate(name = "vring.used")]
    pub used: u64,
}

/// Subsection `virtio/ringsize`. 11.1 skips it when loading and never sends it.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/ringsize", version = 1, needed = |_, ctx| ctx.profile.qemu < QemuVersion::new(11, 0))]
pub struct RingSize {
    /// One for each queue a device can have.
    pub vq: Table<RingSizeState, MAX_QUEUES>,
}

/// Structure `ringsize_state`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "ringsize_state", version = 1)]
pub struct RingSizeState {
    /// Descriptors that the queue has by default.
    #[vmstate(name = "vring.num_default")]
    pub num_default: u32,
}

/// Subsection `virtio/broken`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/broken", version = 1, needed = |sub, _| sub.broken)]
pub struct Broken {
    /// The guest broke the protocol; the device needs a reset.
    pub broken: bool,
}

/// Subsection `virtio/extra_state`: what the transport adds.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/extra_state", version = 1)]
pub struct ExtraState {
    /// virtio-mmio's addition.
    pub extra_state: MmioExtraState,
}

/// VMSD `virtio_mmio`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio_mmio", version = 1)]
pub struct MmioExtraState {
    /// Subsection `virtio_mmio/state`: the device is not legacy.
    #[vmstate(subsection)]
    pub state: Option<MmioState>,
}

/// Subsection `virtio_mmio/state`: what the guest wrote but did not activate yet.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio_mmio/state", version = 1)]
pub struct MmioState {
    /// Accepted features, low and high word.
    pub guest_features: [u32; 2],
    /// One for each queue a device can have.
    pub vqs: Table<MmioQueueState, MAX_QUEUES>,
}

/// Structure `virtio_mmio/queue_state`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio_mmio/queue_state", version = 1)]
pub struct MmioQueueState {
    /// Number of descriptors.
    pub num: u16,
    /// QueueReady.
    pub enabled: bool,
    /// Descriptor address, low and high word.
    pub desc: [u32; 2],
    /// Driver area address, low and high word.
    pub avail: [u32; 2],
    /// Device area address, low and high word.
    pub used: [u32; 2],
}

/// Subsection `virtio/started`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/started", version = 1, needed = |sub, _| sub.started)]
pub struct Started {
    /// The guest set DRIVER_OK.
    pub started: bool,
}

/// Subsection `virtio/packed_virtqueues`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/packed_virtqueues", version = 1)]
pub struct PackedVirtQueues {
    /// One for each queue a device can have.
    pub vq: Table<PackedVirtQueue, MAX_QUEUES>,
}

/// Structure `packed_virtqueue_state`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "packed_virtqueue_state", version = 1)]
pub struct PackedVirtQueue {
    /// The next available descriptor the device will look at.
    pub last_avail_idx: u16,
    /// Its wrap counter.
    pub last_avail_wrap_counter: bool,
    /// The next used descriptor the device will write.
    pub used_idx: u16,
    /// Its wrap counter.
    pub used_wrap_counter: bool,
    /// Descriptors in flight.
    pub inuse: u32,
}

/// Subsection `virtio/disabled`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio/disabled", version = 1, needed = |sub, _| sub.disabled)]
pub struct Disabled {
    /// The device was switched off (`pci` power, failover).
    pub disabled: bool,
}
