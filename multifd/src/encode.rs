//! The encoder of one page channel: events in, bytes out. The mirror of [`decode`](crate::decode).

use crate::compression::Compression;
use crate::device_state::DeviceState;
use crate::event::Event;
use crate::init::{self, Init};
use crate::layout::{self, FLAG_SYNC, NAME_LEN};
use crate::packet::{self, PacketLayout};
use crate::{Error, ErrorKind, HandshakeError, PacketError};
use qevm_wire::{CountedString, Located, PageGeometry, WireError, Writer};

/// How a channel's packets are to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderOptions {
    /// The layout that the destination's release reads.
    pub layout: PacketLayout,
    /// Target page size; gives the length of RAM packets.
    pub pages: PageGeometry,
    /// `multifd-compression`, equal on both sides.
    pub compression: Compression,
}

impl Default for EncoderOptions {
    /// The layout of QEMU 9.0 and later, pages of 4096 bytes, no compression.
    fn default() -> Self {
        EncoderOptions { layout: PacketLayout::ZeroPages, pages: PageGeometry::X86, compression: Compression::None }
    }
}

/// Pages of one RAM block for one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// Name of the RAM block.
    pub block: &'a CountedString,
    /// Offsets in bytes of the pages whose data is sent, in the order of the payload.
    pub normal: &'a [u64],
    /// Offsets in bytes of the pages that are to be zero (QEMU 9.0).
    pub zero: &'a [u64],
    /// Number of the packet among those of all channels.
    pub packet_num: u64,
}

/// Writes the packets of one page channel. Payload is not the encoder's: the caller writes it after the packet.
///
/// What no destination would take is refused, and all errors are of [`Fault::Misuse`](qevm_wire::Fault).
///
/// ```
/// use qevm_multifd::{ChannelEncoder, EncoderOptions, Init, Uuid};
/// use qevm_wire::Writer;
///
/// let mut encoder = ChannelEncoder::new(EncoderOptions::default());
/// let mut writer = Writer::new();
/// encoder.init(&Init::new(Uuid::default(), 0), &mut writer)?;
/// encoder.sync(0, &mut writer)?;
/// assert_eq!(writer.len(), 64 + 1344);
/// # Ok::<(), qevm_multifd::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChannelEncoder {
    options: EncoderOptions,
    channel: Option<u8>,
}

impl ChannelEncoder {
    /// An encoder for a connection from its first byte.
    pub fn new(options: EncoderOptions) -> Self {
        ChannelEncoder { options, channel: None }
    }

    /// Appends the first packet.
    ///
    /// # Errors
    /// [`HandshakeError::Order`] if it was written before.
    pub fn init(&mut self, init: &Init, writer: &mut Writer) -> Result<(), Error> {
        if self.channel.is_some() {
            let kind = HandshakeError::Order { what: "init packet", place: "was written before" };
            return Err(self.fail(kind, writer));
        }
        init.encode(writer);
        self.channel = Some(init.channel);
        Ok(())
    }

    /// Appends a packet with pages, after which `payload_len` bytes of page data must follow: with method `none` as
    /// many as the normal pages are long, otherwise as many as the compressor gave; none without normal pages.
    ///
    /// # Errors
    /// [`PacketError::NoZeroPages`] for zero pages in the layout without them; [`ErrorKind::Refused`] for more pages
    /// than a packet has room for, offsets that are no multiples of the page size, or a payload that does not fit the
    /// pages. Nothing is appended then.
    pub fn pages(&mut self, pages: &Pages<'_>, payload_len: u64, writer: &mut Writer) -> Result<(), Error> {
        self.started("a packet", writer)?;
        self.check(pages, payload_len).map_err(|kind| self.fail(kind, writer))?;
        let (normal, zero) = (pages.normal.len() as u32, pages.zero.len() as u32);
        let slots = packet::slots(self.options.pages);
        writer.be32(layout::MAGIC).be32(layout::VERSION).be32(self.options.compression.flag());
        writer.be32(slots).be32(normal).be32(payload_len as u32).be64(pages.packet_num).be32(zero).zeroes(28);
        writer.bytes(pages.block.as_bytes()).zeroes(NAME_LEN - pages.block.as_bytes().len());
        for offset in pages.normal.iter().chain(pages.zero) {
            writer.be64(*offset);
        }
        writer.zeroes(8 * (slots - normal - zero) as usize);
        Ok(())
    }

    /// Appends a packet without pages at which the channels synchronise.
    ///
    /// # Errors
    /// [`HandshakeError::Order`] before the first packet.
    pub fn sync(&mut self, packet_num: u64, writer: &mut Writer) -> Result<(), Error> {
        self.started("a SYNC packet", writer)?;
        let alloc = match self.options.layout {
            PacketLayout::Pages => packet::slots(self.options.pages),
            PacketLayout::ZeroPages => 0,
        };
        writer.be32(layout::MAGIC).be32(layout::VERSION).be32(FLAG_SYNC).be32(alloc);
        writer.be32(0).be32(0).be64(packet_num).zeroes(packet::packet_len(self.options.pages) - 32);
        Ok(())
    }

    /// Appends a device-state packet, after which its payload must follow.
    ///
    /// # Errors
    /// As [`DeviceState::encode`]; [`ErrorKind::Refused`] with a compression method or in the layout before 9.0;
    /// [`HandshakeError::Order`] before the first packet.
    pub fn device_state(&mut self, packet: &DeviceState, writer: &mut Writer) -> Result<(), Error> {
        self.started("device state", writer)?;
        if self.options.compression != Compression::None || self.options.layout == PacketLayout::Pages {
            return Err(self.fail(PacketError::DeviceStateOff, writer));
        }
        packet.encode(writer).map_err(|error| error.within(init::path(self.channel)))
    }

    /// Appends what a [`ChannelDecoder`](crate::ChannelDecoder) gave, byte for byte as it was read, without its
    /// payload.
    ///
    /// # Errors
    /// [`HandshakeError::Order`] if the first packet is missing or repeated; as [`DeviceState::encode`].
    pub fn event(&mut self, event: &Event<'_>, writer: &mut Writer) -> Result<(), Error> {
        match event {
            Event::Init(init) => return self.init(init, writer),
            Event::Ram(packet) => {
                self.started("a packet", writer)?;
                packet.encode(writer);
            }
            Event::DeviceState(packet) => {
                self.started("device state", writer)?;
                packet.encode(writer)?;
            }
        }
        Ok(())
    }

    fn started(&self, what: &'static str, writer: &Writer) -> Result<(), Error> {
        match self.channel {
            Some(_) => Ok(()),
            None => Err(self.fail(HandshakeError::Order { what, place: "comes before the init packet" }, writer)),
        }
    }

    fn check(&self, pages: &Pages<'_>, payload_len: u64) -> Result<(), ErrorKind> {
        let geometry = self.options.pages;
        let (max, normal, zero) = (packet::slots(geometry), pages.normal.len(), pages.zero.len());
        if normal.saturating_add(zero) > max as usize {
            let found = normal.saturating_add(zero) as u64;
            return Err(PacketError::PageCount { what: "number of pages", found, max: max.into() }.into());
        }
        if zero > 0 && self.options.layout == PacketLayout::Pages {
            return Err(PacketError::NoZeroPages { found: zero }.into());
        }
        for (index, found) in (0..).zip(pages.normal.iter().chain(pages.zero).copied()) {
            if geometry.count(found).is_none() {
                return Err(PacketError::Unaligned { index, found, page_size: geometry.size() }.into());
            }
        }
        let raw = (normal as u64) << geometry.bits();
        let legal = match self.options.compression {
            _ if normal == 0 => payload_len == 0,
            Compression::None => payload_len == raw,
            _ if payload_len == 0 => return Err(PacketError::EmptyPayload.into()),
            _ if payload_len > u32::MAX.into() => {
                let max = u32::MAX.into();
                return Err(WireError::TooLong { what: "payload", found: payload_len, max }.into());
            }
            _ => true,
        };
        if legal {
            return Ok(());
        }
        Err(PacketError::PayloadLength { found: payload_len, expected: raw, pages: normal as u32 }.into())
    }

    fn fail(&self, kind: impl Into<ErrorKind>, writer: &Writer) -> Error {
        Located::new(kind.into().refused(), writer.len() as u64).within(init::path(self.channel))
    }
}
