//! The section `s390-storage_attributes`: what an s390x guest has said of its pages (CMMA).

use qevm_wire::{Blame, Fault, Located, Reader, WireError, Writer};

/// Low bits of the word that opens a record; the bits above are an address.
pub mod flag {
    /// The section's content ends.
    pub const EOS: u64 = 0x01;
    /// Attributes follow.
    pub const MORE: u64 = 0x02;
    /// The source could not read its attributes.
    pub const ERROR: u64 = 0x04;
    /// All attributes were sent.
    pub const DONE: u64 = 0x08;
}

/// Addresses are those of pages.
const FLAGS: u64 = 0xfff;

/// What makes an `s390-storage_attributes` section unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StorageAttributesError {
    /// The word is none of the known ones.
    #[error("storage attributes word {found:#x}, expected 1 (end of section), 8 (done), or an address with flag 2")]
    Word {
        /// The word found.
        found: u64,
    },
}

impl Blame for StorageAttributesError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}

/// One record of an `s390-storage_attributes` section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StorageAttributesRecord {
    /// The attributes of `len` pages from `address` on follow as payload, one byte each.
    Attributes {
        /// Guest-physical address of the first page.
        address: u64,
        /// How many pages.
        len: u64,
    },
    /// All attributes were sent.
    Done,
    /// The section's content ends.
    EndOfSection,
}

impl StorageAttributesRecord {
    /// Reads one record, without its payload.
    pub(crate) fn decode<K: From<WireError> + From<StorageAttributesError>>(
        reader: &mut Reader<'_, K>,
    ) -> Result<Self, Located<K>> {
        let at = reader.offset();
        match reader.be64()? {
            flag::EOS => Ok(StorageAttributesRecord::EndOfSection),
            flag::DONE => Ok(StorageAttributesRecord::Done),
            word if word & FLAGS == flag::MORE => {
                Ok(StorageAttributesRecord::Attributes { address: word & !FLAGS, len: reader.be64()? })
            }
            found => Err(Located::new(StorageAttributesError::Word { found }.into(), at)),
        }
    }

    /// How many bytes of payload follow.
    pub(crate) fn payload(self) -> u64 {
        match self {
            StorageAttributesRecord::Attributes { len, .. } => len,
            _ => 0,
        }
    }

    /// Writes one record, without its payload.
    pub(crate) fn encode(self, writer: &mut Writer) {
        match self {
            StorageAttributesRecord::Attributes { address, len } => {
                writer.be64(address & !FLAGS | flag::MORE).be64(len)
            }
            StorageAttributesRecord::Done => writer.be64(flag::DONE),
            StorageAttributesRecord::EndOfSection => writer.be64(flag::EOS),
        };
    }
}
