//! Commands: the messages of the source to the destination between sections.

use crate::framing;
use qevm_wire::{Blame, CountedString, Fault, Limits, Located, Reader, WireError, Writer};

/// Command numbers, with the release that introduced them.
pub mod id {
    /// OPEN_RETURN_PATH (2.5).
    pub const OPEN_RETURN_PATH: u16 = 1;
    /// PING (2.5).
    pub const PING: u16 = 2;
    /// POSTCOPY_ADVISE (2.5).
    pub const POSTCOPY_ADVISE: u16 = 3;
    /// POSTCOPY_LISTEN (2.5).
    pub const POSTCOPY_LISTEN: u16 = 4;
    /// POSTCOPY_RUN (2.5).
    pub const POSTCOPY_RUN: u16 = 5;
    /// POSTCOPY_RAM_DISCARD (2.5).
    pub const RAM_DISCARD: u16 = 6;
    /// PACKAGED (2.5).
    pub const PACKAGED: u16 = 7;
    /// ENABLE_COLO (2.10; refused by 11.1).
    pub const ENABLE_COLO: u16 = 8;
    /// POSTCOPY_RESUME (3.0).
    pub const POSTCOPY_RESUME: u16 = 9;
    /// RECV_BITMAP (3.0).
    pub const RECV_BITMAP: u16 = 10;
    /// SWITCHOVER_START (10.0, `migration.send-switchover-start`).
    pub const SWITCHOVER_START: u16 = 11;
}

/// The only version of the RAM_DISCARD payload.
const RAM_DISCARD_VERSION: u8 = 0;
const RANGE_LEN: u64 = 16;

/// What makes a command unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// No release here has a command of this number.
    #[error("unknown command {found:#x} with {len} bytes of payload, expected 1 to 11")]
    Unknown {
        /// The number found.
        found: u16,
        /// Length of its payload.
        len: u16,
    },
    /// The payload of a command is longer or shorter than its content.
    #[error("{command} has a payload of {found} bytes, expected {expected}")]
    Length {
        /// Name of the command.
        command: &'static str,
        /// The length found.
        found: u16,
        /// What is legal.
        expected: &'static str,
    },
    /// The byte after the block name of RAM_DISCARD is not NUL.
    #[error("byte {found:#x} after the RAM block name, expected 0")]
    NoNul {
        /// The byte found.
        found: u8,
    },
    /// RAM_DISCARD in another version than 0.
    #[error("RAM_DISCARD version {found}, expected {RAM_DISCARD_VERSION}")]
    DiscardVersion {
        /// The version found.
        found: u8,
    },
    /// The payload to be written is longer than its 16-bit length can say.
    #[error("RAM_DISCARD of {ranges} ranges does not fit a command")]
    TooManyRanges {
        /// How many there are.
        ranges: usize,
    },
}

impl Blame for CommandError {
    fn fault(&self) -> Fault {
        match self {
            CommandError::Unknown { .. } | CommandError::DiscardVersion { .. } => Fault::Unsupported,
            _ => Fault::Malformed,
        }
    }
}

/// A command of the source.
///
/// ```
/// use qevm_savevm::command::Command;
///
/// assert_eq!(Command::Ping(1).name(), "PING");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// The destination is to use the return path.
    OpenReturnPath,
    /// The destination is to answer PONG with the same value. QEMU sends 1 after OPEN_RETURN_PATH, 2 before the
    /// package, 3 inside it, 0x42 as last before RUN (10.2), and 4 after it.
    Ping(u32),
    /// Postcopy may follow. `None` if only dirty bitmaps want it, without `postcopy-ram`.
    PostcopyAdvise(Option<PostcopyAdvise>),
    /// The destination is to listen for pages and to catch faults; first in the package.
    PostcopyListen,
    /// The guest is to run; last in the package.
    PostcopyRun,
    /// Pages that the destination has are stale and must be dropped before LISTEN.
    RamDiscard(RamDiscard),
    /// `len` bytes follow that are sections and commands again, and that must have arrived before the first is used.
    Packaged {
        /// Length of the package in bytes.
        len: u32,
    },
    /// Go over to COLO when the stream has ended (up to 10.1).
    EnableColo,
    /// A broken postcopy goes on.
    PostcopyResume,
    /// The destination is to send the bitmap of the pages of this RAM block that it has received.
    RecvBitmap(CountedString),
    /// The guest has stopped and the END sections follow.
    SwitchoverStart,
}

/// Page sizes of the source, to be compared by the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PostcopyAdvise {
    /// Bitwise or of the page sizes in bytes of all RAM blocks that will be migrated, e.g. `0x201000`.
    pub page_size_summary: u64,
    /// The target page size in bytes.
    pub target_page_size: u64,
}

/// Ranges of one RAM block that the destination must drop.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RamDiscard {
    /// Name of the block.
    pub block: CountedString,
    /// The ranges, at least one; QEMU puts at most [`RamDiscard::MAX_RANGES_WRITTEN`] into a command.
    pub ranges: Vec<DiscardRange>,
}

impl RamDiscard {
    /// QEMU sends more commands rather than more ranges than this in one. Readers accept any number.
    pub const MAX_RANGES_WRITTEN: usize = 12;
}

/// A range of bytes in a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiscardRange {
    /// Offset of the first byte in the block.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Command {
    /// The number on the wire.
    pub fn id(&self) -> u16 {
        match self {
            Command::OpenReturnPath => id::OPEN_RETURN_PATH,
            Command::Ping(_) => id::PING,
            Command::PostcopyAdvise(_) => id::POSTCOPY_ADVISE,
            Command::PostcopyListen => id::POSTCOPY_LISTEN,
            Command::PostcopyRun => id::POSTCOPY_RUN,
            Command::RamDiscard(_) => id::RAM_DISCARD,
            Command::Packaged { .. } => id::PACKAGED,
            Command::EnableColo => id::ENABLE_COLO,
            Command::PostcopyResume => id::POSTCOPY_RESUME,
            Command::RecvBitmap(_) => id::RECV_BITMAP,
            Command::SwitchoverStart => id::SWITCHOVER_START,
        }
    }

    /// The name as the format documents call it.
    pub fn name(&self) -> &'static str {
        // Every command has a number of the table, so the name is always there.
        shape(self.id()).map_or("", |(name, _)| name)
    }

    /// Reads what follows the type byte.
    pub(crate) fn decode<K: Blame + From<WireError> + From<CommandError>>(
        reader: &mut Reader<'_, K>,
        limits: &Limits,
    ) -> Result<Self, Located<K>> {
        let at = reader.offset();
        let (id, len) = (reader.be16()?, reader.be16()?);
        let Some((command, lengths)) = shape(id) else {
            return Err(Located::new(CommandError::Unknown { found: id, len }.into(), at));
        };
        if !lengths.allow(len) {
            let expected = lengths.expected();
            return Err(Located::new(CommandError::Length { command, found: len, expected }.into(), at + 2));
        }
        let mut payload = reader.sub(len.into())?;
        let decoded = Self::decode_payload(id, &mut payload, limits)
            .and_then(|decoded| payload.expect_end("command payload").map(|()| decoded));
        // The whole payload is there: to want more of it is the peer's error, not a call for more input.
        decoded
            .map_err(|error| match error.is_truncated() {
                true => error.map(|_| {
                    CommandError::Length { command, found: len, expected: "a length that fits its content" }.into()
                }),
                false => error,
            })
            .map_err(|error| error.within(format!("command {command}")))
    }

    fn decode_payload<K: From<WireError> + From<CommandError>>(
        id: u16,
        payload: &mut Reader<'_, K>,
        limits: &Limits,
    ) -> Result<Self, Located<K>> {
        Ok(match id {
            id::OPEN_RETURN_PATH => Command::OpenReturnPath,
            id::PING => Command::Ping(payload.be32()?),
            id::POSTCOPY_ADVISE if payload.is_empty() => Command::PostcopyAdvise(None),
            id::POSTCOPY_ADVISE => Command::PostcopyAdvise(Some(PostcopyAdvise {
                page_size_summary: payload.be64()?,
                target_page_size: payload.be64()?,
            })),
            id::POSTCOPY_LISTEN => Command::PostcopyListen,
            id::POSTCOPY_RUN => Command::PostcopyRun,
            id::RAM_DISCARD => Command::RamDiscard(RamDiscard::decode(payload)?),
            id::PACKAGED => {
                let len = payload.clone().be32()?;
                payload.within_limit("package length", len.into(), limits.package)?;
                payload.be32()?;
                Command::Packaged { len }
            }
            id::ENABLE_COLO => Command::EnableColo,
            id::POSTCOPY_RESUME => Command::PostcopyResume,
            id::RECV_BITMAP => Command::RecvBitmap(payload.counted_string("RAM block name")?),
            _ => Command::SwitchoverStart,
        })
    }

    /// Writes the command, type byte included.
    pub(crate) fn encode<K: From<CommandError>>(&self, writer: &mut Writer) -> Result<(), Located<K>> {
        let mut payload = Writer::new();
        match self {
            Command::Ping(value) => drop(payload.be32(*value)),
            Command::PostcopyAdvise(Some(advise)) => {
                payload.be64(advise.page_size_summary).be64(advise.target_page_size);
            }
            Command::RamDiscard(discard) => discard.encode(&mut payload),
            Command::Packaged { len } => drop(payload.be32(*len)),
            Command::RecvBitmap(block) => drop(payload.counted_string(block)),
            Command::OpenReturnPath
            | Command::PostcopyAdvise(None)
            | Command::PostcopyListen
            | Command::PostcopyRun
            | Command::EnableColo
            | Command::PostcopyResume
            | Command::SwitchoverStart => {}
        }
        let len = u16::try_from(payload.len()).map_err(|_| {
            let ranges = match self {
                Command::RamDiscard(discard) => discard.ranges.len(),
                _ => 0,
            };
            Located::new(CommandError::TooManyRanges { ranges }.into(), writer.len() as u64)
        })?;
        writer.u8(framing::COMMAND).be16(self.id()).be16(len).bytes(payload.as_bytes());
        Ok(())
    }
}

impl RamDiscard {
    fn decode<K: From<WireError> + From<CommandError>>(payload: &mut Reader<'_, K>) -> Result<Self, Located<K>> {
        let at = payload.offset();
        let found = payload.u8()?;
        if found != RAM_DISCARD_VERSION {
            return Err(Located::new(CommandError::DiscardVersion { found }.into(), at));
        }
        let block = payload.counted_string("RAM block name")?;
        let at = payload.offset();
        let found = payload.u8()?;
        if found != 0 {
            return Err(Located::new(CommandError::NoNul { found }.into(), at));
        }
        let left = payload.remaining() as u64;
        if left == 0 {
            // A range is owed: the reader words the error.
            payload.take(RANGE_LEN)?;
        }
        if !left.is_multiple_of(RANGE_LEN) {
            let left = left % RANGE_LEN;
            return Err(payload.fail(WireError::TrailingBytes { what: "list of discarded ranges", left }));
        }
        let ranges = (0..left / RANGE_LEN)
            .map(|_| Ok(DiscardRange { start: payload.be64()?, len: payload.be64()? }))
            .collect::<Result<_, Located<K>>>()?;
        Ok(RamDiscard { block, ranges })
    }

    fn encode(&self, payload: &mut Writer) {
        payload.u8(RAM_DISCARD_VERSION).counted_string(&self.block).u8(0);
        for range in &self.ranges {
            payload.be64(range.start).be64(range.len);
        }
    }
}

/// Which payload lengths a command may have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lengths {
    None,
    Word,
    Advise,
    Discard,
    Name,
}

impl Lengths {
    pub(crate) fn allow(self, len: u16) -> bool {
        match self {
            Lengths::None => len == 0,
            Lengths::Word => len == 4,
            Lengths::Advise => matches!(len, 0 | 16),
            Lengths::Discard => len >= 20,
            Lengths::Name => (2..=256).contains(&len),
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Lengths::None => "0",
            Lengths::Word => "4",
            Lengths::Advise => "0 or 16",
            Lengths::Discard => "20 or more",
            Lengths::Name => "2 to 256",
        }
    }
}

/// Name and payload lengths of a command; `None` if the number is unknown.
pub(crate) fn shape(id: u16) -> Option<(&'static str, Lengths)> {
    Some(match id {
        id::OPEN_RETURN_PATH => ("OPEN_RETURN_PATH", Lengths::None),
        id::PING => ("PING", Lengths::Word),
        id::POSTCOPY_ADVISE => ("POSTCOPY_ADVISE", Lengths::Advise),
        id::POSTCOPY_LISTEN => ("POSTCOPY_LISTEN", Lengths::None),
        id::POSTCOPY_RUN => ("POSTCOPY_RUN", Lengths::None),
        id::RAM_DISCARD => ("RAM_DISCARD", Lengths::Discard),
        id::PACKAGED => ("PACKAGED", Lengths::Word),
        id::ENABLE_COLO => ("ENABLE_COLO", Lengths::None),
        id::POSTCOPY_RESUME => ("POSTCOPY_RESUME", Lengths::None),
        id::RECV_BITMAP => ("RECV_BITMAP", Lengths::Name),
        id::SWITCHOVER_START => ("SWITCHOVER_START", Lengths::None),
        _ => return None,
    })
}
