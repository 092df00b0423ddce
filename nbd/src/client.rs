//! What a client sends: flags, options, then requests.

use crate::number::{MAX_OPTION, MAX_STRING, OPTION_MAGIC, REQUEST_MAGIC, command};
use crate::{Error, ErrorKind, Reader};
use qevm_wire::{Cursor, Decode, Located, Step, WireError, Writer};

/// One item of what a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientEvent<'a> {
    /// The answer to the server's first words: flags of [`handshake`](crate::number::handshake).
    Flags(u32),
    /// An option, which is to be answered.
    Option {
        /// Which; see [`option`](crate::number::option).
        option: u32,
        /// Its data. For INFO and GO, an [`ExportQuery`].
        data: &'a [u8],
    },
    /// A request. After [`WRITE`](command::WRITE) as many bytes are payload.
    Request(Request),
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Request {
    /// Flags.
    pub flags: u16,
    /// What is to be done; see [`command`].
    pub command: u16,
    /// What the reply is to carry.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
}

/// The data of the options INFO and GO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportQuery<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// What is to be told of it beside size and flags: 16-bit numbers of [`info`](crate::number::info).
    pub wanted: &'a [[u8; 2]],
}

impl<'a> ExportQuery<'a> {
    /// Reads the data of an option.
    ///
    /// # Errors
    /// [`ErrorKind::Wire`]: it is cut, goes on after its end, or has a name that is too long.
    pub fn parse(data: &'a [u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(data);
        let len = u64::from(reader.be32()?);
        reader.within_limit("length of an export's name", len, MAX_STRING as u64)?;
        let name = reader.take(len)?;
        let count = reader.be16()?;
        let (wanted, _) = reader.take(u64::from(count) * 2)?.as_chunks();
        reader.expect_end("data of an option")?;
        Ok(ExportQuery { name, wanted })
    }

    /// True if `info` is to be told.
    pub fn wants(&self, info: u16) -> bool {
        self.wanted.contains(&info.to_be_bytes())
    }

    /// Appends it.
    pub fn encode(&self, writer: &mut Writer) {
        writer.be32(self.name.len() as u32).bytes(self.name).be16(self.wanted.len() as u16);
        writer.bytes(self.wanted.as_flattened());
    }
}

impl ClientEvent<'_> {
    /// Appends it, without its payload.
    pub fn encode(&self, writer: &mut Writer) {
        match self {
            ClientEvent::Flags(flags) => drop(writer.be32(*flags)),
            ClientEvent::Option { option, data } => {
                writer.be64(OPTION_MAGIC).be32(*option).be32(data.len() as u32).bytes(data);
            }
            ClientEvent::Request(Request { flags, command, cookie, offset, len }) => {
                writer.be32(REQUEST_MAGIC).be16(*flags).be16(*command).be64(*cookie).be64(*offset).be32(*len);
            }
        }
    }
}

/// Reads what a client sends.
///
/// ```
/// use qevm_nbd::{ClientDecoder, ClientEvent, number::option};
/// use qevm_wire::{Decode, Step};
///
/// // QEMU asks for structured replies first.
/// let input = [&[0, 0, 0, 3][..], b"IHAVEOPT\0\0\0\x08\0\0\0\0"].concat();
/// let mut decoder = ClientDecoder::default();
/// assert_eq!(decoder.next(&input)?, Step::Event { consumed: 4, event: ClientEvent::Flags(3) });
/// let asked = ClientEvent::Option { option: option::STRUCTURED_REPLY, data: &[] };
/// assert_eq!(decoder.next(&input[4..])?, Step::Event { consumed: 16, event: asked });
/// # Ok::<(), qevm_nbd::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ClientDecoder {
    state: State,
    cursor: Cursor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Flags,
    Options,
    Requests,
}

impl ClientDecoder {
    /// The server has agreed to an option that ends the handshake: requests follow.
    pub fn begin(&mut self) {
        self.state = State::Requests;
    }

    fn item<'a>(&self, reader: &mut Reader<'a>) -> Result<ClientEvent<'a>, Error> {
        match self.state {
            State::Flags => Ok(ClientEvent::Flags(reader.be32()?)),
            State::Options => {
                let at = reader.clone();
                match reader.be64()? {
                    OPTION_MAGIC => {}
                    found => {
                        return Err(at.fail(WireError::Unexpected { what: "magic", found, expected: OPTION_MAGIC }));
                    }
                }
                let option = reader.be32()?;
                let len = reader.be32()?;
                reader.within_limit("length of an option", len.into(), MAX_OPTION.into())?;
                Ok(ClientEvent::Option { option, data: reader.take(len.into())? })
            }
            State::Requests => {
                reader.expect_be32("magic", REQUEST_MAGIC)?;
                let (flags, command) = (reader.be16()?, reader.be16()?);
                let (cookie, offset, len) = (reader.be64()?, reader.be64()?, reader.be32()?);
                Ok(ClientEvent::Request(Request { flags, command, cookie, offset, len }))
            }
        }
    }

    fn locate(&self, error: Error) -> Error {
        error.within(match self.state {
            State::Flags => "flags",
            State::Options => "option",
            State::Requests => "request",
        })
    }
}

impl Decode for ClientDecoder {
    type Event<'a> = ClientEvent<'a>;
    /// What is to be written.
    type Payload = ();
    type Kind = ErrorKind;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<ClientEvent<'a>>, Error> {
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
                    ClientEvent::Flags(_) => self.state = State::Options,
                    ClientEvent::Request(Request { command: command::WRITE, len, .. }) => {
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
