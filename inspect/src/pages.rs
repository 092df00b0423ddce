//! Guest memory of an image, page by page in any order, without reading the rest.
//!
//! Whatever [`open`](crate::open) opens can be read like this. One pass over the image finds where its pages are; their
//! contents are read when they are asked for, from where they lie in the file, by any number of threads. The index
//! costs 8 to 16 bytes for a page, and next to nothing for pages in a row and pages of zeroes. Of a mapped-ram file
//! only the stream and the bitmaps are read.
//!
//! Contents that do not lie in a file as they are go to a temporary file in that pass: all of a compressed image or of
//! one that comes through a pipe, and pages that are compressed or were sent as differences (XBZRLE).

use crate::bounds::Spool;
use crate::failure::{Error, Failure};
use crate::ram::{GuestRam, Keep, Lost, StoredPages};
use crate::stream::{Inputs, Layouts, Observer, Settings, analyze};
use qevm_wire::Fault;

/// The memory of a guest in an image.
///
/// ```
/// use qevm_inspect::{bounds::Spool, pages::Pages, stream::Inputs};
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/streams/7.2-postcopy.zst"));
/// let pages = Pages::index(&mut Inputs::of_file(path)?, Spool::new(1 << 30), &mut |_| ())?;
/// let ram = pages.blocks().iter().position(|block| block.name == "mem").unwrap();
/// let mut page = vec![0; pages.page_size() as usize];
/// pages.read(ram, 0x1000, &mut page)?;
/// # Ok::<(), qevm_inspect::failure::Error>(())
/// ```
#[derive(Debug)]
pub struct Pages {
    blocks: Vec<PageBlock>,
    stored: StoredPages,
}

/// A RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBlock {
    /// Its name; bytes that are not ASCII are escaped.
    pub name: String,
    /// Its length in bytes, whole pages.
    pub len: u64,
}

struct Position<'p>(&'p mut dyn FnMut(u64));

impl Observer for Position<'_> {
    fn position(&mut self, offset: u64) {
        (self.0)(offset);
    }
}

impl Pages {
    /// Finds the pages of a migration, and tells `position` how far it is. What goes to a temporary file comes out of
    /// `spool`.
    ///
    /// # Errors
    /// [`Error::Bad`] if the migration is bad or incomplete, and of kind `limit` if `spool` has not enough room;
    /// [`Error::Usage`] if it has no memory.
    pub fn index(inputs: &mut Inputs, spool: Spool, position: &mut dyn FnMut(u64)) -> Result<Pages, Error> {
        let settings = Settings {
            keep: Keep::Places,
            reencode: false,
            complete: true,
            strict: false,
            live: false,
            layouts: Layouts::default(),
            spool,
            max_ram: u64::MAX,
        };
        let mut analysis = analyze(inputs, &settings, &mut Position(position));
        if let Some(failure) = analysis.failure.take() {
            return Err(failure.into());
        }
        let ram = analysis.ram.ok_or_else(|| Error::Usage(format!("{}: has no guest memory", inputs.main.name)))?;
        Pages::new(ram)
    }

    pub(crate) fn new(ram: GuestRam) -> Result<Pages, Error> {
        let block = |block: &crate::ram::Block| PageBlock { name: block.name.clone(), len: block.used_length };
        let blocks = ram.blocks().iter().map(block).collect();
        Ok(Pages { blocks, stored: ram.into_stored()? })
    }

    /// The RAM blocks, in the order of the stream.
    pub fn blocks(&self) -> &[PageBlock] {
        &self.blocks
    }

    /// Bytes in a page.
    pub fn page_size(&self) -> u64 {
        self.stored.page_size()
    }

    /// Reads pages of a block, which has its number in [`blocks`](Self::blocks), from byte `offset` on into all of
    /// `into`. Pages that the image does not have are zero.
    ///
    /// # Errors
    /// A [`Failure`] with byte and path: of kind `truncated` if the image was cut meanwhile, `malformed` if it was
    /// changed since it was indexed or its container is damaged, `io` if it cannot be read; of kind `misuse` if there
    /// is no such block or no such page in it, or if offset and length are not whole pages. What is in `into` then
    /// means nothing.
    pub fn read(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), Failure> {
        let (size, len) = (self.page_size(), into.len() as u64);
        let fits = self.blocks.get(block).is_some_and(|block| offset <= block.len && len <= block.len - offset);
        if !fits || !offset.is_multiple_of(size) || !len.is_multiple_of(size) {
            let (kind, path) = (Fault::Misuse.as_str(), format!("RAM block number {block}"));
            let message = format!("no whole pages of it are the {len} bytes from {offset:#x} on");
            return Err(Failure { file: "request".into(), kind, offset, path, message });
        }
        self.stored.read(block, offset, into).map_err(|Lost { file, offset, page, error }| {
            let name = &self.blocks[block].name;
            Failure { path: format!("RAM block '{name}' › page {page:#x}"), ..Failure::io(file, offset, &error) }
        })
    }

    /// How many of `len` bytes from byte `offset` of a block on are zero, as far as that is known without reading them.
    pub fn zeroes_at(&self, block: usize, offset: u64, len: u64) -> u64 {
        let Some(found) = self.blocks.get(block) else { return 0 };
        let (size, end) = (self.page_size(), offset.saturating_add(len).min(found.len));
        let mut at = offset;
        while at < end {
            let (pages, present) = self.run(block, at / size, end.div_ceil(size));
            if present {
                break;
            }
            at = (at / size + pages).saturating_mul(size);
        }
        at.min(end).saturating_sub(offset)
    }

    /// How many pages from number `page` of `block` on, up to `end`, are all in the image or all not, and which.
    pub(crate) fn run(&self, block: usize, page: u64, end: u64) -> (u64, bool) {
        self.stored.run(block, page, end)
    }

    /// As [`read`](Self::read), of any bytes of the block.
    pub(crate) fn read_bytes(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), Failure> {
        let (size, end) = (self.page_size(), offset + into.len() as u64);
        if offset.is_multiple_of(size) && end.is_multiple_of(size) {
            return self.read(block, offset, into);
        }
        let first = offset / size * size;
        let mut pages = vec![0; (end.next_multiple_of(size) - first) as usize];
        self.read(block, first, &mut pages)?;
        into.copy_from_slice(&pages[(offset - first) as usize..][..into.len()]);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
