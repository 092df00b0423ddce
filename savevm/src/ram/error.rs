//! What makes a `ram` section unreadable.

use qevm_wire::{Blame, CountedString, Fault};

/// What makes a `ram` section unreadable, or a record unwritable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The flags of a record are none of the legal ones, or several that exclude each other.
    #[error(
        "RAM record flags {found:#x}, expected exactly one of ZERO, MEM_SIZE, PAGE, EOS, XBZRLE, COMPRESS_PAGE, MULTIFD_FLUSH (and CONTINUE only with a page)"
    )]
    Flags {
        /// The flags found.
        found: u64,
    },
    /// A record without a page has address bits.
    #[error("RAM record {found:#x} has an address, but its flags tell of no page")]
    StrayAddress {
        /// The word found.
        found: u64,
    },
    /// A hook of the RDMA transport.
    #[error("RAM hook record of the RDMA transport, which cannot be read from a file or socket")]
    Hook,
    /// A record that continues the block of the record before, without such a record.
    #[error("page record without block name, but no page record came before it")]
    ContinueWithoutBlock,
    /// A page record names a block that the list does not have.
    #[error("unknown RAM block '{name}'")]
    UnknownBlock {
        /// The name found.
        name: CountedString,
    },
    /// A page outside its block.
    #[error("page at offset {offset:#x}, outside the used length {used_length:#x}")]
    OutsideBlock {
        /// Offset of the page in bytes.
        offset: u64,
        /// Length of the block in bytes.
        used_length: u64,
    },
    /// A ZERO record with another fill byte than 0.
    #[error("zero page filled with {found:#x}, expected 0")]
    Fill {
        /// The byte found.
        found: u8,
    },
    /// An XBZRLE record of an unknown encoding.
    #[error("XBZRLE encoding {found:#x}, expected {:#x}", super::XBZRLE_ENCODING)]
    XbzrleEncoding {
        /// The byte found.
        found: u8,
    },
    /// An XBZRLE record longer than a page.
    #[error("XBZRLE data of {found} bytes, expected at most a page of {max}")]
    XbzrleLength {
        /// The length found.
        found: u16,
        /// The page size.
        max: u64,
    },
    /// The list of blocks is where only page records are legal.
    #[error("list of RAM blocks outside the START section")]
    UnexpectedList,
    /// The lengths of the blocks do not sum up to the total.
    #[error("RAM blocks sum up to {found:#x}, expected the total {total:#x}")]
    ListSum {
        /// The sum with the block at fault.
        found: u64,
        /// What the list announced.
        total: u64,
    },
    /// Two blocks of one name.
    #[error("second RAM block '{name}'")]
    DuplicateBlock {
        /// The name found.
        name: CountedString,
    },
    /// A block that is no whole number of pages.
    #[error("used length {found:#x}, expected a multiple of the target page size {page_size:#x}")]
    PartialPage {
        /// The length found.
        found: u64,
        /// The target page size.
        page_size: u64,
    },
    /// A mapped-ram header of an unknown version.
    #[error("mapped-ram header version {found}, expected {expected}")]
    MappedRamVersion {
        /// The version found.
        found: u32,
        /// The only version known.
        expected: u32,
    },
    /// A mapped-ram header with another page size than the target's.
    #[error("mapped-ram page size {found:#x}, expected the target page size {expected:#x}")]
    MappedRamPageSize {
        /// The size found.
        found: u64,
        /// The target page size.
        expected: u64,
    },
    /// A mapped-ram header whose areas lie before the header, overlap, or are not aligned.
    #[error("mapped-ram {what} at file offset {found:#x}, expected {expected} {bound:#x}")]
    MappedRamOffset {
        /// Which area.
        what: &'static str,
        /// Its offset.
        found: u64,
        /// How it relates to `bound`.
        expected: &'static str,
        /// The bound.
        bound: u64,
    },
    /// A record that a mapped-ram file cannot have.
    #[error("RAM record flags {found:#x} in a mapped-ram stream, expected only EOS")]
    InMappedRam {
        /// The flags found.
        found: u64,
    },
    /// A record that is illegal once postcopy runs.
    #[error("RAM record flags {found:#x} after the start of postcopy, expected ZERO, PAGE, MULTIFD_FLUSH or EOS")]
    InPostcopy {
        /// The flags found.
        found: u64,
    },
    /// A record refers to a block that the list does not have. The caller's fault.
    #[error("RAM block number {found}, but the list has {blocks}")]
    NoSuchBlock {
        /// The number used.
        found: u32,
        /// How many blocks there are.
        blocks: u32,
    },
    /// A page to be written without name whose block is not that of the record before. The caller's fault.
    #[error("page record without block name, but the record before was about another block")]
    ContinueElsewhere,
    /// An offset to be written that is not at the start of a page. The caller's fault.
    #[error("page offset {found:#x}, expected a multiple of the target page size {page_size:#x}")]
    Unaligned {
        /// The offset given.
        found: u64,
        /// The target page size.
        page_size: u64,
    },
}

impl Blame for RamError {
    fn fault(&self) -> Fault {
        match self {
            RamError::Hook | RamError::MappedRamVersion { .. } => Fault::Unsupported,
            RamError::NoSuchBlock { .. } | RamError::ContinueElsewhere | RamError::Unaligned { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
