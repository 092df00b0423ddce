//! The decoder of one page channel: bytes in, events out.

use crate::compression::Compression;
use crate::device_state::DeviceState;
use crate::event::{Event, PayloadKind};
use crate::init::{self, Init};
use crate::layout::{self, FLAG_DEVICE_STATE, PREFIX_LEN};
use crate::packet::{self, RamPacket};
use crate::{Error, ErrorKind, PacketError, Reader, Uuid};
use qevm_wire::{Cursor, Decode, Limits, Located, NextStep, PageGeometry, Step, Within};

/// What a channel's decoder has to know from elsewhere. The defaults read a recorded channel of any source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelOptions {
    /// What the peer may make the decoder announce.
    pub limits: Limits,
    /// Target page size; gives the length of RAM packets.
    pub pages: PageGeometry,
    /// `multifd-channels` of this side; the channel's number must be below it.
    pub channels: Option<u8>,
    /// UUID of this virtual machine; the source's must be equal.
    pub uuid: Option<Uuid>,
    /// `multifd-compression` of this side, which every packet with pages must use. Without it, the first such packet
    /// decides.
    pub compression: Option<Compression>,
    /// Devices may send their state on this channel (QEMU 10.0).
    pub device_state: bool,
    /// A TLS session must end in a bye (`multifd-clean-tls-termination`; 10.0, off for machine types up to 9.2).
    pub clean_tls_termination: bool,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        ChannelOptions {
            limits: Limits::default(),
            pages: PageGeometry::X86,
            channels: None,
            uuid: None,
            compression: None,
            device_state: true,
            clean_tls_termination: true,
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ending {
    /// It was closed, and there was no TLS session on it; or a recording is over.
    Closed,
    /// The TLS session said bye.
    TlsBye,
    /// It was closed without a bye of its TLS session.
    TlsCut,
}

/// Reads one page channel: [`next`](Decode::next) is shown bytes and gives the event at their front.
///
/// The decoder holds no bytes of the channel. After an event with payload the next bytes are the caller's, which moves
/// them where they belong and reports them with [`skip_payload`](Decode::skip_payload). With method `none` they
/// are the content of [`RamPacket::normal_runs`], and can be read from the socket straight into guest memory.
///
/// After an error the decoder stays where it was and gives the same error again.
///
/// ```
/// use qevm_multifd::{ChannelDecoder, ChannelEncoder, ChannelOptions, EncoderOptions, Event, Init, Pages, Uuid};
/// use qevm_wire::{CountedString, Decode, Step, Writer};
///
/// let mut encoder = ChannelEncoder::new(EncoderOptions::default());
/// let mut sent = Writer::new();
/// encoder.init(&Init::new(Uuid::default(), 0), &mut sent)?;
/// let block = CountedString::new("pc.ram").unwrap();
/// encoder.pages(&Pages { block: &block, normal: &[0x5000], zero: &[0x8000, 0x9000], packet_num: 1 }, 4096, &mut sent)?;
/// sent.bytes(&[0xaa; 4096]);
///
/// let (mut input, mut memory) = (sent.as_bytes(), vec![0x55; 0x10000]);
/// let mut decoder = ChannelDecoder::new(ChannelOptions::default());
/// decoder.end_of_input();
/// loop {
///     match decoder.next(input)? {
///         Step::Event { consumed, event } => {
///             let (_, mut payload) = input.split_at(consumed);
///             if let Event::Ram(packet) = &event {
///                 for run in packet.zero_runs() {
///                     memory[run.offset as usize..][..run.len as usize].fill(0);
///                 }
///                 for run in packet.normal_runs() {
///                     let data = payload.split_off(..run.len as usize).unwrap();
///                     memory[run.offset as usize..][..data.len()].copy_from_slice(data);
///                 }
///             }
///             decoder.skip_payload(event.payload_len())?;
///             input = &input[consumed + event.payload_len() as usize..];
///         }
///         Step::Payload { .. } | Step::NeedMore { .. } => unreachable!("all input is here and payload was skipped"),
///         Step::End => break,
///     }
/// }
/// assert_eq!(memory[0x5000..0x6000], [0xaa; 4096]);
/// assert_eq!(memory[0x8000..0xa000], [0; 8192]);
/// # Ok::<(), qevm_multifd::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChannelDecoder {
    options: ChannelOptions,
    channel: Option<u8>,
    compression: Option<Compression>,
    cursor: Cursor<PayloadKind>,
    /// Number of the next packet on this channel, from 0, for paths.
    packet: u64,
    /// Where the last packet started, for errors about it.
    last_packet: u64,
    ending: Option<Ending>,
}

impl ChannelDecoder {
    /// A decoder for a connection from its first byte.
    pub fn new(options: ChannelOptions) -> Self {
        ChannelDecoder {
            channel: None,
            compression: options.compression,
            cursor: Cursor::default(),
            packet: 0,
            last_packet: 0,
            ending: None,
            options,
        }
    }

    /// Reports how the connection ended, and that no byte follows those that the next call to [`next`](Decode::next)
    /// shows. [`end_of_input`](Decode::end_of_input) is this with [`Ending::Closed`], unless it is known better.
    pub fn ended(&mut self, ending: Ending) {
        self.ending = Some(ending);
        self.cursor.end();
    }

    /// Checks the pages of the last packet against the block that it names: `used_length` is the block's length in
    /// bytes, `None` if the block list of the main channel has no such block. The block list may arrive later than the
    /// channel's first packet, but never later than its first pages.
    ///
    /// # Errors
    /// [`PacketError::UnknownBlock`] and [`PacketError::Outside`].
    pub fn check_block(&self, packet: &RamPacket<'_>, used_length: Option<u64>) -> Result<(), Error> {
        let (Some(name), start) = (packet.block(), self.last_packet) else { return Ok(()) };
        let wrong = match used_length {
            None => Some((PacketError::UnknownBlock { name: name.clone() }, start + packet::BLOCK_AT)),
            Some(used_length) => packet.outside(used_length).map(|(index, found)| {
                (PacketError::Outside { index, found, used_length }, packet::slot_at(start, index))
            }),
        };
        match wrong {
            None => Ok(()),
            Some((kind, offset)) => {
                let error = Located::new(kind.into(), offset).within(format!("RAM block '{name}'"));
                Err(self.locate(error, self.packet.saturating_sub(1)))
            }
        }
    }

    /// Puts the channel and the last packet around an error that came up with its payload.
    pub fn fail(&self, kind: impl Into<ErrorKind>) -> Error {
        self.locate(Located::new(kind.into(), self.cursor.offset()), self.packet.saturating_sub(1))
    }

    /// Number of the channel; `None` before its first packet.
    pub fn channel(&self) -> Option<u8> {
        self.channel
    }

    /// The compression method: as configured, or else as the first packet with pages told.
    pub fn compression(&self) -> Option<Compression> {
        self.compression
    }

    /// Target page size of the channel.
    pub fn page_geometry(&self) -> PageGeometry {
        self.options.pages
    }

    fn item<'a>(&self, reader: &mut Reader<'a>) -> Result<Event<'a>, Error> {
        let (options, start) = (&self.options, reader.offset());
        if self.channel.is_none() {
            let init = Init::read(reader)?;
            init::check_init(&init, options.channels, options.uuid, start).within(|| init::path(Some(init.channel)))?;
            return Ok(Event::Init(init));
        }
        // The first words tell how long the packet is, and are wrong first if no packet is here.
        let mut ahead = Reader::at(reader.rest(), start);
        let mut words: Reader<'_> = ahead.sub(PREFIX_LEN as u64)?;
        let (magic, version, flags) = (words.be32()?, words.be32()?, words.be32()?);
        packet::prefix(magic, version, flags, start)?;
        if flags == FLAG_DEVICE_STATE {
            if !options.device_state {
                return Err(Located::new(PacketError::DeviceStateOff.into(), start + packet::FLAGS_AT));
            }
            return Ok(Event::DeviceState(DeviceState::read(reader, &options.limits)?));
        }
        let packet = RamPacket::read(reader, options.pages, &options.limits)?;
        match self.compression {
            Some(expected) if packet.has_pages() && packet.compression() != expected => {
                let kind = PacketError::Method { found: packet.compression(), expected };
                Err(Located::new(kind.into(), start + packet::FLAGS_AT))
            }
            _ => Ok(Event::Ram(packet)),
        }
    }

    fn end<'a>(&self) -> Result<NextStep<'a, Self>, Error> {
        if self.ending == Some(Ending::TlsCut) && self.options.clean_tls_termination {
            return Err(
                Located::new(PacketError::NoTlsBye.into(), self.cursor.offset()).within(init::path(self.channel))
            );
        }
        Ok(Step::End)
    }

    fn locate(&self, error: Error, packet: u64) -> Error {
        let error = match self.channel {
            Some(_) => error.within(format!("packet {packet}")),
            // The error of a first packet that could be read has the number in its path already.
            None if !error.path.is_empty() => return error,
            None => error.within("init packet"),
        };
        error.within(init::path(self.channel))
    }
}

impl Decode for ChannelDecoder {
    type Event<'a> = Event<'a>;
    type Payload = PayloadKind;
    type Kind = ErrorKind;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<NextStep<'a, Self>, Error> {
        let at_end = self.cursor.has_ended();
        if let Some(step) = self.cursor.pending(input.len() as u64, at_end) {
            return step.map_err(|error| self.locate(error, self.packet.saturating_sub(1)));
        }
        if input.is_empty() && self.channel.is_some() && at_end {
            return self.end();
        }
        let mut reader = Reader::at(input, self.cursor.offset());
        match self.item(&mut reader) {
            Ok(event) => {
                self.last_packet = self.cursor.offset();
                self.cursor.move_to(reader.offset());
                self.cursor.expect(event.payload_len(), event.payload_kind());
                match &event {
                    Event::Init(init) => self.channel = Some(init.channel),
                    Event::Ram(packet) if packet.has_pages() => self.compression = Some(packet.compression()),
                    _ => {}
                }
                self.packet += u64::from(!matches!(event, Event::Init(_)));
                Ok(Step::Event { consumed: reader.position(), event })
            }
            Err(error) => match self.cursor.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(self.locate(error, self.packet)),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.cursor.payload()
    }

    fn payload_of(&self) -> Option<&PayloadKind> {
        self.cursor.payload_of()
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        self.cursor.skip(count).map_err(|error| self.locate(error, self.packet.saturating_sub(1)))
    }

    fn end_of_input(&mut self) {
        self.ended(self.ending.unwrap_or(Ending::Closed));
    }

    fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}

/// True if a connection whose first bytes are these is a page channel, and not the main channel (`QEVM`) or the preempt
/// channel (a RAM record). `None` if fewer than four bytes are here.
///
/// ```
/// assert_eq!(qevm_multifd::is_page_channel(&[0x11, 0x22, 0x33, 0x44]), Some(true));
/// assert_eq!(qevm_multifd::is_page_channel(b"QEVM"), Some(false));
/// ```
pub fn is_page_channel(first_bytes: &[u8]) -> Option<bool> {
    first_bytes.first_chunk().map(|magic| u32::from_be_bytes(*magic) == layout::MAGIC)
}
