//! The messages of the return path.

use crate::{Error, ErrorKind, MessageError, Reader};
use alloc::vec::Vec;
use core::fmt;
use qevm_wire::{CountedString, Limits, Located, WireError, Writer};

/// Type and length in front of each message: 2 + 2 bytes.
pub const HEADER_LEN: usize = 4;
/// The longest a message can say it is, in bytes, without its header.
pub const MAX_LEN: u16 = 512;
/// Ends the bitmap after RECV_BITMAP (QEMU 3.0).
pub const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;
/// The only value of RESUME_ACK (QEMU 3.0).
pub const RESUME_ACK_VALUE: u32 = 1;

/// The type of a message, with QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MessageType {
    /// SHUT, 1 (QEMU 2.5).
    Shut,
    /// PONG, 2 (2.5).
    Pong,
    /// REQ_PAGES_ID, 3 (2.5).
    ReqPagesId,
    /// REQ_PAGES, 4 (2.5).
    ReqPages,
    /// RECV_BITMAP, 5 (3.0).
    RecvBitmap,
    /// RESUME_ACK, 6 (3.0).
    ResumeAck,
    /// SWITCHOVER_ACK, 7 (8.1).
    SwitchoverAck,
}

impl MessageType {
    /// Every type, from 1.
    pub const ALL: [MessageType; 7] = [
        MessageType::Shut,
        MessageType::Pong,
        MessageType::ReqPagesId,
        MessageType::ReqPages,
        MessageType::RecvBitmap,
        MessageType::ResumeAck,
        MessageType::SwitchoverAck,
    ];

    /// The number on the wire.
    pub fn number(self) -> u16 {
        self as u16 + 1
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            MessageType::Shut => "SHUT",
            MessageType::Pong => "PONG",
            MessageType::ReqPagesId => "REQ_PAGES_ID",
            MessageType::ReqPages => "REQ_PAGES",
            MessageType::RecvBitmap => "RECV_BITMAP",
            MessageType::ResumeAck => "RESUME_ACK",
            MessageType::SwitchoverAck => "SWITCHOVER_ACK",
        }
    }

    /// The shortest and longest a message can be, in bytes, without its header.
    pub fn lengths(self) -> (u16, u16) {
        const NAME: u16 = CountedString::MAX_LEN as u16;
        match self {
            MessageType::Shut | MessageType::Pong | MessageType::ResumeAck => (4, 4),
            // Offset, length, and the length byte of the name, which is not empty.
            MessageType::ReqPagesId => (13 + 1, 13 + NAME),
            MessageType::ReqPages => (12, 12),
            MessageType::RecvBitmap => (1 + 1, 1 + NAME),
            MessageType::SwitchoverAck => (0, 0),
        }
    }

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One message of the return path.
///
/// ```
/// use qevm_returnpath::Message;
///
/// assert_eq!(Message::Pong { value: 1 }.to_bytes(), [0, 2, 0, 4, 0, 0, 0, 1]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// The destination is done. The last message.
    Shut {
        /// 0 if the destination has loaded everything, anything else if it failed.
        status: u32,
    },
    /// The answer to a PING.
    Pong {
        /// The value of the PING.
        value: u32,
    },
    /// The destination's guest waits for pages (postcopy). REQ_PAGES_ID with a block, REQ_PAGES without.
    ReqPages {
        /// The RAM block; `None` for that of the request before.
        block: Option<CountedString>,
        /// Offset in the block, in bytes; a multiple of the host page size.
        start: u64,
        /// Length in bytes; a multiple of the host page size.
        len: u32,
    },
    /// Which pages of a block the destination has (postcopy recovery). `len` bytes of bitmap and their end mark follow.
    RecvBitmap {
        /// The RAM block.
        block: CountedString,
        /// Length of the bitmap in bytes.
        len: u64,
    },
    /// The destination is ready to go on with a broken postcopy.
    ResumeAck,
    /// A device of the destination, or the destination as a whole, agrees to the switchover.
    SwitchoverAck,
}

impl Message {
    /// The type.
    pub fn message_type(&self) -> MessageType {
        match self {
            Message::Shut { .. } => MessageType::Shut,
            Message::Pong { .. } => MessageType::Pong,
            Message::ReqPages { block: Some(_), .. } => MessageType::ReqPagesId,
            Message::ReqPages { block: None, .. } => MessageType::ReqPages,
            Message::RecvBitmap { .. } => MessageType::RecvBitmap,
            Message::ResumeAck => MessageType::ResumeAck,
            Message::SwitchoverAck => MessageType::SwitchoverAck,
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>, limits: &Limits) -> Result<Message, Error> {
        let (message_type, mut body) = header(reader)?;
        let read = Self::body(message_type, &mut body, reader, limits);
        read.map_err(|error| error.within(message_type.name()))
    }

    fn body(
        message_type: MessageType,
        body: &mut Reader<'_>,
        after: &mut Reader<'_>,
        limits: &Limits,
    ) -> Result<Message, Error> {
        let message = match message_type {
            MessageType::Shut => Message::Shut { status: body.be32()? },
            MessageType::Pong => Message::Pong { value: body.be32()? },
            MessageType::ReqPages => Message::ReqPages { block: None, start: body.be64()?, len: body.be32()? },
            MessageType::ReqPagesId => {
                let (start, len) = (body.be64()?, body.be32()?);
                Message::ReqPages { block: Some(name(message_type, body)?), start, len }
            }
            MessageType::RecvBitmap => {
                let block = name(message_type, body)?;
                // The message's own length ends here, but its bitmap follows.
                let at = after.clone();
                let len = after.be64()?;
                at.within_limit("length of the received bitmap", len, limits.received_bitmap)?;
                Message::RecvBitmap { block, len }
            }
            MessageType::ResumeAck => {
                body.expect_be32("value of RESUME_ACK", RESUME_ACK_VALUE)?;
                Message::ResumeAck
            }
            MessageType::SwitchoverAck => Message::SwitchoverAck,
        };
        Ok(message)
    }

    /// The message by itself, to be sent at once.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        self.encode(&mut writer);
        writer.into_bytes()
    }

    /// Appends the message; after RECV_BITMAP the caller writes the bitmap and
    /// [`Encoder::bitmap_end`](crate::Encoder::bitmap_end).
    pub fn encode(&self, writer: &mut Writer) {
        let message_type = self.message_type();
        let variable = match self {
            Message::ReqPages { block: Some(block), .. } => 12 + block.wire_len() as u16,
            Message::RecvBitmap { block, .. } => block.wire_len() as u16,
            _ => message_type.lengths().0,
        };
        writer.be16(message_type.number()).be16(variable);
        match self {
            Message::Shut { status: value } | Message::Pong { value } => drop(writer.be32(*value)),
            Message::ReqPages { block, start, len } => {
                writer.be64(*start).be32(*len);
                if let Some(block) = block {
                    writer.counted_string(block);
                }
            }
            Message::RecvBitmap { block, len } => drop(writer.counted_string(block).be64(*len)),
            Message::ResumeAck => drop(writer.be32(RESUME_ACK_VALUE)),
            Message::SwitchoverAck => {}
        }
    }
}

/// Reads type and length, and gives a reader that is bounded to the message.
fn header<'a>(reader: &mut Reader<'a>) -> Result<(MessageType, Reader<'a>), Error> {
    let start = reader.offset();
    let number = reader.be16()?;
    let Some(message_type) = MessageType::from_number(number) else {
        return Err(Located::new(MessageError::Type { found: number }.into(), start));
    };
    let at = reader.offset();
    let found = reader.be16()?;
    let (min, max) = message_type.lengths();
    if (min..=max).contains(&found) {
        return Ok((message_type, reader.sub(found.into())?));
    }
    let kind = if min == max {
        MessageError::Length { message: message_type, found, expected: min }
    } else {
        MessageError::LengthRange { message: message_type, found, min, max }
    };
    Err(Located::<ErrorKind>::new(kind.into(), at).within(message_type.name()))
}

/// Reads the name that ends a message, and must fill it.
fn name(message: MessageType, body: &mut Reader<'_>) -> Result<CountedString, Error> {
    let length_at = body.offset();
    let before = body.position() as u16;
    let available = body.remaining() as u16;
    let found = before + available;
    let expected = before + 1 + body.peek().map_or(0, u16::from);
    if expected == before + 1 {
        return Err(body.fail(WireError::Empty { what: "RAM block name" }));
    }
    if found != expected {
        return Err(Located::new(MessageError::Length { message, found, expected }.into(), length_at));
    }
    body.counted_string("RAM block name")
}
