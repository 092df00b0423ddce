//! A guest as a mapped-ram file that was never written: each part of it is made when it is read.

use super::SavedGuest;
use super::mapped::Layout;
use crate::bounds::Spool;
use crate::failure::{Error, Failure};
use crate::pages::Pages;
use crate::ram::Keep;
use crate::stream::Inputs;

/// The bytes of the mapped-ram file that `qevm convert` would write of a guest, for any number of threads.
///
/// Memory stays where it is, see [`Pages`]. QEMU 9.0 and newer load such a file.
///
/// ```
/// use qevm_inspect::{bounds::Spool, rewrite::mapped_file::MappedFile, stream::Inputs};
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/streams/7.2-postcopy.zst"));
/// let mut inputs = Inputs::of_file(path)?;
/// let file = MappedFile::index(&mut inputs, Spool::new(1 << 30), &mut |_| ())?;
/// let mut magic = [0; 4];
/// file.read_at(&mut magic, 0)?;
/// assert_eq!(&magic, b"QEVM");
/// # Ok::<(), qevm_inspect::failure::Error>(())
/// ```
#[derive(Debug)]
pub struct MappedFile {
    pages: Pages,
    /// In order, and not overlapping; what is between them is zero.
    parts: Vec<Part>,
    len: u64,
}

#[derive(Debug)]
struct Part {
    offset: u64,
    len: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Stream(Vec<u8>),
    /// One bit for each page of this block that is not zero.
    Bitmap(usize),
    /// The pages of this block.
    Pages(usize),
}

impl MappedFile {
    /// Reads a migration to its end, but for the contents of pages that can be read later; tells `position` how far it
    /// is.
    ///
    /// What cannot be read again where it is (a stream that comes through a pipe or is compressed, and pages that are
    /// compressed or sent as differences) goes to a temporary file, out of `spool`.
    ///
    /// # Errors
    /// As [`SavedGuest::read`]; [`Error::Bad`] of kind `limit` if `spool` has not enough room.
    pub fn index(inputs: &mut Inputs, spool: Spool, position: &mut dyn FnMut(u64)) -> Result<MappedFile, Error> {
        let name = inputs.main.name.clone();
        let guest = SavedGuest::read_with(inputs, Keep::Places, spool, u64::MAX, position, None)?;
        let Layout { parts, blocks, len } = guest.layout(&name)?;
        let stream = parts.into_iter().map(|(offset, bytes)| Part {
            offset,
            len: bytes.len() as u64,
            content: Content::Stream(bytes),
        });
        let areas = blocks.iter().enumerate().filter(|(_, layout)| !layout.header.is_absent());
        let areas = areas.flat_map(|(block, layout)| {
            let header = layout.header;
            let bitmap =
                Part { offset: header.bitmap_offset, len: layout.bitmap_len(), content: Content::Bitmap(block) };
            [bitmap, Part { offset: header.pages_offset, len: layout.used_length, content: Content::Pages(block) }]
        });
        let mut parts: Vec<Part> = stream.chain(areas).filter(|part| part.len > 0).collect();
        parts.sort_by_key(|part| part.offset);
        Ok(MappedFile { pages: Pages::new(guest.ram)?, parts, len })
    }

    /// The guest's memory.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a stream has a header.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buffer` with the bytes from `offset` on. What is beyond the end is zero.
    ///
    /// # Errors
    /// The [`Failure`] of a page that cannot be read, with its byte in the image and its path.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        buffer.fill(0);
        let end = offset.saturating_add(buffer.len() as u64);
        let first = self.parts.partition_point(|part| part.offset + part.len <= offset);
        for part in self.parts[first..].iter().take_while(|part| part.offset < end) {
            let (from, to) = (offset.max(part.offset), end.min(part.offset + part.len));
            let target = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            let from = from - part.offset;
            match &part.content {
                Content::Stream(bytes) => target.copy_from_slice(&bytes[from as usize..][..target.len()]),
                Content::Bitmap(block) => self.bitmap(*block, from, target),
                Content::Pages(block) => self.pages.read_bytes(*block, from, target)?,
            }
        }
        Ok(())
    }

    /// How many of the `len` bytes from `offset` on are known to be zero.
    pub fn zeroes_at(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len);
        let mut at = offset;
        let first = self.parts.partition_point(|part| part.offset + part.len <= offset);
        for part in &self.parts[first..] {
            at = at.max(part.offset.min(end));
            let Content::Pages(block) = part.content else { break };
            if at >= end {
                break;
            }
            let zeroes = self.pages.zeroes_at(block, at - part.offset, end.min(part.offset + part.len) - at);
            at += zeroes;
            if at < part.offset + part.len {
                break;
            }
        }
        at.min(end) - offset
    }

    fn bitmap(&self, block: usize, from: u64, target: &mut [u8]) {
        let pages = self.pages.blocks()[block].len / self.pages.page_size();
        let (first, end) = (from * 8, pages.min((from + target.len() as u64) * 8));
        let mut page = first;
        while page < end {
            let (count, present) = self.pages.run(block, page, end);
            if present {
                (page..page + count).for_each(|page| target[(page / 8 - from) as usize] |= 1 << (page % 8));
            }
            page += count;
        }
    }
}
