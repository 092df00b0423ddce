//! Device-state packets: the state of a device beside the pages (QEMU 10.0), and what VFIO puts into them.

use crate::chunk::chunk;
use crate::layout::{self, DEVICE_STATE_LEN, DeviceStateView, FLAG_DEVICE_STATE, NAME_LEN};
use crate::{Error, PacketError, Reader, packet};
use core::mem::offset_of;
use qevm_wire::{CountedString, Limits, Located, WireError, Writer};
use zerocopy::transmute_ref;

/// A device-state packet (276 bytes), in front of `payload_len` bytes for the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// Name of the device's section.
    pub idstr: CountedString,
    /// Instance of the device's section.
    pub instance_id: u32,
    /// Length in bytes of the payload; never 0.
    pub payload_len: u32,
    /// What follows the name's NUL in its field, without trailing NULs. QEMU leaves nothing there.
    pub name_residue: Box<[u8]>,
}

impl DeviceState {
    /// A packet in front of `payload_len` bytes for instance `instance_id` of the device `idstr`.
    pub fn new(idstr: CountedString, instance_id: u32, payload_len: u32) -> Self {
        DeviceState { idstr, instance_id, payload_len, name_residue: Box::default() }
    }

    /// Reads a packet without its payload.
    ///
    /// # Errors
    /// A [`PacketError`] at the field at fault; [`WireError::Empty`] if the name is empty;
    /// [`WireError::LimitExceeded`] if the payload is longer than
    /// [`Limits::device_state_packet`](qevm_wire::Limits::device_state_packet); [`WireError::Truncated`] if there are
    /// fewer bytes than [`DEVICE_STATE_LEN`].
    pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Self, Error> {
        Self::read(&mut Reader::new(bytes), limits)
    }

    pub(crate) fn read(reader: &mut Reader<'_>, limits: &Limits) -> Result<Self, Error> {
        let start = reader.offset();
        let view: &DeviceStateView = transmute_ref!(chunk::<DEVICE_STATE_LEN>(reader)?);
        let flags = view.flags.get();
        packet::prefix(view.magic.get(), view.version.get(), flags, start)?;
        if flags != FLAG_DEVICE_STATE {
            let kind = PacketError::Flags { found: flags, what: "no device state" };
            return Err(Located::new(kind.into(), start + packet::FLAGS_AT));
        }
        let name = layout::name(&view.idstr);
        let Some(idstr) = CountedString::new(name) else {
            return Err(Located::new(WireError::Empty { what: "idstr" }.into(), start + IDSTR_AT));
        };
        let after_name = &view.idstr[name.len() + 1..];
        let residue = after_name.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let payload_len = view.next_packet_size.get();
        let (found, limit) = (payload_len.into(), limits.device_state_packet);
        if payload_len == 0 {
            return Err(Located::new(PacketError::EmptyPayload.into(), start + PAYLOAD_LENGTH_AT));
        }
        if found > limit {
            let kind = WireError::LimitExceeded { what: "next_packet_size", found, limit };
            return Err(Located::new(kind.into(), start + PAYLOAD_LENGTH_AT));
        }
        let last_byte = view.idstr[NAME_LEN - 1];
        if name.len() == NAME_LEN - 1 && last_byte != 0 {
            // A name that fills its field has no room for a NUL and so no residue either.
            let kind = WireError::Unexpected { what: "last byte of idstr", found: last_byte.into(), expected: 0 };
            return Err(Located::new(kind.into(), start + IDSTR_AT + NAME_LEN as u64 - 1));
        }
        Ok(DeviceState {
            idstr,
            instance_id: view.instance_id.get(),
            payload_len,
            name_residue: after_name[..residue].into(),
        })
    }

    /// Appends the packet, without its payload.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if the residue does not fit after the name,
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) if there is no payload.
    pub fn encode(&self, writer: &mut Writer) -> Result<(), Error> {
        let offset = writer.len() as u64;
        let fail = |kind: crate::ErrorKind| Err(Located::new(kind.refused(), offset));
        let name = self.idstr.as_bytes();
        let padding = NAME_LEN - 1 - name.len();
        let Some(zeroes) = padding.checked_sub(self.name_residue.len()) else {
            let found = self.name_residue.len() as u64;
            return fail(WireError::TooLong { what: "residue of idstr", found, max: padding as u64 }.into());
        };
        if self.payload_len == 0 {
            return fail(PacketError::EmptyPayload.into());
        }
        writer.be32(layout::MAGIC).be32(layout::VERSION).be32(FLAG_DEVICE_STATE);
        writer.bytes(name).u8(0).bytes(&self.name_residue).zeroes(zeroes);
        writer.be32(self.instance_id).be32(self.payload_len);
        Ok(())
    }
}

const IDSTR_AT: u64 = offset_of!(DeviceStateView, idstr) as u64;
const PAYLOAD_LENGTH_AT: u64 = offset_of!(DeviceStateView, next_packet_size) as u64;

/// What VFIO puts at the start of each device-state payload (12 bytes; 10.0): its place among the payloads of the
/// device, which may travel on different channels.
///
/// ```
/// use qevm_multifd::VfioDeviceState;
/// use qevm_wire::Writer;
///
/// let mut writer = Writer::new();
/// VfioDeviceState { index: 3, config: true }.encode(&mut writer);
/// assert_eq!(writer.as_bytes(), [0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1]);
/// # Ok::<(), qevm_multifd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VfioDeviceState {
    /// Place among the device's payloads, from 0.
    pub index: u32,
    /// The rest is the device's configuration, and the last payload; otherwise it is data for the device.
    pub config: bool,
}

impl VfioDeviceState {
    /// Length in bytes.
    pub const LEN: usize = 12;
    const VERSION: u32 = 0;
    const CONFIG_STATE: u32 = 1;

    /// Reads the header at the front of a payload.
    ///
    /// # Errors
    /// [`WireError::Unexpected`] for another version, the reserved index `u32::MAX` ([`PacketError::PageCount`] names
    /// it) or unknown flags; [`WireError::Truncated`] if the payload is shorter.
    pub fn decode(payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(payload);
        reader.expect_be32("version of VFIO device state", Self::VERSION)?;
        let at = reader.offset();
        let index = reader.be32()?;
        if index == u32::MAX {
            let max = u64::from(u32::MAX) - 1;
            let kind = PacketError::PageCount { what: "index of VFIO device state", found: index.into(), max };
            return Err(Located::new(kind.into(), at));
        }
        let at = reader.offset();
        match reader.be32()? {
            0 => Ok(VfioDeviceState { index, config: false }),
            Self::CONFIG_STATE => Ok(VfioDeviceState { index, config: true }),
            found => {
                let what = "flags of VFIO device state";
                let kind = WireError::Unexpected { what, found: found.into(), expected: Self::CONFIG_STATE.into() };
                Err(Located::new(kind.into(), at))
            }
        }
    }

    /// Appends the header.
    pub fn encode(self, writer: &mut Writer) {
        writer.be32(Self::VERSION).be32(self.index).be32(if self.config { Self::CONFIG_STATE } else { 0 });
    }
}
