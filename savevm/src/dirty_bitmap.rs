//! The `dirty-bitmap` section: block dirty bitmaps, by capability `dirty-bitmaps` (2.12).

use qevm_wire::{Blame, CountedString, Fault, Located, Reader, WireError, Writer};

/// Flags of a chunk.
pub mod flag {
    /// The section's content ends.
    pub const EOS: u8 = 0x01;
    /// With BITS: all bits are zero and not sent.
    pub const ZEROES: u8 = 0x02;
    /// The bitmap's name follows.
    pub const BITMAP_NAME: u8 = 0x04;
    /// The node's name follows.
    pub const DEVICE_NAME: u8 = 0x08;
    /// A bitmap starts.
    pub const START: u8 = 0x10;
    /// A bitmap is complete.
    pub const COMPLETE: u8 = 0x20;
    /// A piece of a bitmap.
    pub const BITS: u8 = 0x40;
    /// More flag bytes follow; no release writes that.
    pub const EXTRA: u8 = 0x80;
}

/// Bits of the byte in a START chunk.
pub mod start_flag {
    /// The bitmap is enabled.
    pub const ENABLED: u8 = 0x01;
    /// The bitmap is persistent.
    pub const PERSISTENT: u8 = 0x02;
    /// "autoload" of old streams; ignored.
    pub const AUTOLOAD: u8 = 0x04;
    /// Bits that must be 0.
    pub const RESERVED: u8 = 0xf8;
}

/// What makes a `dirty-bitmap` section unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyBitmapError {
    /// The flags exclude each other or say nothing.
    #[error("dirty bitmap chunk flags {found:#x}, expected EOS alone or one of START, COMPLETE, BITS")]
    Flags {
        /// The flags found.
        found: u8,
    },
    /// Flags of more than one byte.
    #[error("dirty bitmap chunk flags {found:#x} of more than one byte, which no QEMU release writes")]
    ExtraFlags {
        /// The first byte.
        found: u8,
    },
    /// A reserved bit of a START chunk is set.
    #[error("dirty bitmap start flags {found:#x}, expected bits 3 to 7 to be 0")]
    StartFlags {
        /// The byte found.
        found: u8,
    },
    /// A chunk leaves out a name that no chunk before it had.
    #[error("dirty bitmap chunk without {what} name, but no chunk before it had one")]
    NoName {
        /// `node` or `bitmap`.
        what: &'static str,
    },
}

impl Blame for DirtyBitmapError {
    fn fault(&self) -> Fault {
        match self {
            DirtyBitmapError::ExtraFlags { .. } => Fault::Unsupported,
            _ => Fault::Malformed,
        }
    }
}

/// One chunk of a `dirty-bitmap` section.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Chunk {
    /// The section's content ends.
    EndOfSection,
    /// Something about a bitmap.
    Bitmap {
        /// The node's name or alias; `None` if it is that of the chunk before.
        node: Option<CountedString>,
        /// The bitmap's name or alias; `None` if it is that of the chunk before.
        bitmap: Option<CountedString>,
        /// What.
        content: ChunkContent,
    },
}

/// What a chunk says about its bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChunkContent {
    /// The bitmap starts.
    Start {
        /// Bytes that one bit stands for.
        granularity: u32,
        /// Bits of [`start_flag`].
        flags: u8,
    },
    /// The bitmap is complete.
    Complete,
    /// A piece of the bitmap.
    Bits {
        /// First sector (512 bytes) that the piece covers.
        first_sector: u64,
        /// How many sectors it covers.
        sectors: u32,
        /// Length of the serialised bits, which follow as payload; `None` if all are zero.
        len: Option<u64>,
    },
}

/// Whether names have been seen in the stream so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Names {
    node: bool,
    bitmap: bool,
}

impl Chunk {
    /// Reads one chunk, without its payload. Changes `names` only on success.
    pub(crate) fn decode<K: From<WireError> + From<DirtyBitmapError>>(
        reader: &mut Reader<'_, K>,
        names: &mut Names,
    ) -> Result<Self, Located<K>> {
        let at = reader.offset();
        let found = reader.u8()?;
        if found & flag::EXTRA != 0 {
            return Err(Located::new(DirtyBitmapError::ExtraFlags { found }.into(), at));
        }
        if found == flag::EOS {
            return Ok(Chunk::EndOfSection);
        }
        let kind = found & !(flag::DEVICE_NAME | flag::BITMAP_NAME);
        if ![flag::START, flag::COMPLETE, flag::BITS, flag::BITS | flag::ZEROES].contains(&kind) {
            return Err(Located::new(DirtyBitmapError::Flags { found }.into(), at));
        }
        let mut name = |bit: u8, seen: &mut bool, what, message| match found & bit {
            0 if !*seen => Err(Located::new(DirtyBitmapError::NoName { what }.into(), at)),
            0 => Ok(None),
            _ => {
                *seen = true;
                reader.counted_string(message).map(Some)
            }
        };
        let mut seen = *names;
        let node = name(flag::DEVICE_NAME, &mut seen.node, "node", "dirty bitmap node name")?;
        let bitmap = name(flag::BITMAP_NAME, &mut seen.bitmap, "bitmap", "dirty bitmap name")?;
        let content = match kind {
            flag::START => {
                let granularity = reader.be32()?;
                let at = reader.offset();
                match reader.u8()? {
                    flags if flags & start_flag::RESERVED == 0 => ChunkContent::Start { granularity, flags },
                    found => return Err(Located::new(DirtyBitmapError::StartFlags { found }.into(), at)),
                }
            }
            flag::COMPLETE => ChunkContent::Complete,
            _ => ChunkContent::Bits {
                first_sector: reader.be64()?,
                sectors: reader.be32()?,
                len: if kind & flag::ZEROES == 0 { Some(reader.be64()?) } else { None },
            },
        };
        *names = seen;
        Ok(Chunk::Bitmap { node, bitmap, content })
    }

    /// How many bytes of payload follow.
    pub(crate) fn payload(&self) -> u64 {
        match self {
            Chunk::Bitmap { content: ChunkContent::Bits { len: Some(len), .. }, .. } => *len,
            _ => 0,
        }
    }

    /// Writes one chunk, without its payload.
    pub(crate) fn encode(&self, writer: &mut Writer) {
        let Chunk::Bitmap { node, bitmap, content } = self else {
            writer.u8(flag::EOS);
            return;
        };
        let kind = match content {
            ChunkContent::Start { .. } => flag::START,
            ChunkContent::Complete => flag::COMPLETE,
            ChunkContent::Bits { len: Some(_), .. } => flag::BITS,
            ChunkContent::Bits { len: None, .. } => flag::BITS | flag::ZEROES,
        };
        let bit = |name: &Option<CountedString>, bit| if name.is_some() { bit } else { 0 };
        writer.u8(kind | bit(node, flag::DEVICE_NAME) | bit(bitmap, flag::BITMAP_NAME));
        for name in [node, bitmap].into_iter().flatten() {
            writer.counted_string(name);
        }
        match content {
            ChunkContent::Start { granularity, flags } => {
                writer.be32(*granularity).u8(*flags);
            }
            ChunkContent::Complete => {}
            ChunkContent::Bits { first_sector, sectors, len } => {
                writer.be64(*first_sector).be32(*sectors);
                if let Some(len) = len {
                    writer.be64(*len);
                }
            }
        }
    }
}
