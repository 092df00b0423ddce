//! What a page channel consists of.

use crate::{device_state::DeviceState, init::Init, packet::RamPacket};

/// One item of a page channel. The items in order, encoded one after the other with their payloads, are the bytes of
/// the channel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The first packet.
    Init(Init),
    /// Pages, a synchronisation point, or both. [`RamPacket::payload_len`] bytes of page data follow.
    Ram(RamPacket<'a>),
    /// State of a device, whose [`payload_len`](DeviceState::payload_len) bytes follow.
    DeviceState(DeviceState),
}

impl Event<'_> {
    /// Length in bytes of the payload that follows.
    pub fn payload_len(&self) -> u64 {
        match self {
            Event::Init(_) => 0,
            Event::Ram(packet) => packet.payload_len(),
            Event::DeviceState(packet) => packet.payload_len.into(),
        }
    }
}
