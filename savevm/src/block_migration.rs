//! The `block` section: block migration (capability `block`, removed in 9.1).

use qevm_wire::{Blame, CountedString, Fault, Located, Reader, WireError, Writer};

/// Flags in the low bits of the word that opens a record.
pub mod flag {
    /// A block of a device.
    pub const DEVICE_BLOCK: u64 = 0x01;
    /// The section's content ends.
    pub const EOS: u64 = 0x02;
    /// How far the transfer is.
    pub const PROGRESS: u64 = 0x04;
    /// With DEVICE_BLOCK: the block is zero and not sent (capability `zero-blocks`).
    pub const ZERO_BLOCK: u64 = 0x08;
    /// All bits that are flags; those above are a sector number or the progress.
    pub const MASK: u64 = 0x1ff;
}

/// Bits of the flags.
const SHIFT: u32 = 9;

/// Bytes of a block, also of the last of a device, which is padded.
pub const BLOCK_LEN: u64 = 1 << 20;

/// What makes a `block` section unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockMigrationError {
    /// The flags are none of the legal combinations.
    #[error("block migration flags {found:#x}, expected DEVICE_BLOCK (with or without ZERO_BLOCK), PROGRESS or EOS")]
    Flags {
        /// The flags found.
        found: u64,
    },
    /// A record that has no number comes with one.
    #[error("block migration EOS {found:#x}, expected 0x2")]
    StrayBits {
        /// The word found.
        found: u64,
    },
    /// A number to be written does not fit above the flags.
    #[error("block migration number {found:#x} does not fit 55 bits")]
    TooLarge {
        /// The number given.
        found: u64,
    },
}

impl Blame for BlockMigrationError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}

/// One record of a `block` section.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockRecord {
    /// A block of a device; if it is not zero its [`BLOCK_LEN`] bytes follow as payload.
    DeviceBlock {
        /// First sector (512 bytes) of the block.
        sector: u64,
        /// The device's name.
        device: CountedString,
        /// The block is zero and not sent.
        zero: bool,
    },
    /// How far the bulk transfer is, in percent.
    Progress(u64),
    /// The section's content ends.
    EndOfSection,
}

impl BlockRecord {
    /// Reads one record, without its payload.
    pub(crate) fn decode<K: From<WireError> + From<BlockMigrationError>>(
        reader: &mut Reader<'_, K>,
    ) -> Result<Self, Located<K>> {
        let at = reader.offset();
        let word = reader.be64()?;
        let (number, flags) = (word >> SHIFT, word & flag::MASK);
        match flags {
            flag::EOS if number == 0 => Ok(BlockRecord::EndOfSection),
            flag::EOS => Err(Located::new(BlockMigrationError::StrayBits { found: word }.into(), at)),
            flag::PROGRESS => Ok(BlockRecord::Progress(number)),
            _ if flags & !flag::ZERO_BLOCK == flag::DEVICE_BLOCK => Ok(BlockRecord::DeviceBlock {
                sector: number,
                device: reader.counted_string("block device name")?,
                zero: flags & flag::ZERO_BLOCK != 0,
            }),
            found => Err(Located::new(BlockMigrationError::Flags { found }.into(), at)),
        }
    }

    /// How many bytes of payload follow.
    pub(crate) fn payload(&self) -> u64 {
        match self {
            BlockRecord::DeviceBlock { zero: false, .. } => BLOCK_LEN,
            _ => 0,
        }
    }

    /// Writes one record, without its payload.
    pub(crate) fn encode<K: From<BlockMigrationError>>(&self, writer: &mut Writer) -> Result<(), Located<K>> {
        let at = writer.len() as u64;
        let shifted = |number: u64| match number >> (64 - SHIFT) {
            0 => Ok(number << SHIFT),
            _ => Err(Located::new(BlockMigrationError::TooLarge { found: number }.into(), at)),
        };
        match self {
            BlockRecord::DeviceBlock { sector, device, zero } => {
                let zero = if *zero { flag::ZERO_BLOCK } else { 0 };
                writer.be64(shifted(*sector)? | flag::DEVICE_BLOCK | zero).counted_string(device);
            }
            BlockRecord::Progress(percent) => drop(writer.be64(shifted(*percent)? | flag::PROGRESS)),
            BlockRecord::EndOfSection => drop(writer.be64(flag::EOS)),
        }
        Ok(())
    }
}
