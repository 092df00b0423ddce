//! What a page channel consists of.

use crate::device_state::DeviceState;
use crate::init::Init;
use crate::packet::RamPacket;
use qevm_wire::CountedString;

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

/// What the payload of a page channel is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PayloadKind {
    /// Pages, as the packet before says.
    Pages,
    /// State of a device.
    DeviceState {
        /// Name of the device's section.
        idstr: CountedString,
        /// Instance of the device's section.
        instance_id: u32,
    },
}

impl Event<'_> {
    pub(crate) fn payload_kind(&self) -> PayloadKind {
        match self {
            Event::DeviceState(DeviceState { idstr, instance_id, .. }) => {
                PayloadKind::DeviceState { idstr: idstr.clone(), instance_id: *instance_id }
            }
            _ => PayloadKind::Pages,
        }
    }

    /// Length in bytes of the payload that follows.
    pub fn payload_len(&self) -> u64 {
        match self {
            Event::Init(_) => 0,
            Event::Ram(packet) => packet.payload_len(),
            Event::DeviceState(packet) => packet.payload_len.into(),
        }
    }
}
