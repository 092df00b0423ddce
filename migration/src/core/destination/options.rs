//! What a destination has to know of its machine and of the settings.

use crate::core::DeviceOptions;
use qevm_returnpath::switchover::SwitchoverAckFlow;
use std::time::Duration;

/// What a destination has to know of its machine and of the settings.
#[derive(Debug, Clone, Default)]
pub struct DestinationOptions {
    /// The machine type, as the configuration section carries it.
    pub machine_type: String,
    /// The guest's UUID, if the machine was given one: a source that says another is refused.
    pub uuid: Option<[u8; 16]>,
    /// The names of the machine's RAM blocks, all of which must come.
    pub ram: Vec<String>,
    /// Where the stream begins in its file.
    pub offset: u64,
    /// A description is expected after the end of the stream.
    pub vmdesc: bool,
    /// What is written to the main channel goes somewhere.
    pub answers: bool,
    /// Capability `mapped-ram` is on.
    pub mapped_ram: bool,
    /// Capability `x-ignore-shared` is on: the stream may leave RAM out.
    pub ignore_shared: bool,
    /// The iterative devices of the machine, all of which must come.
    pub devices: Vec<DeviceOptions>,
    /// How acks of the switchover are counted; `None` without capability `switchover-ack`.
    pub switchover_ack: Option<SwitchoverAckFlow>,
    /// There are page channels.
    pub page_channels: bool,
    /// There are none, but a source with page channels has called.
    pub page_channels_called: bool,
    /// There are none, and the source may be one whose page channels were dropped: it must send a page within three
    /// seconds or say something else.
    pub hurried: bool,
    /// Capability `postcopy-ram` is on: the guest may run before its memory is here.
    pub postcopy: bool,
    /// The page sizes of the host's memory under the RAM blocks, one bit each: the source's have to be the same. 0
    /// counts as 4096.
    pub page_sizes: u64,
    /// Capability `background-snapshot` is on: memory that ends without END is complete if every page came once.
    pub background_snapshot: bool,
    /// Capability `late-block-activate` is on.
    pub late_block_activate: bool,
    /// How long the main channel may be silent; `None` for as long as it takes, since only the operator knows the
    /// source's rate limit.
    pub silence: Option<Duration>,
    /// How long the source's host may take to acknowledge the last word, and the source to confirm it; `None` for ten
    /// seconds.
    pub handover: Option<Duration>,
}
