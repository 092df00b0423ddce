//! RAM blocks: the list in the START section, and the index over it that page records are resolved with.

use super::RamError;
use qevm_wire::{CountedString, Located, PageGeometry, Reader, WireError, Writer};
use std::collections::HashMap;

/// Version of the mapped-ram header (9.0).
pub(crate) const MAPPED_RAM_VERSION: u32 = 1;

/// Number of a RAM block: its place in the list of the START section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The number as index of a slice with one element per block.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One RAM block as the START section lists it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RamBlock {
    /// The block's name, e.g. `pc.ram` or `0000:00:02.0/vga.vram`.
    pub name: CountedString,
    /// How much of the block is in use, in bytes; whole target pages.
    pub used_length: u64,
    /// Page size of the block in bytes. Only with capability `postcopy-ram`, and only where it is not the default.
    pub page_size: Option<u64>,
    /// Address of the block's memory region in its container. Only with capability `x-ignore-shared`.
    pub address: Option<u64>,
    /// Where the file has the block's pages. Only with capability `mapped-ram`.
    pub mapped_ram: Option<MappedRamHeader>,
}

impl RamBlock {
    /// A block of `used_length` bytes without the optional words.
    pub fn new(name: CountedString, used_length: u64) -> Self {
        RamBlock { name, used_length, page_size: None, address: None, mapped_ram: None }
    }
}

/// Where a mapped-ram file has the bitmap and the pages of a block (9.0).
///
/// The stream jumps over both: its next byte is at `pages_offset` + used length of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MappedRamHeader {
    /// The target page size in bytes.
    pub page_size: u64,
    /// Offset of the bitmap from the start of the file.
    pub bitmap_offset: u64,
    /// Offset of the first page from the start of the file.
    pub pages_offset: u64,
}

impl MappedRamHeader {
    /// Bytes on the wire.
    pub const LEN: u64 = 28;

    /// How many bytes the bitmap of a block of `used_length` bytes takes: whole 64-bit words, one bit per page.
    pub fn bitmap_len(&self, used_length: u64) -> u64 {
        used_length.checked_div(self.page_size).unwrap_or(0).div_ceil(64) * 8
    }

    /// The header of a block whose pages are not in the file, as capability `x-ignore-shared` leaves out what a backend
    /// shares.
    pub fn absent(page_size: u64) -> Self {
        MappedRamHeader { page_size, bitmap_offset: 0, pages_offset: 0 }
    }

    /// True if neither bitmap nor pages of the block are in the file: see [`absent`](Self::absent).
    pub fn is_absent(&self) -> bool {
        self.bitmap_offset == 0 && self.pages_offset == 0
    }

    /// How many bytes lie between this header, which ends at file offset `end`, and the next byte of the stream.
    pub fn gap(&self, end: u64, used_length: u64) -> Option<u64> {
        if self.is_absent() {
            return Some(0);
        }
        self.pages_offset.checked_add(used_length)?.checked_sub(end)
    }

    /// `ignores`: the stream may leave out blocks.
    pub(super) fn decode<K: From<WireError> + From<RamError>>(
        reader: &mut Reader<'_, K>,
        used_length: u64,
        pages: PageGeometry,
        ignores: bool,
    ) -> Result<Self, Located<K>> {
        let version_at = reader.offset();
        let found = reader.be32()?;
        if found != MAPPED_RAM_VERSION {
            let expected = MAPPED_RAM_VERSION;
            return Err(Located::new(RamError::MappedRamVersion { found, expected }.into(), version_at));
        }
        let header =
            MappedRamHeader { page_size: reader.be64()?, bitmap_offset: reader.be64()?, pages_offset: reader.be64()? };
        if header.page_size != pages.size() {
            let (found, expected) = (header.page_size, pages.size());
            return Err(Located::new(RamError::MappedRamPageSize { found, expected }.into(), version_at + 4));
        }
        if ignores && header.is_absent() {
            return Ok(header);
        }
        let offset_error = |at, what, found, expected, bound| {
            Err(Located::new(RamError::MappedRamOffset { what, found, expected, bound }.into(), at))
        };
        let end = reader.offset();
        if header.bitmap_offset < end {
            return offset_error(version_at + 12, "bitmap", header.bitmap_offset, "at or after", end);
        }
        let bitmap_end = header.bitmap_offset.checked_add(header.bitmap_len(used_length));
        if bitmap_end.is_none_or(|bitmap_end| header.pages_offset < bitmap_end) {
            let bound = bitmap_end.unwrap_or(u64::MAX);
            return offset_error(version_at + 20, "pages", header.pages_offset, "after the bitmap at", bound);
        }
        if !header.pages_offset.is_multiple_of(pages.size()) {
            return offset_error(version_at + 20, "pages", header.pages_offset, "a multiple of", pages.size());
        }
        if header.gap(end, used_length).is_none() {
            let bound = u64::MAX - used_length;
            return offset_error(version_at + 20, "pages", header.pages_offset, "at or before", bound);
        }
        Ok(header)
    }

    pub(super) fn encode(&self, writer: &mut Writer) {
        writer.be32(MAPPED_RAM_VERSION).be64(self.page_size).be64(self.bitmap_offset).be64(self.pages_offset);
    }
}

/// The RAM blocks of a stream, by number and by name.
///
/// ```
/// use qevm_savevm::ram::{RamBlock, RamBlocks};
/// use qevm_wire::CountedString;
///
/// let name = CountedString::new(b"pc.ram").unwrap();
/// let mut blocks = RamBlocks::default();
/// let id = blocks.push(RamBlock::new(name, 0x8000)).unwrap();
/// assert_eq!(blocks.find(b"pc.ram"), Some(id));
/// assert_eq!(blocks.get(id).unwrap().used_length, 0x8000);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RamBlocks {
    blocks: Vec<RamBlock>,
    by_name: HashMap<Box<[u8]>, u32>,
}

impl RamBlocks {
    /// Adds a block at the end of the list.
    ///
    /// # Errors
    /// [`RamError::DuplicateBlock`] if there is one of that name.
    pub fn push(&mut self, block: RamBlock) -> Result<BlockId, RamError> {
        let id = self.blocks.len() as u32;
        if self.by_name.contains_key(block.name.as_bytes()) {
            return Err(RamError::DuplicateBlock { name: block.name });
        }
        self.by_name.insert(block.name.as_bytes().into(), id);
        self.blocks.push(block);
        Ok(BlockId(id))
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.by_name.clear();
    }

    /// The block of this number.
    pub fn get(&self, id: BlockId) -> Option<&RamBlock> {
        self.blocks.get(id.index())
    }

    /// The number of the block of this name.
    pub fn find(&self, name: &[u8]) -> Option<BlockId> {
        self.by_name.get(name).copied().map(BlockId)
    }

    /// All blocks, in the order of the list.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockId, &RamBlock)> {
        self.blocks.iter().enumerate().map(|(i, block)| (BlockId(i as u32), block))
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// True if there is no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Sum of the used lengths in bytes; `None` if it does not fit 64 bits.
    pub fn total(&self) -> Option<u64> {
        self.blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.used_length))
    }

    /// The name of block `id` as an error path shows it.
    pub(crate) fn path(&self, id: BlockId) -> String {
        match self.get(id) {
            Some(block) => format!("block '{}'", block.name),
            None => format!("block number {}", id.0),
        }
    }

    pub(crate) fn known<K: From<RamError>>(&self, id: BlockId, at: u64) -> Result<&RamBlock, Located<K>> {
        self.get(id)
            .ok_or_else(|| Located::new(RamError::NoSuchBlock { found: id.0, blocks: self.len() as u32 }.into(), at))
    }
}
