//! Sections of virtio devices on virtio-mmio: `<path>/virtio-blk`, `virtio-net`, `virtio-rng`, `virtio-console`.
//!
//! To QEMU's descriptions such a section is one opaque field `virtio`. Inside it are, in this order: the transport's
//! and the device's common registers and the queues ([`Virtio`]), the device's own part ([`block`], [`net`],
//! [`console`]; rng has none), and the subsections of the VMSD `virtio` ([`subsections`]). Requests in flight are
//! [`element`]s. (`docs/format/device-state.md`, virtio)

pub mod block;
pub mod console;
mod counted;
pub mod element;
pub mod net;
pub mod subsections;

pub use block::VirtioBlk;
pub use console::VirtioConsole;
pub use counted::Counted;
pub use net::VirtioNet;

use qevm_savevm::Error;
use qevm_savevm::vmstate::{Context, Element, ElementDescription, Field, Layout, Loader, Saver, VmState, VmStateError};
use std::ops::{Deref, DerefMut};

/// Section `virtio-rng` version 1.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-rng", version = 1)]
pub struct VirtioRng {
    /// The state; the device has no part of its own.
    pub virtio: MmioVirtio<NoDevicePart>,
}

/// The device part of a device that has none.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-rng-device", version = 1)]
pub struct NoDevicePart {}

/// What virtio devices have in common, with the device part `D`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio", version = 1)]
pub struct Virtio<D: DevicePart> {
    /// virtio-mmio: the word of the device's features that a read gives.
    pub host_features_sel: u32,
    /// virtio-mmio: the word of the driver's features that a write sets.
    pub guest_features_sel: u32,
    /// Legacy virtio-mmio: log2 of the guest's page size.
    pub guest_page_shift: u32,
    /// Device status.
    pub status: u8,
    /// Interrupt status.
    pub isr: u8,
    /// The selected queue.
    pub queue_sel: u16,
    /// Feature bits 0 to 31 that the guest accepted; all 64 are in `virtio/64bit_features`.
    pub guest_features: u32,
    /// Configuration space, in the guest's byte order.
    pub config: Counted<u8>,
    /// The queues up to the first without descriptors.
    pub queues: Counted<VirtQueue>,
    /// The device's own part.
    #[vmstate(context = device_context(ctx, *guest_features, D::queues(config)))]
    pub device: D,
    /// Subsection `virtio/device_endian`.
    #[vmstate(subsection)]
    pub device_endian: Option<subsections::DeviceEndian>,
    /// Subsection `virtio/128bit_features`; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0")]
    pub features_128bit: Option<subsections::Features128Bit>,
    /// Subsection `virtio/64bit_features`: the device offers features above bit 31.
    #[vmstate(subsection)]
    pub features_64bit: Option<subsections::Features64Bit>,
    /// Subsection `virtio/virtqueues`: the device offers `VIRTIO_F_VERSION_1`.
    #[vmstate(subsection)]
    pub virtqueues: Option<subsections::VirtQueues>,
    /// Subsection `virtio/ringsize`: a queue has not its default size; never sent by 11.1.
    #[vmstate(subsection)]
    pub ringsize: Option<subsections::RingSize>,
    /// Subsection `virtio/broken`.
    #[vmstate(subsection)]
    pub broken: Option<subsections::Broken>,
    /// Subsection `virtio/extra_state`: virtio-mmio with `force-legacy=off`.
    #[vmstate(subsection)]
    pub extra_state: Option<subsections::ExtraState>,
    /// Subsection `virtio/started`.
    #[vmstate(subsection)]
    pub started: Option<subsections::Started>,
    /// Subsection `virtio/packed_virtqueues`: the device offers `VIRTIO_F_RING_PACKED`.
    #[vmstate(subsection)]
    pub packed_virtqueues: Option<subsections::PackedVirtQueues>,
    /// Subsection `virtio/disabled`.
    #[vmstate(subsection)]
    pub disabled: Option<subsections::Disabled>,
}

/// A queue as the fields of virtio have it; the rest is in `virtio/virtqueues`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtqueue", version = 1)]
pub struct VirtQueue {
    /// Number of descriptors.
    pub num: u32,
    /// virtio-mmio: alignment of the used ring, bytes.
    pub align: u32,
    /// Guest-physical address of the descriptors; 0 if the queue is not set up.
    pub desc: u64,
    /// The next available entry the device will look at.
    pub last_avail_idx: u16,
}

/// The device's own part of the state.
pub trait DevicePart: VmState + Field {
    /// The number of queues (block) or queue pairs (network), read from the configuration space.
    fn queues(_config: &[u8]) -> u16 {
        1
    }
}

impl DevicePart for NoDevicePart {}

/// Field `virtio` of a device on virtio-mmio, opaque to QEMU's descriptions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MmioVirtio<D: DevicePart>(pub Box<Virtio<D>>);

impl<D: DevicePart> Deref for MmioVirtio<D> {
    type Target = Virtio<D>;
    fn deref(&self) -> &Virtio<D> {
        &self.0
    }
}

impl<D: DevicePart> DerefMut for MmioVirtio<D> {
    fn deref_mut(&mut self) -> &mut Virtio<D> {
        &mut self.0
    }
}

/// What the device's own part is laid out by.
fn device_context(ctx: &Context, guest_features: u32, queues: u16) -> Context {
    let mut ctx = ctx.clone();
    ctx.virtio.guest_features = guest_features;
    ctx.virtio.queues = queues;
    ctx
}

impl<D: DevicePart> MmioVirtio<D> {
    fn context(ctx: &Context, packed_ring: bool) -> Context {
        let mut ctx = ctx.clone();
        ctx.virtio.packed_ring = packed_ring;
        ctx
    }
}

impl<D: DevicePart> Element for MmioVirtio<D> {
    const TYPE: &'static str = "virtio";

    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        let ctx = Self::context(out.context(), self.packed_virtqueues.is_some());
        out.undescribed(|out| out.with_context(&ctx, |out| out.object(&*self.0, Virtio::<D>::VERSION)))
    }

    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        // Whether requests in flight are preceded by a descriptor count shows only after them, in the presence of
        // `virtio/packed_virtqueues`. The assumption that this subsection proves is tried first.
        let assuming = |input: &mut Loader<'_, '_, '_>, packed_ring| {
            input.attempt(|input| {
                let ctx = Self::context(input.context(), packed_ring);
                let start = input.offset();
                let virtio: Virtio<D> = input.with_context(&ctx, |input| input.object(Virtio::<D>::VERSION))?;
                if virtio.packed_virtqueues.is_some() != packed_ring {
                    let (what, found) = ("presence of virtio/packed_virtqueues", (!packed_ring).into());
                    let kind = VmStateError::Refused { what, found, expected: "what the requests in flight say" };
                    return Err(Error::new(kind.into(), start));
                }
                Ok(MmioVirtio(Box::new(virtio)))
            })
        };
        assuming(input, true).or_else(|first| {
            // Where the first lacks input, what is wrong with the second tells nothing.
            assuming(input, false).map_err(|second| if second.is_truncated() { second } else { first })
        })
    }

    fn describe(_: &Context) -> ElementDescription {
        ElementDescription { type_name: Some(Self::TYPE.into()), layout: Layout::Variable }
    }

    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        VmState::prepare(&mut *self.0, ctx)
    }

    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        VmState::accept(&mut *self.0, Virtio::<D>::VERSION, ctx)
    }
}
qevm_savevm::element_is_field!([D: DevicePart] MmioVirtio<D>);
