//! What a `ram` section holds.

use super::blocks::{BlockId, RamBlock};

/// One record of a `ram` section.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RamRecord<'a> {
    /// The list of blocks follows, until their lengths sum up to `total`. Only in START.
    MemSize {
        /// Sum of the used lengths of all blocks, in bytes.
        total: u64,
    },
    /// An entry of the list. With a [`MappedRamHeader`](super::MappedRamHeader) the payload is the region up to the end
    /// of the block's pages.
    Block(RamBlock),
    /// The list of blocks is whole. Takes no bytes: it comes after the last block (and its payload). A destination with
    /// page channels publishes the list to their readers now.
    EndOfBlocks,
    /// A page of zeroes.
    Zero(PageAt),
    /// A page; its bytes follow as payload.
    Page(PageAt),
    /// The difference to what the page held before; see [`xbzrle::decode`](crate::xbzrle::decode()).
    Xbzrle {
        /// The page.
        page: PageAt,
        /// The encoded difference, at most one page long.
        data: &'a [u8],
    },
    /// A page as zlib data.
    Compressed {
        /// The page.
        page: PageAt,
        /// The zlib stream.
        data: &'a [u8],
    },
    /// All page channels are to be waited for.
    MultifdFlush,
    /// The section's content ends.
    EndOfSection,
}

/// Which page a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageAt {
    /// The block.
    pub block: BlockId,
    /// Offset of the page in the block in bytes.
    pub offset: u64,
    /// The record carries the block's name. Without it the record before was about the same block.
    pub named: bool,
}
