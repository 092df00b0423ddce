//! multifd with capability `mapped-ram` (QEMU 9.0): the same batches of pages, written to fixed places of a file.
//!
//! There are no channels on the wire: no first packet, no packets, no SYNC and no flush records. Each thread takes
//! batches of at most [`PACKET_DATA`](crate::layout::PACKET_DATA) bytes and writes their runs; which pages are in the
//! file is told by the block's bitmap, which the main thread writes at the end. Zero pages are not written; a page that
//! was written and became zero later only loses its bit. Threads that load share the file by ranges, so that none waits
//! for another.

use crate::PacketError;
use crate::runs::{Run, Runs};
use core::ops::Range;
use qevm_wire::PageGeometry;

/// Longest run that is read in one go, as QEMU does.
const READ_MAX: u64 = 1 << 20;

/// Where the pages of one RAM block lie in the file.
///
/// ```
/// use qevm_multifd::mapped_ram::{FileRun, PageArea};
/// use qevm_wire::PageGeometry;
///
/// let area = PageArea::new(0x10_0000, 0x8000, PageGeometry::X86).unwrap();
/// // A batch of three pages to write, two of them adjacent.
/// let writes: Vec<FileRun> = area.writes(&[0x1000, 0x2000, 0x5000])?.collect();
/// assert_eq!(writes[0], FileRun { file_offset: 0x10_1000, block_offset: 0x1000, len: 0x2000 });
/// // The second of two threads loads the upper half: of pages 4 to 7, only 5 is there.
/// let reads: Vec<FileRun> = area.reads(&[0b0010_0110], area.share(1, 2)).collect();
/// assert_eq!(reads, [FileRun { file_offset: 0x10_5000, block_offset: 0x5000, len: 0x1000 }]);
/// # Ok::<(), qevm_multifd::PacketError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageArea {
    file_offset: u64,
    used_length: u64,
    pages: PageGeometry,
}

/// Bytes to be read or written at one place of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileRun {
    /// Place in the file, in bytes.
    pub file_offset: u64,
    /// Place in the RAM block, in bytes.
    pub block_offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl PageArea {
    /// The pages of a block of `used_length` bytes, of which the first would lie at `file_offset`. `None` if the block
    /// is not whole pages or reaches past the end of what a file can be.
    pub fn new(file_offset: u64, used_length: u64, pages: PageGeometry) -> Option<Self> {
        pages.count(used_length)?;
        file_offset.checked_add(used_length)?;
        Some(PageArea { file_offset, used_length, pages })
    }

    /// What to write for a batch of pages at these offsets in the block.
    ///
    /// # Errors
    /// [`PacketError::Unaligned`] and [`PacketError::Outside`]; nothing is to be written then.
    pub fn writes<'a>(&self, offsets: &'a [u64]) -> Result<impl Iterator<Item = FileRun> + use<'a>, PacketError> {
        for (index, found) in (0..).zip(offsets.iter().copied()) {
            if self.pages.count(found).is_none() {
                return Err(PacketError::Unaligned { index, found, page_size: self.pages.size() });
            }
            if found >= self.used_length {
                return Err(PacketError::Outside { index, found, used_length: self.used_length });
            }
        }
        let area = *self;
        Ok(Runs::new(offsets.iter().copied(), self.pages).map(move |run| area.place(run)))
    }

    /// The part of the block that thread number `thread` of `threads` loads, in bytes. All parts together are the
    /// block; they do not overlap.
    pub fn share(&self, thread: u8, threads: u8) -> Range<u64> {
        let count = u128::from(self.used_length >> self.pages.bits());
        let bound = |thread: u128| ((count * thread / u128::from(threads.max(1))) as u64) << self.pages.bits();
        bound(thread.into()).min(self.used_length)..bound(u128::from(thread) + 1).min(self.used_length)
    }

    /// What to read of the bytes `range` of the block: the runs of pages whose bit is set in the block's `bitmap`
    /// (bit `i % 8` of byte `i / 8` for page `i`), in pieces of at most 1 MiB. Pages without a bit are zero; a bitmap
    /// that is too short has no bits after its end.
    pub fn reads<'a>(&self, bitmap: &'a [u8], range: Range<u64>) -> impl Iterator<Item = FileRun> + use<'a> {
        let (area, bits) = (*self, self.pages.bits());
        let last = self.used_length.min(range.end) >> bits;
        let known = (bitmap.len() as u64).saturating_mul(8).min(last);
        let present = move |page: u64| bitmap[(page / 8) as usize] & (1 << (page % 8)) != 0;
        let mut page = range.start >> bits;
        core::iter::from_fn(move || {
            while page < known && !present(page) {
                // Holes are long: skip them by the byte.
                page = if bitmap[(page / 8) as usize] >> (page % 8) == 0 { (page / 8 + 1) * 8 } else { page + 1 };
            }
            let first = page;
            while page < known && present(page) && (page - first) << bits < READ_MAX {
                page += 1;
            }
            (first < page.min(known)).then(|| area.place(Run { offset: first << bits, len: (page - first) << bits }))
        })
    }

    fn place(&self, run: Run) -> FileRun {
        FileRun { file_offset: self.file_offset + run.offset, block_offset: run.offset, len: run.len }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn area(pages: u64) -> PageArea {
        PageArea::new(0x30_0000, pages * PAGE, PageGeometry::X86).unwrap()
    }

    #[test]
    fn areas_that_no_file_can_hold_do_not_exist() {
        assert_eq!(PageArea::new(0, 0x1001, PageGeometry::X86), None);
        assert_eq!(PageArea::new(u64::MAX - 0xfff, 0x1000, PageGeometry::X86), None);
    }

    #[test]
    fn pages_outside_or_between_are_not_written() {
        let error = area(4).writes(&[0, 0x1800]).err();
        assert_eq!(error, Some(PacketError::Unaligned { index: 1, found: 0x1800, page_size: 4096 }));
        let error = area(4).writes(&[0x4000]).err();
        assert_eq!(error, Some(PacketError::Outside { index: 0, found: 0x4000, used_length: 0x4000 }));
    }

    #[test]
    fn long_runs_are_read_in_pieces_and_short_bitmaps_end() {
        let reads: Vec<_> = area(600).reads(&[0xff; 75], 0..600 * PAGE).map(|run| run.len / PAGE).collect();
        assert_eq!(reads, [256, 256, 88]);
        let reads: Vec<_> = area(600).reads(&[0xff; 2], 0..600 * PAGE).map(|run| run.len / PAGE).collect();
        assert_eq!(reads, [16]);
        assert_eq!(area(600).reads(&[], 0..600 * PAGE).next(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn all_threads_together_read_each_page_that_is_there_once(
            bitmap in prop::collection::vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 0..80),
            odd in 0u64..8,
            threads in 1u8..20,
        ) {
            let pages = (bitmap.len() as u64 * 8).saturating_sub(odd);
            let area = area(pages);
            let mut read = vec![0; pages as usize];
            for thread in 0..threads {
                let share = area.share(thread, threads);
                for run in area.reads(&bitmap, share.clone()) {
                    prop_assert!(run.len > 0 && run.len <= READ_MAX);
                    prop_assert!(run.block_offset >= share.start && run.block_offset + run.len <= share.end);
                    prop_assert_eq!(run.file_offset, 0x30_0000 + run.block_offset);
                    for page in run.block_offset / PAGE..(run.block_offset + run.len) / PAGE {
                        read[page as usize] += 1;
                    }
                }
            }
            for (page, times) in read.into_iter().enumerate() {
                prop_assert_eq!(times, bitmap[page / 8] >> (page % 8) & 1);
            }
        }

        #[test]
        fn what_is_written_is_what_was_asked_for(pages in prop::collection::vec(0u64..64, 0..128)) {
            let offsets: Vec<_> = pages.iter().map(|page| page * PAGE).collect();
            let runs: Vec<_> = area(64).writes(&offsets).unwrap().collect();
            let written: Vec<_> = runs.iter().flat_map(|run| (run.block_offset..run.block_offset + run.len).step_by(4096)).collect();
            prop_assert_eq!(written, offsets);
            prop_assert!(runs.iter().all(|run| run.file_offset == 0x30_0000 + run.block_offset));
        }
    }
}
