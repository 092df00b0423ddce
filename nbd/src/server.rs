//! What a server sends: its first words, answers to options, then replies to requests.

use crate::number::{CHUNK_MAGIC, MAGIC, MAX_OPTION, OPTION_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_MAGIC, chunk};
use crate::{Error, ErrorKind, NbdError, Reader};
use qevm_wire::{Cursor, Decode, Located, Step, WireError, Writer};

/// One item of what a server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerEvent<'a> {
    /// The first words of a newstyle server: flags of [`handshake`](crate::number::handshake).
    Hello(u16),
    /// An answer to an option.
    OptionReply {
        /// The option.
        option: u32,
        /// The answer; see [`reply`](crate::number::reply).
        reply: u32,
        /// Its data; of an error, a text.
        data: &'a [u8],
    },
    /// A simple reply. To a read that did not fail the bytes are payload.
    Simple {
        /// 0, or why the request failed; see [`errno`](crate::number::errno).
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// A chunk of a structured reply.
    Chunk(Chunk<'a>),
}

/// A chunk of a structured reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// It is the reply's last one.
    pub done: bool,
    /// The request's.
    pub cookie: u64,
    /// What it says.
    pub content: Content<'a>,
}

/// What a chunk says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content<'a> {
    /// Nothing.
    None,
    /// The bytes from `offset` on, which are payload.
    Data {
        /// First byte, in the export.
        offset: u64,
        /// How many.
        len: u32,
    },
    /// Zeroes.
    Hole {
        /// First byte, in the export.
        offset: u64,
        /// How many.
        len: u32,
    },
    /// The request has failed.
    Error {
        /// Why; see [`errno`](crate::number::errno).
        error: u32,
        /// The same for people.
        message: &'a [u8],
        /// Where, if that is told.
        offset: Option<u64>,
    },
}

impl ServerEvent<'_> {
    /// Appends it, without its payload.
    pub fn encode(&self, writer: &mut Writer) {
        match self {
            ServerEvent::Hello(flags) => drop(writer.be64(MAGIC).be64(OPTION_MAGIC).be16(*flags)),
            ServerEvent::OptionReply { option, reply, data } => {
                writer.be64(OPTION_REPLY_MAGIC).be32(*option).be32(*reply).be32(data.len() as u32).bytes(data);
            }
            ServerEvent::Simple { error, cookie } => drop(writer.be32(SIMPLE_MAGIC).be32(*error).be64(*cookie)),
            ServerEvent::Chunk(Chunk { done, cookie, content }) => {
                let (kind, len) = content.kind_and_len();
                writer.be32(CHUNK_MAGIC).be16(if *done { chunk::DONE } else { 0 }).be16(kind).be64(*cookie).be32(len);
                match content {
                    Content::None => {}
                    Content::Data { offset, .. } => drop(writer.be64(*offset)),
                    Content::Hole { offset, len } => drop(writer.be64(*offset).be32(*len)),
                    Content::Error { error, message, offset } => {
                        writer.be32(*error).be16(message.len() as u16).bytes(message);
                        if let Some(offset) = offset {
                            writer.be64(*offset);
                        }
                    }
                }
            }
        }
    }
}

impl Content<'_> {
    fn kind_and_len(&self) -> (u16, u32) {
        match self {
            Content::None => (chunk::NONE, 0),
            Content::Data { len, .. } => (chunk::OFFSET_DATA, len.saturating_add(8)),
            Content::Hole { .. } => (chunk::OFFSET_HOLE, 12),
            Content::Error { message, offset: None, .. } => (chunk::ERROR, 6 + message.len() as u32),
            Content::Error { message, .. } => (chunk::ERROR_OFFSET, 14 + message.len() as u32),
        }
    }
}

/// Reads what a server sends.
///
/// Of the replies it knows the one request that is under way, which the client [announces](ServerDecoder::expect).
///
/// ```
/// use qevm_nbd::{ServerDecoder, ServerEvent, number::handshake};
/// use qevm_wire::{Decode, Step};
///
/// let mut decoder = ServerDecoder::default();
/// let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
/// assert_eq!(decoder.next(b"NBDMAGICIHAVEOPT\0\x03")?, Step::Event { consumed: 18, event: ServerEvent::Hello(flags) });
/// # Ok::<(), qevm_nbd::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ServerDecoder {
    state: State,
    cursor: Cursor,
    expected: Expected,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Hello,
    Options,
    Replies,
}

/// A request that reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Expected {
    cookie: u64,
    offset: u64,
    len: u32,
}

impl ServerDecoder {
    /// The server has agreed to an option that ends the handshake: replies follow.
    pub fn begin(&mut self) {
        self.state = State::Replies;
    }

    /// The replies from here on are to this request, which reads `len` bytes from `offset` on.
    pub fn expect(&mut self, cookie: u64, offset: u64, len: u32) {
        self.expected = Expected { cookie, offset, len };
    }

    fn item<'a>(&self, reader: &mut Reader<'a>) -> Result<ServerEvent<'a>, Error> {
        let at = reader.clone();
        match self.state {
            State::Hello => {
                expect_be64(reader, MAGIC)?;
                // An oldstyle server has another one.
                expect_be64(reader, OPTION_MAGIC)?;
                Ok(ServerEvent::Hello(reader.be16()?))
            }
            State::Options => {
                expect_be64(reader, OPTION_REPLY_MAGIC)?;
                let (option, reply, len) = (reader.be32()?, reader.be32()?, reader.be32()?);
                reader.within_limit("length of an option's reply", len.into(), MAX_OPTION.into())?;
                Ok(ServerEvent::OptionReply { option, reply, data: reader.take(len.into())? })
            }
            State::Replies => match reader.be32()? {
                SIMPLE_MAGIC => {
                    let error = reader.be32()?;
                    let at = reader.clone();
                    let cookie = reader.be64()?;
                    self.check_cookie(&at, cookie)?;
                    Ok(ServerEvent::Simple { error, cookie })
                }
                CHUNK_MAGIC => self.chunk(reader).map(ServerEvent::Chunk),
                found => {
                    let (what, found, expected) = ("magic", found.into(), CHUNK_MAGIC.into());
                    Err(at.fail(WireError::Unexpected { what, found, expected }))
                }
            },
        }
    }

    fn chunk<'a>(&self, reader: &mut Reader<'a>) -> Result<Chunk<'a>, Error> {
        let at = reader.clone();
        let flags = reader.be16()?;
        if flags & !chunk::DONE != 0 {
            return Err(at.fail(NbdError::ChunkFlags { found: flags }));
        }
        let at_type = reader.clone();
        let kind = reader.be16()?;
        let at_cookie = reader.clone();
        let cookie = reader.be64()?;
        self.check_cookie(&at_cookie, cookie)?;
        let at_len = reader.clone();
        let found = reader.be32()?;
        let length = |expected| Err(at_len.fail(NbdError::ChunkLength { chunk: kind, found, expected }));
        let content = match kind {
            chunk::NONE if found != 0 => return length(0),
            chunk::NONE => Content::None,
            chunk::OFFSET_DATA => match found.checked_sub(8) {
                None | Some(0) => return length(9),
                Some(len) => {
                    let at = reader.clone();
                    let offset = reader.be64()?;
                    self.check_range(&at, offset, len)?;
                    Content::Data { offset, len }
                }
            },
            chunk::OFFSET_HOLE if found != 12 => return length(12),
            chunk::OFFSET_HOLE => {
                let at = reader.clone();
                let (offset, len) = (reader.be64()?, reader.be32()?);
                self.check_range(&at, offset, len)?;
                Content::Hole { offset, len }
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                let offset_len = if kind == chunk::ERROR { 0 } else { 8 };
                reader.within_limit("length of an error", found.into(), MAX_OPTION.into())?;
                if found < 6 + offset_len {
                    return length(6 + offset_len);
                }
                let error = reader.be32()?;
                let message_len = u32::from(reader.be16()?);
                if found != 6 + message_len + offset_len {
                    return length(6 + message_len + offset_len);
                }
                let message = reader.take(message_len.into())?;
                let offset = if kind == chunk::ERROR { None } else { Some(reader.be64()?) };
                Content::Error { error, message, offset }
            }
            found => return Err(at_type.fail(NbdError::ChunkType { found })),
        };
        Ok(Chunk { done: flags & chunk::DONE != 0, cookie, content })
    }

    fn check_cookie(&self, at: &Reader<'_>, found: u64) -> Result<(), Error> {
        let expected = self.expected.cookie;
        if found == expected { Ok(()) } else { Err(at.fail(NbdError::Cookie { found, expected })) }
    }

    fn check_range(&self, at: &Reader<'_>, found: u64, len: u32) -> Result<(), Error> {
        let (start, end) = (self.expected.offset, self.expected.offset.saturating_add(self.expected.len.into()));
        match found.checked_add(len.into()) {
            Some(found_end) if found >= start && found_end <= end => Ok(()),
            found_end => {
                let found_end = found_end.unwrap_or(u64::MAX);
                Err(at.fail(NbdError::Range { found, found_end, start, end }))
            }
        }
    }

    fn locate(&self, error: Error) -> Error {
        error.within(match self.state {
            State::Hello => "first words of a server",
            State::Options => "reply to an option",
            State::Replies => "reply to a request",
        })
    }
}

fn expect_be64(reader: &mut Reader<'_>, expected: u64) -> Result<(), Error> {
    let at = reader.clone();
    match reader.be64()? {
        found if found == expected => Ok(()),
        found => Err(at.fail(WireError::Unexpected { what: "magic", found, expected })),
    }
}

impl Decode for ServerDecoder {
    type Event<'a> = ServerEvent<'a>;
    /// Bytes of the export.
    type Payload = ();
    type Kind = ErrorKind;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<ServerEvent<'a>>, Error> {
        let at_end = self.cursor.has_ended();
        if let Some(step) = self.cursor.pending(input.len() as u64, at_end) {
            return step.map_err(|error: Located<ErrorKind>| self.locate(error));
        }
        if input.is_empty() && at_end {
            return Ok(Step::End);
        }
        let mut reader = Reader::at(input, self.cursor.offset());
        match self.item(&mut reader) {
            Ok(event) => {
                self.cursor.move_to(reader.offset());
                match event {
                    ServerEvent::Hello(_) => self.state = State::Options,
                    ServerEvent::Simple { error: 0, .. } => self.cursor.expect(self.expected.len.into(), ()),
                    ServerEvent::Chunk(Chunk { content: Content::Data { len, .. }, .. }) => {
                        self.cursor.expect(len.into(), ());
                    }
                    _ => {}
                }
                Ok(Step::Event { consumed: reader.position(), event })
            }
            Err(error) => match self.cursor.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(self.locate(error)),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.cursor.payload()
    }

    fn payload_of(&self) -> Option<&()> {
        self.cursor.payload_of()
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        self.cursor.skip(count)
    }

    fn end_of_input(&mut self) {
        self.cursor.end();
    }

    fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}
