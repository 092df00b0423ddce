//! Virtio devices.

/// A queue, with the fields of QEMU's virtio sections. The used index lives in guest memory alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the section's fields
pub struct VirtioQueueState {
    pub num: u32,
    pub align: u32,
    pub desc: u64,
    pub last_avail_idx: u16,
}

/// A request that was taken from its queue and not answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioRequest {
    /// The descriptor that it is given back by.
    pub head: u16,
    /// Guest-physical address and bytes of each buffer that the device reads.
    pub readable: Vec<(u64, u32)>,
    /// Guest-physical address and bytes of each buffer that the device writes.
    pub writable: Vec<(u64, u32)>,
}

/// A port of a serial bus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioPortState {
    /// Its number.
    pub id: u32,
    /// The guest has it open.
    pub guest_connected: bool,
    /// A peer listens at the host.
    pub host_connected: bool,
    /// What the guest sends and the host did not take completely, and how many bytes it took.
    pub pending: Option<(VirtioRequest, u64)>,
}

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioNetState {
    /// Its address.
    pub mac: [u8; 6],
    /// Link status: 1 up, 2 the guest is to announce itself.
    pub status: u16,
    /// Frames wait in the transmit queue until the network takes them.
    pub transmit_waits: bool,
    /// Frames have a virtio header on the host's side.
    pub header: bool,
    /// The offloads that the guest takes, as bits of the features.
    pub guest_offloads: u64,
    /// Which frames it receives.
    pub filter: VirtioNetFilter,
}

/// Which frames a network card receives, with the names of QEMU's section.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the section's fields
pub struct VirtioNetFilter {
    pub promisc: bool,
    pub allmulti: bool,
    pub alluni: bool,
    pub nomulti: bool,
    pub nouni: bool,
    pub nobcast: bool,
    pub multi_overflow: bool,
    pub uni_overflow: bool,
    pub macs: Vec<[u8; 6]>,
    /// A bit for each VLAN.
    pub vlans: [u8; 512],
}

impl Default for VirtioNetFilter {
    /// After a reset: everything is received.
    fn default() -> VirtioNetFilter {
        VirtioNetFilter {
            promisc: true,
            allmulti: false,
            alluni: false,
            nomulti: false,
            nouni: false,
            nobcast: false,
            multi_overflow: false,
            uni_overflow: false,
            macs: Vec::new(),
            vlans: [0; 512],
        }
    }
}

/// What a device has beside its transport.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VirtioDeviceState {
    /// Requests that a disk was not done with.
    Block(Vec<VirtioRequest>),
    /// A source of random numbers has nothing.
    Rng,
    /// A network card.
    Net(Box<VirtioNetState>),
    /// The ports of a serial bus.
    Serial(Vec<VirtioPortState>),
}

/// A virtio device with a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioState {
    /// The word of the device's features that a read gives.
    pub host_features_sel: u32,
    /// The word of the driver's features that a write sets.
    pub guest_features_sel: u32,
    /// log2 of the guest's page size.
    pub guest_page_shift: u32,
    /// Device status.
    pub status: u8,
    /// Interrupt status.
    pub isr: u8,
    /// The selected queue.
    pub queue_sel: u16,
    /// Features that the guest accepted.
    pub guest_features: u64,
    /// The configuration space as the guest read it last; zeroes before.
    pub config: Vec<u8>,
    /// All queues of the device.
    pub queues: Vec<VirtioQueueState>,
    /// The sizes that the queues have after a reset.
    pub default_nums: Vec<u32>,
    /// The driver has started the device.
    pub started: bool,
    /// The driver broke the protocol; only a reset helps.
    pub broken: bool,
    /// What the device has beside that.
    pub device: VirtioDeviceState,
}
