//! RAM records applied to the guest's memory.

use super::observer::Observer;
use crate::bounds::Spool;
use crate::failure::Failure;
use crate::ram::{GuestRam, Keep};
use crate::source::Source;
use flate2::{Decompress, FlushDecompress, Status};
use qevm_savevm::mapped_ram::PageBitmap;
use qevm_savevm::ram::{MappedRamHeader, PageAt};
use std::io;

/// Bytes of a mapped-ram bitmap that are read at a time, where the input can be read in any order: 32 GiB of guest.
const BITMAP_PIECE: u64 = 1 << 20;

/// The guest's memory, and what is needed to apply pages that are not sent as they are.
pub(super) struct Memory {
    pub(super) ram: GuestRam,
    page: Vec<u8>,
    inflate: Decompress,
}

/// Why a page could not be applied.
pub(super) enum Fault {
    /// The page's data is bad.
    Malformed(String),
    /// The page's data is bad at a known place.
    Located(qevm_savevm::Error),
    /// The input ended; this many bytes were missing.
    Truncated(u64),
    /// A file could not be read or written.
    Io(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Io(error)
    }
}

impl Fault {
    /// The failure of `file` at `offset`, in `path`.
    pub(super) fn failure(self, file: &str, offset: u64, path: &str) -> Failure {
        let (kind, message) = match self {
            Fault::Malformed(message) => ("malformed", message),
            Fault::Truncated(missing) => ("truncated", format!("the input ends here: {missing} more bytes expected")),
            Fault::Located(error) => {
                return Failure::located(file, error.within(path.to_owned()).within("section 'ram'"));
            }
            Fault::Io(error) => return Failure::io(file, offset, &error),
        };
        Failure { file: file.to_owned(), kind, offset, path: format!("section 'ram' › {path}"), message }
    }
}

impl Memory {
    pub(super) fn new(page_size: u64, keep: Keep, spool: Spool) -> io::Result<Self> {
        let (page, inflate) = (vec![0; page_size as usize], Decompress::new(true));
        Ok(Memory { ram: GuestRam::new(page_size, keep, spool)?, page, inflate })
    }

    /// Before the first page came, its size turns out to be another.
    pub(super) fn set_page_size(&mut self, page_size: u64, keep: Keep, spool: Spool) -> io::Result<()> {
        let blocks: Vec<(String, u64)> = self.ram.blocks().iter().map(|b| (b.name.clone(), b.used_length)).collect();
        *self = Self::new(page_size, keep, spool)?;
        for (name, used_length) in blocks {
            self.ram.add_block(name, used_length);
        }
        Ok(())
    }

    pub(super) fn into_ram(self) -> GuestRam {
        self.ram
    }

    /// The place of a page as error paths show it.
    pub(super) fn page_path(&self, page: &PageAt) -> String {
        let name = self.ram.blocks().get(page.block.index()).map_or("?", |block| &block.name);
        format!("block '{name}' › page {:#x}", page.offset)
    }

    /// Applies a difference, which lies at `data_at` in the stream, to the page's content.
    pub(super) fn xbzrle(&mut self, page: &PageAt, data: &[u8], data_at: u64) -> Result<(), Fault> {
        if self.ram.keep() == Keep::Nothing {
            return Ok(self.ram.put_unread(page.block.index(), page.offset)?);
        }
        self.ram.read(page.block.index(), page.offset, &mut self.page)?;
        qevm_savevm::xbzrle::decode(data, data_at, &mut self.page)
            .map_err(|error| Fault::Located(error.map(Into::into)))?;
        Ok(self.ram.put(page.block.index(), page.offset, &self.page)?)
    }

    /// Inflates a page that is a zlib stream of its own.
    pub(super) fn compressed(&mut self, page: &PageAt, data: &[u8]) -> Result<(), Fault> {
        if self.ram.keep() == Keep::Nothing {
            return Ok(self.ram.put_unread(page.block.index(), page.offset)?);
        }
        let inflate = &mut self.inflate;
        inflate.reset(true);
        let status = inflate.decompress(data, &mut self.page, FlushDecompress::Finish);
        let whole = inflate.total_out() == self.page.len() as u64 && inflate.total_in() == data.len() as u64;
        match status {
            Ok(Status::StreamEnd) if whole => Ok(self.ram.put(page.block.index(), page.offset, &self.page)?),
            Ok(_) => Err(Fault::Malformed(format!(
                "compressed page inflates to {} bytes from {} of {}, expected {} from all",
                inflate.total_out(),
                inflate.total_in(),
                data.len(),
                self.page.len()
            ))),
            Err(error) => Err(Fault::Malformed(format!("compressed page cannot be inflated: {error}"))),
        }
    }

    /// Reads bitmap and pages of a block of a mapped-ram file, from the end of its header to the end of its pages, and
    /// returns how many pages the bitmap says are in the file. The others are zero: old data may lie in their places.
    pub(super) fn mapped_ram(
        &mut self,
        file: &str,
        source: &mut Source,
        block: usize,
        header: &MappedRamHeader,
        used_length: u64,
        observer: &mut dyn Observer,
    ) -> Result<u64, Fault> {
        let bitmap_len = header.bitmap_len(used_length);
        let count = used_length / header.page_size;
        let piece_len = if source.is_seekable() { BITMAP_PIECE } else { bitmap_len.max(1) };
        let mut pages = 0;
        for start in (0..bitmap_len).step_by(piece_len as usize) {
            if source.is_seekable() {
                source.jump(header.bitmap_offset + start)?;
            } else {
                skip_to(source, header.bitmap_offset)?;
            }
            let first = start * 8;
            let piece_pages = (count - first).min(piece_len * 8);
            let bits = bytes(source, piece_len.min(bitmap_len - start))?;
            let present = present_pages(bits, piece_pages);
            let mut next = 0;
            for (run, length) in present.runs(u64::MAX) {
                let zeroes = run - next;
                self.ram.put_zeroes(block, (first + next) * header.page_size, zeroes * header.page_size)?;
                self.mapped_run(file, source, block, header, first + run, length)?;
                pages += length;
                next = run + length;
                observer.position(source.offset());
            }
            let zeroes = piece_pages - next;
            self.ram.put_zeroes(block, (first + next) * header.page_size, zeroes * header.page_size)?;
        }
        if source.is_seekable() {
            // Where the stream goes on is after all of it, wherever the last page was.
            let read_to = source.offset().max(header.bitmap_offset + bitmap_len);
            source.jump(read_to)?;
        }
        Ok(pages)
    }

    /// Applies `count` pages from number `first` on, all of which the file has. Holes in it are pages of zeroes and are
    /// not read.
    fn mapped_run(
        &mut self,
        file: &str,
        source: &mut Source,
        block: usize,
        header: &MappedRamHeader,
        first: u64,
        count: u64,
    ) -> Result<(), Fault> {
        let page_size = header.page_size;
        let (mut offset, end) = (first * page_size, (first + count) * page_size);
        let by_place = self.ram.keep().is_by_place() && source.is_seekable();
        if by_place && let Some(total) = source.total() {
            let missing = header.pages_offset.saturating_add(end).saturating_sub(total).min(end - offset);
            if missing > 0 && self.ram.keep() == Keep::Contents {
                // Those that are whole came.
                let there = (end - offset - missing) / page_size;
                self.mapped_run(file, source, block, header, first, there)?;
            }
            if missing > 0 {
                source.jump(total)?;
                return Err(Fault::Truncated(missing));
            }
        }
        if by_place && self.ram.keep() == Keep::Places {
            let place = (file, &*source, header.pages_offset + offset);
            return Ok(self.ram.put_place(block, offset, end - offset, place)?);
        }
        // Up to here in the block, the file holds data.
        let mut data_end = offset;
        while offset < end {
            if offset >= data_end {
                let place = header.pages_offset + offset;
                let hole = source.hole_at(place).min(end - offset);
                let skipped = hole / page_size * page_size;
                if skipped > 0 {
                    self.ram.put_zeroes(block, offset, skipped)?;
                    offset += skipped;
                    continue;
                }
                data_end = offset + source.data_at(place).clamp(page_size, end - offset);
            }
            if by_place {
                let len = (data_end - offset).next_multiple_of(page_size).min(end - offset);
                self.ram.put_place(block, offset, len, (file, source, header.pages_offset + offset))?;
                offset += len;
                continue;
            }
            if self.ram.keep() == Keep::Nothing {
                self.ram.put_unread(block, offset)?;
            } else {
                skip_to(source, header.pages_offset + offset)?;
                source.fill(page_size as usize)?;
                let Some(page) = source.window().get(..page_size as usize) else {
                    return Err(Fault::Truncated(page_size - source.window().len() as u64));
                };
                self.ram.put(block, offset, page)?;
                source.consume(page_size as usize);
            }
            offset += page_size;
        }
        Ok(())
    }
}

/// The bitmap of `pages` pages. What is set after the last page means nothing.
fn present_pages(mut bits: Vec<u8>, pages: u64) -> PageBitmap {
    bits.resize(pages.div_ceil(64) as usize * 8, 0);
    for page in pages..pages.next_multiple_of(64) {
        bits[(page / 8) as usize] &= !(1 << (page % 8));
    }
    PageBitmap::from_bytes(bits, pages).unwrap_or_else(|_| PageBitmap::new(0))
}

fn skip_to(source: &mut Source, offset: u64) -> Result<(), Fault> {
    let distance = offset.saturating_sub(source.offset());
    match distance - source.skip(distance)? {
        0 => Ok(()),
        missing => Err(Fault::Truncated(missing)),
    }
}

/// Takes `count` bytes. Memory grows with what is there, not with what is claimed.
fn bytes(source: &mut Source, count: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < count {
        source.fill(1)?;
        let left = count - bytes.len() as u64;
        let step = left.min(source.window().len() as u64) as usize;
        if step == 0 {
            return Err(Fault::Truncated(left));
        }
        bytes.extend_from_slice(&source.window()[..step]);
        source.consume(step);
    }
    Ok(bytes)
}
