//! The section `spapr/htab`: the hash page table of a pseries guest.

use qevm_wire::{Blame, Fault, Located, Reader, WireError, Writer};

/// Bytes of an entry of the table.
pub const ENTRY_LEN: u64 = 16;
/// Log2 of the bytes that a table can have (Power Architecture Platform Requirements).
const SHIFTS: std::ops::RangeInclusive<u32> = 18..=46;
/// An entry is 16 bytes long.
const ENTRY_SHIFT: u32 = 4;

/// What makes a `spapr/htab` section unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HashTableError {
    /// Entries beyond the end of the table.
    #[error("entries {index} to {end} of a hash page table of {entries} entries")]
    Beyond {
        /// The first entry of the chunk.
        index: u64,
        /// The first entry after the chunk.
        end: u64,
        /// Entries of the table, as START told its size.
        entries: u64,
    },
}

impl Blame for HashTableError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}

/// One record of a `spapr/htab` section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HashTableRecord {
    /// Log2 of the bytes of the table, never 0; all ones if the guest has none. Ends the section's content.
    Size(u32),
    /// Chunks follow.
    Chunks,
    /// The entries from `index` on: `valid` of them, 16 bytes each, follow as payload; after them come `invalid` ones
    /// that are cleared. Not all three are 0.
    Chunk {
        /// The first entry.
        index: u32,
        /// How many entries follow.
        valid: u16,
        /// How many entries after them are cleared.
        invalid: u16,
    },
    /// There are no more chunks. Ends the section's content.
    EndOfChunks,
}

/// Where in a section's content the reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Start,
    Chunks,
}

impl HashTableRecord {
    /// Reads one record, without its payload. `entries`: how many the table has, if that is known.
    pub(crate) fn decode<K: From<WireError> + From<HashTableError>>(
        reader: &mut Reader<'_, K>,
        place: Place,
        entries: Option<u64>,
    ) -> Result<Self, Located<K>> {
        if place == Place::Start {
            return Ok(match reader.be32()? {
                0 => HashTableRecord::Chunks,
                shift => HashTableRecord::Size(shift),
            });
        }
        let at = reader.offset();
        let (index, valid, invalid) = (reader.be32()?, reader.be16()?, reader.be16()?);
        let end = u64::from(index) + u64::from(valid) + u64::from(invalid);
        match entries {
            _ if (index, valid, invalid) == (0, 0, 0) => Ok(HashTableRecord::EndOfChunks),
            Some(entries) if end > entries => {
                let kind = HashTableError::Beyond { index: index.into(), end, entries };
                Err(Located::new(kind.into(), at))
            }
            _ => Ok(HashTableRecord::Chunk { index, valid, invalid }),
        }
    }

    /// How many entries a table of this size has; `None` if it is no size of a table.
    pub fn entries(self) -> Option<u64> {
        match self {
            HashTableRecord::Size(shift) if SHIFTS.contains(&shift) => Some(1 << (shift - ENTRY_SHIFT)),
            _ => None,
        }
    }

    /// How many bytes of payload follow.
    pub(crate) fn payload(self) -> u64 {
        match self {
            HashTableRecord::Chunk { valid, .. } => u64::from(valid) * ENTRY_LEN,
            _ => 0,
        }
    }

    /// Writes one record, without its payload.
    pub(crate) fn encode(self, writer: &mut Writer) {
        match self {
            HashTableRecord::Size(shift) => writer.be32(shift),
            HashTableRecord::Chunks => writer.be32(0),
            HashTableRecord::Chunk { index, valid, invalid } => writer.be32(index).be16(valid).be16(invalid),
            HashTableRecord::EndOfChunks => writer.be64(0),
        };
    }
}
