//! The numbers of page channels: magic, version, lengths and flags, as they lie on the wire.
//!
//! The fixed-size headers are read in place through private views, which check nothing but the length. The values built
//! from them ([`Init`](crate::Init), [`RamPacket`](crate::RamPacket), [`DeviceState`](crate::DeviceState)) are checked.
//!
//! Source: streams of QEMU 5.2, 7.2, 10.0 and 11.1; `docs/format/multifd.md`.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Opens the first packet and every later packet of a page channel.
pub const MAGIC: u32 = 0x1122_3344;
/// Version of all packets, since multifd became stable in QEMU 4.0.
pub const VERSION: u32 = 1;

/// Length in bytes of the first packet of a channel.
pub const INIT_LEN: usize = 64;
/// Bytes from the start of a packet up to and with its flags, which tell what kind of packet it is (10.0).
pub const PREFIX_LEN: usize = 12;
/// Length in bytes of a RAM packet without its offset slots.
pub const RAM_HEADER_LEN: usize = 320;
/// Length in bytes of a device-state packet (10.0).
pub const DEVICE_STATE_LEN: usize = 276;
/// Bytes of guest memory that one RAM packet can carry at most; gives the number of offset slots.
pub const PACKET_DATA: u64 = 512 << 10;
/// Length in bytes of the name fields, which are padded with NUL and end in one.
pub const NAME_LEN: usize = 256;

/// The packet is a synchronisation point.
pub const FLAG_SYNC: u32 = 0x01;
/// The bits that tell the compression method (`0x0e` until 9.0, with `qpl`, `uadk` and `qatzip` unassigned).
pub const COMPRESSION_MASK: u32 = 0x3e;
/// The packet carries device state (10.0).
pub const FLAG_DEVICE_STATE: u32 = 0x40;

/// The first packet of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct InitView {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U32,
    /// UUID of the source's virtual machine.
    pub uuid: [u8; 16],
    /// Number of the channel, from 0.
    pub channel: u8,
    /// Zero.
    pub unused: [u8; 39],
}

/// A RAM packet without its offset slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RamHeader {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U32,
    /// [`FLAG_SYNC`] and one compression method.
    pub flags: U32,
    /// Number of offset slots; 0 in the lone SYNC packets of 9.0 and later.
    pub pages_alloc: U32,
    /// Number of pages with data in the payload.
    pub normal_pages: U32,
    /// Length in bytes of the payload, but stale in packets without pages before 9.0.
    pub next_packet_size: U32,
    /// Number of the packet among those of all channels.
    pub packet_num: U64,
    /// Number of zero pages (9.0; zero before).
    pub zero_pages: U32,
    /// Zero.
    pub unused: [u8; 28],
    /// Name of the RAM block, padded with NUL; stale in packets without pages before 9.0.
    pub ramblock: [u8; NAME_LEN],
}

/// A device-state packet (10.0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DeviceStateView {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U32,
    /// [`FLAG_DEVICE_STATE`].
    pub flags: U32,
    /// Name of the device's section, padded with NUL.
    pub idstr: [u8; NAME_LEN],
    /// Instance of the device's section.
    pub instance_id: U32,
    /// Length in bytes of the payload.
    pub next_packet_size: U32,
}

/// The bytes of a name field before its first NUL. Its last byte counts as NUL, whatever it is.
pub(crate) fn name(field: &[u8; NAME_LEN]) -> &[u8] {
    let field = &field[..NAME_LEN - 1];
    field.split(|byte| *byte == 0).next().unwrap_or(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_views_have_the_lengths_of_the_format() {
        assert_eq!(size_of::<InitView>(), INIT_LEN);
        assert_eq!(size_of::<RamHeader>(), RAM_HEADER_LEN);
        assert_eq!(size_of::<DeviceStateView>(), DEVICE_STATE_LEN);
    }

    #[test]
    fn a_name_ends_at_its_first_nul_and_before_the_last_byte() {
        let mut field = [b'x'; NAME_LEN];
        assert_eq!(name(&field).len(), 255);
        field[3] = 0;
        assert_eq!(name(&field), b"xxx");
        assert_eq!(name(&[0; NAME_LEN]), b"");
    }
}
