//! The `ram` section: the list of RAM blocks, and one record for each page that travels on the main channel.
//!
//! [`RamRecord`] is what a section holds, [`RamBlocks`] the list that page records refer to by [`BlockId`].
//! [`PreemptDecoder`] reads the second channel of `postcopy-preempt`, which carries bare page records.
//!
//! A page's bytes are never part of a record: [`RamRecord::Page`] says where they go, and they are the next bytes of
//! the stream. Only the small forms of a page (XBZRLE, compressed) are handed out as slices of the input.

mod blocks;
mod decode;
mod encode;
mod error;
mod preempt;

pub use blocks::{BlockId, MappedRamHeader, RamBlock, RamBlocks};
pub(crate) use decode::{ListWords, RamReader, RecordContext};
pub(crate) use encode::encode;
pub use error::RamError;
pub use preempt::PreemptDecoder;

/// Version of the section (`ram` version 4 in every release examined).
pub const SECTION_VERSION: u32 = 4;

/// Flags in the low bits of the word that opens a record.
pub mod flag {
    /// ZERO: the page is filled with the byte that follows, which is 0.
    pub const ZERO: u64 = 0x002;
    /// MEM_SIZE: the list of RAM blocks follows.
    pub const MEM_SIZE: u64 = 0x004;
    /// PAGE: the page follows.
    pub const PAGE: u64 = 0x008;
    /// EOS: the section ends.
    pub const EOS: u64 = 0x010;
    /// CONTINUE: the block is that of the record before; modifies the page records.
    pub const CONTINUE: u64 = 0x020;
    /// XBZRLE: the difference to the page sent before follows (capability `xbzrle`).
    pub const XBZRLE: u64 = 0x040;
    /// HOOK: a message of the RDMA transport.
    pub const HOOK: u64 = 0x080;
    /// COMPRESS_PAGE: the page follows as zlib data (capability `compress`, removed in 9.1).
    pub const COMPRESS_PAGE: u64 = 0x100;
    /// MULTIFD_FLUSH: wait for the SYNC packet of every page channel (8.1).
    pub const MULTIFD_FLUSH: u64 = 0x200;
}

/// First byte of an XBZRLE record; no other encoding exists.
pub const XBZRLE_ENCODING: u8 = 0x01;

/// One record of a `ram` section.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RamRecord<'a> {
    /// The list of blocks follows, until their lengths sum up to `total`. Only in START.
    MemSize {
        /// Sum of the used lengths of all blocks, in bytes.
        total: u64,
    },
    /// An entry of the list. With a [`MappedRamHeader`] the payload is the region up to the end of the block's pages.
    Block(RamBlock),
    /// The list of blocks is whole. Takes no bytes: it comes after the last block (and its payload). Who has page
    /// channels publishes the list to their readers now.
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
