//! Guest-physical memory in the kdump-compressed format, as `crash` opens it and `makedumpfile` and QMP
//! `dump-guest-memory` write it. See `docs/format/kdump.md`.

mod frames;
mod header;
mod pages;
mod parts;

pub use parts::PageCompression;

use super::{Guest, PhysicalMemory, finish, write_error};
use crate::failure::Error;
use crate::output_file::{OutputFile, Runs};
use crate::ram::{GuestRam, Stretch};
use frames::Frames;
use header::{Header, Shape};
use pages::Pages;
use parts::Misplaced;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

impl PhysicalMemory {
    /// Writes the memory as a kdump-compressed file with the registers of the guest's CPUs, and tells `progress` how
    /// many bytes of memory are in it.
    ///
    /// # Errors
    /// [`Error::Usage`] if the memory reaches up to an address that the format has no place for, [`Error::Bad`] with
    /// kind `io` if a file cannot be read or written.
    pub fn write_kdump(
        &self,
        ram: &mut GuestRam,
        guest: &Guest,
        compression: PageCompression,
        output: OutputFile,
        progress: &mut dyn FnMut(u64),
    ) -> Result<u64, Error> {
        let (format, notes) = self.notes(ram, guest)?;
        let shape = Shape::of(format);
        let ranges = self.frame_ranges(shape.frame_size);
        let first_address = self.segments.first().map_or(0, |first| first.address);
        let cpus = guest.cpu_count() as u32;
        let header = Header::new(shape, &notes, cpus, first_address, &ranges, compression).ok_or_else(|| {
            let end = ranges.last().map_or(0, |last| last.end);
            Error::Usage(format!("{end:#x} pages of memory are more than a kdump-compressed file can have: use --elf"))
        })?;
        let (path, file) = (output.path(), output.file());
        let failed = |(place, error): Misplaced| write_error(path, place, &error);
        file.write_all_at(&header.bytes, 0).map_err(|error| write_error(path, 0, &error))?;
        for bitmap in header.bitmaps {
            write_bitmap(file, bitmap, &ranges).map_err(failed)?;
        }
        let pages = Pages::new(file, format, compression, &header, shape.frame_size).map_err(failed)?;
        let mut frames = Frames::new(pages, shape.frame_size);
        let (mut done, page_size) = (0, ram.page_size());
        for segment in &self.segments {
            let end = segment.block_offset + segment.len;
            ram.stretches(segment.block, segment.block_offset, segment.len, |offset, stretch| {
                let address = segment.address + (offset - segment.block_offset);
                let rest = end - offset;
                let len = match stretch {
                    Stretch::Data(pages) => (pages.len() as u64).min(rest),
                    Stretch::Absent(pages) | Stretch::Zero(pages) => pages.saturating_mul(page_size).min(rest),
                };
                match stretch {
                    Stretch::Data(pages) => frames.put(address, &pages[..len as usize]),
                    Stretch::Absent(_) | Stretch::Zero(_) => frames.put_zeroes(address, len),
                }
                .map_err(failed)?;
                done += len;
                progress(done);
                Ok::<(), Error>(())
            })?;
        }
        let end = frames.finish().map_err(failed)?;
        finish(output, end)
    }

    /// The pages of a dump of which there is a byte, as ranges of their numbers, in order.
    fn frame_ranges(&self, frame_size: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for segment in self.segments.iter().filter(|segment| segment.len > 0) {
            let end = segment.address + segment.len;
            let (first, end) = (segment.address / frame_size, end.div_ceil(frame_size));
            match ranges.last_mut().filter(|last| last.end >= first) {
                Some(last) => last.end = end,
                None => ranges.push(first..end),
            }
        }
        ranges
    }
}

/// Writes the bits of `ranges`, the first of which is the lowest one of the byte at `start`.
fn write_bitmap(file: &File, start: u64, ranges: &[Range<u64>]) -> Result<(), Misplaced> {
    const ONES: [u8; 4096] = [0xff; 4096];
    let mut out = Runs::new(file);
    // A byte that is not written yet, as another range may have bits in it.
    let mut open: Option<(u64, u8)> = None;
    for range in ranges {
        let mut bit = range.start;
        while bit < range.end {
            let (byte, whole) = (bit / 8, (range.end - bit) / 8);
            if let Some((at, bits)) = open.take_if(|(at, _)| *at != byte) {
                out.put(start + at, &[bits])?;
            }
            if bit.is_multiple_of(8) && whole > 0 {
                let bytes = whole.min(ONES.len() as u64);
                out.put(start + byte, &ONES[..bytes as usize])?;
                bit += bytes * 8;
            } else {
                open.get_or_insert((byte, 0)).1 |= 1 << (bit % 8);
                bit += 1;
            }
        }
    }
    if let Some((at, bits)) = open {
        out.put(start + at, &[bits])?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extract::Piece;
    use std::io::Read;

    #[test]
    fn a_bit_is_a_page() {
        for ranges in [vec![0..8, 9..10, 12..13, 15..40, 41..70000], vec![3..5, 6..7], vec![], vec![7..8, 16..24]] {
            let mut file = tempfile::tempfile().unwrap();
            write_bitmap(&file, 0, &ranges).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            let set = (0..bytes.len() as u64 * 8).filter(|bit| bytes[(bit / 8) as usize] >> (bit % 8) & 1 != 0);
            assert_eq!(set.collect::<Vec<_>>(), ranges.into_iter().flatten().collect::<Vec<u64>>());
        }
    }

    #[test]
    fn a_page_with_a_byte_of_memory_counts_once() {
        let piece = |address, len| Piece { block: 0, address, block_offset: 0, len };
        let segments = vec![piece(0x800, 0x1000), piece(0x1800, 0x400), piece(0x3000, 0), piece(0x5fff, 2)];
        let memory = PhysicalMemory { segments, devices: Vec::new(), notes: Vec::new(), left_out: Vec::new() };
        assert_eq!(memory.frame_ranges(0x1000), [0..2, 5..7]);
        assert!(matches!(&memory.frame_ranges(0x10000)[..], [Range { start: 0, end: 1 }]));
    }
}
