//! The first packet of a channel, and the set of channels of one migration.

use crate::chunk::chunk;
use crate::layout::{self, INIT_LEN, InitView};
use crate::{Error, HandshakeError, Reader, Uuid};
use core::mem::offset_of;
use qevm_wire::{Located, Within, Writer};
use zerocopy::transmute_ref;

/// The first packet of a channel: which channel of which virtual machine this connection is (64 bytes; QEMU 4.0).
///
/// ```
/// use qevm_multifd::{Init, Uuid};
/// use qevm_wire::Writer;
///
/// let mut writer = Writer::new();
/// Init::new(Uuid::default(), 1).encode(&mut writer);
/// assert_eq!(writer.len(), 64);
/// assert_eq!(Init::decode(writer.as_bytes())?.channel, 1);
/// # Ok::<(), qevm_multifd::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Init {
    /// UUID of the source's virtual machine.
    pub uuid: Uuid,
    /// Number of the channel, from 0.
    pub channel: u8,
    /// Zero in every QEMU release so far, and ignored by all of them.
    pub unused: [u8; 39],
}

impl Init {
    /// The first packet of channel number `channel`.
    pub fn new(uuid: Uuid, channel: u8) -> Self {
        Init { uuid, channel, unused: [0; 39] }
    }

    /// Reads the packet from its [`INIT_LEN`] bytes.
    ///
    /// # Errors
    /// [`HandshakeError::Magic`] and [`HandshakeError::Version`];
    /// [`WireError::Truncated`](qevm_wire::WireError::Truncated) if there are fewer bytes.
    pub fn decode(bytes: &[u8]) -> Result<Init, Error> {
        Self::read(&mut Reader::new(bytes))
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Init, Error> {
        let offset = reader.offset();
        // A wrong magic is worth more than the wish for the rest of a packet that will never come.
        if let Ok(magic) = reader.clone().be32() {
            check(magic == layout::MAGIC, HandshakeError::Magic { found: magic }, offset)?;
        }
        let view: &InitView = transmute_ref!(chunk::<INIT_LEN>(reader)?);
        let version = view.version.get();
        let at = offset + offset_of!(InitView, version) as u64;
        check(version == layout::VERSION, HandshakeError::Version { found: version }, at)?;
        Ok(Init { uuid: Uuid(view.uuid), channel: view.channel, unused: view.unused })
    }

    /// Appends the packet.
    pub fn encode(&self, writer: &mut Writer) {
        writer.be32(layout::MAGIC).be32(layout::VERSION).bytes(&self.uuid.0).u8(self.channel).bytes(&self.unused);
    }
}

/// The channels of one migration at the destination: which have arrived, which are missing.
///
/// Connections arrive in any order; a channel is who its first packet says it is.
///
/// ```
/// use qevm_multifd::{ChannelSet, Init, Uuid};
///
/// let mut set = ChannelSet::new(2, Some(Uuid::default()));
/// set.arrived(&Init::new(Uuid::default(), 1))?;
/// assert_eq!(set.missing().collect::<Vec<_>>(), [0]);
/// assert!(set.arrived(&Init::new(Uuid::default(), 1)).is_err()); // a second channel 1
/// # Ok::<(), qevm_multifd::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChannelSet {
    channels: u8,
    uuid: Option<Uuid>,
    arrived: [bool; 255],
}

impl ChannelSet {
    /// A set of `channels` (`multifd-channels`, 1 to 255), none of which has arrived. If `uuid` is given, the source's
    /// must be equal.
    pub fn new(channels: u8, uuid: Option<Uuid>) -> Self {
        ChannelSet { channels, uuid, arrived: [false; 255] }
    }

    /// Takes the first packet of a connection.
    ///
    /// # Errors
    /// [`HandshakeError::ChannelNumber`], [`HandshakeError::DuplicateChannel`] and [`HandshakeError::Uuid`], at the
    /// offset of the field at fault in the packet.
    pub fn arrived(&mut self, init: &Init) -> Result<(), Error> {
        let path = || path(Some(init.channel));
        check_init(init, Some(self.channels), self.uuid, 0).within(path)?;
        let channel = init.channel;
        let slot = &mut self.arrived[usize::from(channel)];
        check(!*slot, HandshakeError::DuplicateChannel { channel }, CHANNEL_AT).within(path)?;
        *slot = true;
        Ok(())
    }

    /// The numbers of the channels that have not arrived.
    pub fn missing(&self) -> impl Iterator<Item = u8> + '_ {
        (0..self.channels).filter(|channel| !self.arrived[usize::from(*channel)])
    }

    /// True if all have arrived.
    pub fn is_complete(&self) -> bool {
        self.missing().next().is_none()
    }
}

const UUID_AT: u64 = 8;
const CHANNEL_AT: u64 = 24;

/// Checks a first packet that starts at `offset` against what this side knows.
pub(crate) fn check_init(init: &Init, channels: Option<u8>, uuid: Option<Uuid>, offset: u64) -> Result<(), Error> {
    if let Some(expected) = uuid {
        check(init.uuid == expected, HandshakeError::Uuid { found: init.uuid, expected }, offset + UUID_AT)?;
    }
    // 255 channels at most, so that number 255 is wrong even where the count is not known.
    let channels = channels.unwrap_or(u8::MAX);
    let kind = HandshakeError::ChannelNumber { found: init.channel, channels };
    check(init.channel < channels, kind, offset + CHANNEL_AT)
}

/// The path of a channel in errors.
pub(crate) fn path(channel: Option<u8>) -> String {
    match channel {
        Some(channel) => format!("multifd channel {channel}"),
        None => "multifd channel".into(),
    }
}

fn check(holds: bool, kind: HandshakeError, offset: u64) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(Located::new(kind.into(), offset)) }
}
