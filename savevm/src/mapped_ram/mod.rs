//! mapped-ram files (capability `mapped-ram`, since 9.0): every page has its place in the file.
//!
//! In the START section each RAM block's record carries a [`MappedRamHeader`]; the stream then jumps over the block's
//! bitmap and pages. So any page can be read, and written, without touching the rest, by any number of threads.
//!
//! | part | where |
//! |---|---|
//! | bitmap | [`MappedRamHeader::bitmap_offset`], one bit per page ([`PageBitmap`]) |
//! | page *i* | `pages_offset` + *i* × page size ([`MappedBlock::page_offset`]) |
//! | next byte of the stream | `pages_offset` + used length ([`MappedBlock::end`]) |
//!
//! **The bitmap is authoritative**: a page whose bit is clear is zero, whatever the file holds in its place (QEMU 10.0
//! leaves the old contents of a page that became zero; real files show it). With `multifd` the file is the same; only
//! more threads write it.
//!
//! Nothing here does I/O: the types say which ranges of the file to read or write. Nothing panics; a [`PageBitmap`]
//! takes an eighth of a byte per page, within the caller's [`Limits`](qevm_wire::Limits).
//!
//! ```
//! use qevm_savevm::mapped_ram::{FileRange, MappedBlock, PageBitmap};
//! use qevm_wire::PageGeometry;
//!
//! // A source that is about to write the header of a 16 KiB block at file offset 100.
//! let block = MappedBlock::place(100, 0x4000, PageGeometry::X86).unwrap();
//! assert_eq!((block.header.bitmap_offset, block.header.pages_offset), (128, 0x10_0000));
//!
//! let mut present = PageBitmap::new(block.pages());
//! present.set(1);
//! present.set(2);
//! let ranges: Vec<FileRange> = block.present_ranges(&present, 1 << 20).collect();
//! assert_eq!(ranges, [FileRange { block_offset: 0x1000, file_offset: 0x10_1000, len: 0x2000 }]);
//! ```

mod bitmap;

pub use bitmap::{PageBitmap, Runs};

use crate::ram::{MappedRamHeader, RamBlock};
use qevm_wire::{Blame, Fault, PageGeometry};

/// Writers align each block's pages to this (QEMU 9.0 to 11.1). Readers only ask for whole pages.
pub const PAGES_ALIGNMENT: u64 = 1 << 20;

/// QEMU's loader reads at most this many bytes at a time (10.0).
pub const READ_CHUNK: u64 = 1 << 20;

/// What can be wrong with a mapped-ram file beyond its headers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappedRamError {
    /// A bitmap of the wrong size.
    #[error("mapped-ram bitmap has {found} bytes, expected {expected} for {pages} pages")]
    BitmapLength {
        /// Bytes given.
        found: u64,
        /// Bytes that many pages take.
        expected: u64,
        /// Pages of the block.
        pages: u64,
    },
    /// A bit past the last page is set.
    #[error("mapped-ram bitmap has page {found} set, but the block has {pages} pages")]
    BitBehindLastPage {
        /// Number of the page.
        found: u64,
        /// Pages of the block.
        pages: u64,
    },
    /// A page that the bitmap says is present lies past the end of the file.
    #[error("page {page} is at file offset {file_offset:#x}, but the file ends at {file_len:#x}")]
    PageBehindFile {
        /// Number of the page.
        page: u64,
        /// Where the page should start.
        file_offset: u64,
        /// Length of the file.
        file_len: u64,
    },
}

impl Blame for MappedRamError {
    fn fault(&self) -> Fault {
        match self {
            MappedRamError::PageBehindFile { .. } => Fault::Truncated,
            _ => Fault::Malformed,
        }
    }
}

/// A RAM block of a mapped-ram file: its header and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MappedBlock {
    /// Where bitmap and pages are.
    pub header: MappedRamHeader,
    /// Used length of the block in bytes; whole pages.
    pub used_length: u64,
}

/// A run of pages: which bytes of the block, and where the file has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileRange {
    /// Offset in the RAM block, in bytes.
    pub block_offset: u64,
    /// Offset from the start of the file, in bytes.
    pub file_offset: u64,
    /// Length in bytes; whole pages.
    pub len: u64,
}

impl MappedBlock {
    /// The block as a START section lists it; `None` if it has no mapped-ram header.
    pub fn of(block: &RamBlock) -> Option<Self> {
        Some(MappedBlock { header: block.mapped_ram?, used_length: block.used_length })
    }

    /// Lays a block out for writing: its 28-byte header is about to be written at file offset `header_offset`. `None`
    /// if `used_length` is no whole number of pages, or the file would be longer than offsets can say.
    pub fn place(header_offset: u64, used_length: u64, pages: PageGeometry) -> Option<Self> {
        let count = pages.count(used_length)?;
        let bitmap_offset = header_offset.checked_add(MappedRamHeader::LEN)?;
        let pages_offset = bitmap_offset.checked_add(bitmap_len(count))?.checked_next_multiple_of(PAGES_ALIGNMENT)?;
        pages_offset.checked_add(used_length)?;
        let header = MappedRamHeader { page_size: pages.size(), bitmap_offset, pages_offset };
        Some(MappedBlock { header, used_length })
    }

    /// As [`place`](MappedBlock::place), for a `block` whose record in the list is about to be written at file offset
    /// `record_offset`. The header follows name, length and, with `x-ignore-shared`, address.
    ///
    /// ```
    /// use qevm_savevm::{mapped_ram::MappedBlock, ram::RamBlock};
    /// use qevm_wire::PageGeometry;
    ///
    /// let block = RamBlock::new("pc.ram".try_into()?, 0x4000);
    /// let layout = MappedBlock::place_record(100, &block, PageGeometry::X86).unwrap();
    /// assert_eq!(layout.header.bitmap_offset, 100 + 1 + 6 + 8 + 28);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn place_record(record_offset: u64, block: &RamBlock, pages: PageGeometry) -> Option<Self> {
        const WORD: u64 = 8;
        let words = if block.address.is_some() { 2 * WORD } else { WORD };
        let before = words + block.name.wire_len() as u64;
        MappedBlock::place(record_offset.checked_add(before)?, block.used_length, pages)
    }

    /// How many pages the block has.
    pub fn pages(&self) -> u64 {
        self.used_length.checked_div(self.header.page_size).unwrap_or(0)
    }

    /// How many bytes the bitmap takes.
    pub fn bitmap_len(&self) -> u64 {
        bitmap_len(self.pages())
    }

    /// File offset of page `page`; `None` past the last page.
    pub fn page_offset(&self, page: u64) -> Option<u64> {
        (page < self.pages()).then(|| self.header.pages_offset + page * self.header.page_size)
    }

    /// Where the bitmap says whether page `page` is present: the file offset of a byte, and the bit in it. `None` past
    /// the last page. A page at random is read with two reads: this byte, then the page, if the bit is set.
    ///
    /// ```
    /// use qevm_savevm::mapped_ram::{MappedBlock, PageBitmap};
    /// use qevm_wire::PageGeometry;
    ///
    /// let block = MappedBlock::place(100, 0x10_0000, PageGeometry::X86).unwrap();
    /// let (offset, bit) = block.presence(13).unwrap();
    /// let mut bitmap = PageBitmap::new(block.pages());
    /// bitmap.set(13);
    /// assert_ne!(bitmap.as_bytes()[(offset - block.header.bitmap_offset) as usize] & bit, 0);
    /// ```
    pub fn presence(&self, page: u64) -> Option<(u64, u8)> {
        let offset = self.header.bitmap_offset.checked_add(page / 8)?;
        (page < self.pages()).then_some((offset, 1 << (page % 8)))
    }

    /// File offset of the first byte after the pages, where the stream goes on.
    pub fn end(&self) -> u64 {
        self.header.pages_offset.saturating_add(self.used_length)
    }

    /// The ranges of the file that hold the pages of `present`, each at most `max_len` bytes (but at least a page), in
    /// order of their place.
    pub fn present_ranges<'a>(&self, present: &'a PageBitmap, max_len: u64) -> impl Iterator<Item = FileRange> + 'a {
        let block = *self;
        let pages_at_once = (max_len / block.header.page_size.max(1)).max(1);
        present.runs(pages_at_once).filter_map(move |(first, count)| {
            Some(FileRange {
                block_offset: first * block.header.page_size,
                file_offset: block.page_offset(first)?,
                len: count * block.header.page_size,
            })
        })
    }

    /// The pages of the block cut into `parts` consecutive shares of nearly equal size: what each thread of a
    /// multifd reader or writer takes. Shares may be empty.
    pub fn share(&self, parts: u64) -> impl Iterator<Item = core::ops::Range<u64>> + use<> {
        let (pages, parts) = (self.pages(), parts.max(1));
        let (each, longer) = (pages / parts, pages % parts);
        (0..parts).map(move |part| {
            let start = part * each + part.min(longer);
            start..start + each + u64::from(part < longer)
        })
    }

    /// Checks that a file of `file_len` bytes has every page that `present` says it has.
    ///
    /// # Errors
    /// [`MappedRamError::PageBehindFile`] with the first page that it has not.
    pub fn check_file_len(&self, present: &PageBitmap, file_len: u64) -> Result<(), MappedRamError> {
        let whole = file_len.saturating_sub(self.header.pages_offset).checked_div(self.header.page_size).unwrap_or(0);
        match present.first_at_or_behind(whole) {
            None => Ok(()),
            Some(page) => {
                let file_offset = self.header.pages_offset.saturating_add(page.saturating_mul(self.header.page_size));
                Err(MappedRamError::PageBehindFile { page, file_offset, file_len })
            }
        }
    }
}

/// Bytes of a bitmap over `pages` pages: whole 64-bit words.
fn bitmap_len(pages: u64) -> u64 {
    pages.div_ceil(64) * 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(pages: u64) -> MappedBlock {
        MappedBlock::place(0x1234, pages * 4096, PageGeometry::X86).unwrap()
    }

    #[test]
    fn the_layout_is_that_of_the_format() {
        let b = block(65);
        assert_eq!(b.header.bitmap_offset, 0x1234 + 28);
        assert_eq!(b.bitmap_len(), 16);
        assert_eq!(b.header.pages_offset, 0x10_0000);
        assert_eq!(b.page_offset(64), Some(0x10_0000 + 64 * 4096));
        assert_eq!(b.page_offset(65), None);
        assert_eq!(b.end(), 0x10_0000 + 65 * 4096);
        // A bitmap that ends exactly on the alignment needs no gap.
        let exact = MappedBlock::place((1 << 20) - 28 - 8, 4096, PageGeometry::X86).unwrap();
        assert_eq!(exact.header.pages_offset, 1 << 20);
    }

    #[test]
    fn what_cannot_be_laid_out_is_refused() {
        assert_eq!(MappedBlock::place(0, 4097, PageGeometry::X86), None);
        assert_eq!(MappedBlock::place(u64::MAX - 8, 4096, PageGeometry::X86), None);
        assert_eq!(MappedBlock::place(u64::MAX - (1 << 20), 4096, PageGeometry::X86), None);
    }

    #[test]
    fn a_page_behind_the_file_is_found() {
        let b = block(8);
        let mut present = PageBitmap::new(8);
        present.set(2);
        present.set(6);
        assert_eq!(b.check_file_len(&present, b.page_offset(7).unwrap()), Ok(()));
        let cut = b.page_offset(7).unwrap() - 1;
        let file_offset = b.page_offset(6).unwrap();
        let error = b.check_file_len(&present, cut).unwrap_err();
        assert_eq!(error, MappedRamError::PageBehindFile { page: 6, file_offset, file_len: cut });
        assert_eq!(error.fault(), Fault::Truncated);
        assert!(matches!(b.check_file_len(&present, 0), Err(MappedRamError::PageBehindFile { page: 2, .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn ranges_cover_exactly_the_present_pages(set in prop::collection::btree_set(0u64..300, 0..120), max in 1u64..20_000) {
            let b = block(300);
            let mut present = PageBitmap::new(300);
            set.iter().for_each(|&page| present.set(page));
            let mut covered = Vec::new();
            for range in b.present_ranges(&present, max) {
                prop_assert!(range.len <= max.max(4096));
                prop_assert_eq!(range.file_offset - b.header.pages_offset, range.block_offset);
                covered.extend((range.block_offset..range.block_offset + range.len).step_by(4096).map(|o| o / 4096));
            }
            prop_assert_eq!(covered, Vec::from_iter(set));
        }

        #[test]
        fn shares_are_a_partition(pages in 0u64..1000, parts in 0u64..300) {
            let mut next = 0;
            for share in block(pages).share(parts) {
                prop_assert_eq!(share.start, next);
                next = share.end;
            }
            prop_assert_eq!(next, pages);
        }
    }
}
