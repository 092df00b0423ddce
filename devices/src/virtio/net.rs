//! Section `virtio-net`.

use super::{DevicePart, MmioVirtio};
use qevm_savevm::vmstate::{Buffer, Context, Table, Tmp, VmState};
use qevm_wire::QemuVersion;

/// Section `virtio-net` version 11.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-net", version = 11)]
pub struct VirtioNet {
    /// The state.
    pub virtio: MmioVirtio<Net>,
}

/// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS` (virtio 1.2, 5.1.3).
const F_CTRL_GUEST_OFFLOADS: u32 = 1 << 2;
/// Offset of `max_virtqueue_pairs` in the configuration space (virtio 1.2, 5.1.4).
const MAX_VIRTQUEUE_PAIRS: usize = 8;

/// The network device's part, VMSD `virtio-net-device` version 11.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-net-device", version = 11)]
pub struct Net {
    /// MAC address.
    pub mac: [u8; 6],
    /// First queue pair: packets wait to be sent.
    #[vmstate(name = "vqs")]
    pub tx_waiting: TxWaiting,
    /// The guest accepted mergeable receive buffers.
    pub mergeable_rx_bufs: u32,
    /// Link status.
    pub status: u16,
    /// Promiscuous mode.
    pub promisc: u8,
    /// Receive all multicasts.
    pub allmulti: u8,
    /// Addresses in the filter.
    #[vmstate(name = "mac_table.in_use")]
    pub mac_table_in_use: u32,
    /// The filter's addresses, unicasts first.
    #[vmstate(name = "mac_table.macs", len = *mac_table_in_use)]
    pub mac_table: Vec<Buffer<6>>,
    /// A bit for each VLAN that is received, as little-endian words of 32.
    pub vlans: Buffer<512>,
    /// Packets have a virtio header on the host's side.
    #[vmstate(name = "tmp")]
    pub vnet: Tmp<Vnet>,
    /// Too many multicast addresses for the filter.
    #[vmstate(name = "mac_table.multi_overflow")]
    pub multi_overflow: u8,
    /// Too many unicast addresses for the filter.
    #[vmstate(name = "mac_table.uni_overflow")]
    pub uni_overflow: u8,
    /// Receive all unicasts.
    pub alluni: u8,
    /// Receive no multicasts.
    pub nomulti: u8,
    /// Receive no unicasts.
    pub nouni: u8,
    /// Receive no broadcasts.
    pub nobcast: u8,
    /// The host's side does UFO.
    #[vmstate(name = "tmp")]
    pub ufo: Tmp<Ufo>,
    /// Queue pairs that the device has, if several.
    #[vmstate(type = "uint16 equal", exists = ctx.virtio.queues > 1)]
    pub max_queue_pairs: Option<u16>,
    /// Queue pairs that the guest uses, if there are several.
    #[vmstate(exists = ctx.virtio.queues > 1)]
    pub curr_queue_pairs: Option<u16>,
    /// Further queue pairs in use: packets wait to be sent.
    #[vmstate(name = "vqs_1", len = curr_queue_pairs.unwrap_or(1).saturating_sub(1))]
    pub further_tx_waiting: Vec<TxWaiting>,
    /// Offloads that the guest chose, if it may.
    #[vmstate(exists = ctx.virtio.guest_features & F_CTRL_GUEST_OFFLOADS != 0)]
    pub curr_guest_offloads: Option<u64>,
    /// Subsection `virtio-net-device/rss`.
    #[vmstate(subsection)]
    pub rss: Option<Rss>,
}

impl DevicePart for Net {
    fn queues(config: &[u8]) -> u16 {
        let pairs = config.get(MAX_VIRTQUEUE_PAIRS..).and_then(|rest| rest.first_chunk());
        pairs.map_or(1, |bytes| u16::from_le_bytes(*bytes))
    }
}

/// Structure `virtio-net-queue-tx_waiting`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-net-queue-tx_waiting", version = 0)]
pub struct TxWaiting {
    /// Not 0: packets wait.
    pub tx_waiting: u32,
}

/// Structure `virtio-net-vnet`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-net-vnet", version = 0)]
pub struct Vnet {
    /// 1: they have.
    pub has_vnet_hdr: u32,
}

/// Structure `virtio-net-ufo`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-net-ufo", version = 0)]
pub struct Ufo {
    /// 1: it does.
    pub has_ufo: u8,
}

/// Subsection `virtio-net-device/rss`: receive side scaling; version 2 since 11.0, version 1 before.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "virtio-net-device/rss",
    version = 2,
    minimum_version = 1,
    needed = |rss, _| rss.enabled,
    wire_version = Rss::version_of,
    release_versions = |ctx| (if ctx.profile.qemu >= QemuVersion::new(11, 0) { 2 } else { 1 }, 1)
)]
pub struct Rss {
    /// It is on.
    #[vmstate(name = "rss_data.enabled")]
    pub enabled: bool,
    /// Packets are steered by hash.
    #[vmstate(name = "rss_data.redirect")]
    pub redirect: bool,
    /// Packets carry their hash.
    #[vmstate(name = "rss_data.populate_hash")]
    pub populate_hash: bool,
    /// Hash types that the guest chose.
    #[vmstate(name = "rss_data.runtime_hash_types")]
    pub runtime_hash_types: u32,
    /// Hash types that the device offers (version 2).
    #[vmstate(name = "rss_data.supported_hash_types", exists = version >= 2)]
    pub supported_hash_types: Option<u32>,
    /// Length of the indirection table.
    #[vmstate(name = "rss_data.indirections_len")]
    pub indirections_len: u16,
    /// The queue of packets that are not hashed.
    #[vmstate(name = "rss_data.default_queue")]
    pub default_queue: u16,
    /// The hash key.
    #[vmstate(name = "rss_data.key")]
    pub key: Table<u8, 40>,
    /// The indirection table.
    #[vmstate(name = "rss_data.indirections_table", len = *indirections_len)]
    pub indirections_table: Vec<u16>,
}

impl Rss {
    fn version_of(&self, _: &Context) -> u32 {
        if self.supported_hash_types.is_some() { 2 } else { 1 }
    }
}
