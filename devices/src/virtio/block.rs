//! Section `virtio-blk`.

use super::element::VirtQueueElement;
use super::{DevicePart, MmioVirtio};
use qevm_savevm::vmstate::{QTailQ, VmState};

/// Section `virtio-blk` version 2.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-blk", version = 2)]
pub struct VirtioBlk {
    /// The state.
    pub virtio: MmioVirtio<Block>,
}

/// The block device's part: requests that were not completed.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-blk-device", version = 2)]
pub struct Block {
    /// The requests.
    pub requests: QTailQ<BlockRequest>,
}

/// A request in flight.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-blk-request", version = 1)]
pub struct BlockRequest {
    /// Its queue, if the device has several.
    #[vmstate(exists = ctx.virtio.queues > 1)]
    pub queue: Option<u32>,
    /// Its descriptors.
    pub element: VirtQueueElement,
}

/// Offset of `num_queues` in the configuration space (virtio 1.2, 5.2.4).
const NUM_QUEUES: usize = 34;

impl DevicePart for Block {
    fn queues(config: &[u8]) -> u16 {
        config.get(NUM_QUEUES..).and_then(|rest| rest.first_chunk()).map_or(1, |bytes| u16::from_le_bytes(*bytes))
    }
}
