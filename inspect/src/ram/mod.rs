//! Guest memory as a destination would have it: which pages came, their digests, and, where asked, their contents.
//!
//! [`GuestRam`] takes pages in the order in which they are applied; the last content of a page wins. It always knows
//! state and CRC-32 of every page that came (4¼ bytes each, beyond 15 GiB of guest in a temporary file). The contents
//! are kept only with [`Keep::Image`]: SHA-256, XBZRLE and extraction need them. Pages that never came cost nothing,
//! however long a block says it is.

mod block;
mod chunk;
mod copy;
mod copying;
mod crc;
mod image;
mod ordered;
mod page_table;
mod places;
mod stored;
mod stretch;

pub use block::Block;
pub use copy::{Destination, PageCopy};
pub use copying::Copying;
pub(crate) use ordered::Ordered;
pub use ordered::OrderedCopy;
pub use page_table::PageState;
pub(crate) use stored::{Lost, StoredPages};
pub use stretch::Stretch;

use crate::bounds::Spool;
use crate::failure::{Error, Failure};
use crate::read_at::read_exact_at;
use crate::source::Source;
use block::no_block;
use crc::PageCrc;
use image::Image;
use page_table::{PageTable, Run};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use stored::Stored;

/// What is kept of the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: pages are not even read.
    Nothing,
    /// State and CRC-32 of each page.
    Digests,
    /// The contents, too, in a temporary file.
    Image,
    /// State of each page, and its content: where it lies in the files, if it can be read there again as it is, and in
    /// a temporary file otherwise. For those who read the pages once more and need no digests.
    Contents,
    /// As [`Contents`](Self::Contents), but nothing else is known of the pages: those that never came are zero.
    Places,
}

impl Keep {
    /// Contents stay in the files where they can.
    pub(crate) fn is_by_place(self) -> bool {
        matches!(self, Keep::Contents | Keep::Places)
    }
}

/// Which digest is computed of each RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamDigest {
    /// CRC-32 as in zlib and Ethernet; needs 4 bytes of memory for each page.
    Crc32,
    /// SHA-256; needs a temporary file as large as the guest's non-zero memory.
    Sha256,
}

impl RamDigest {
    /// Its name, which is also its key in JSON.
    pub fn key(self) -> &'static str {
        match self {
            RamDigest::Crc32 => "crc32",
            RamDigest::Sha256 => "sha256",
        }
    }
}

/// The guest's memory.
#[derive(Debug)]
pub struct GuestRam {
    blocks: Vec<Block>,
    page_size: u64,
    next_page: u64,
    table: PageTable,
    crc: PageCrc,
    image: Option<Image>,
    stored: Option<Stored>,
    copy: Option<Copying>,
    keep: Keep,
    spool: Spool,
}

impl GuestRam {
    /// Memory without blocks, of pages of `page_size` bytes. What goes to temporary files comes out of `spool`.
    pub fn new(page_size: u64, keep: Keep, spool: Spool) -> io::Result<Self> {
        Ok(GuestRam {
            blocks: Vec::new(),
            page_size,
            next_page: 0,
            table: PageTable::new(spool.clone()),
            crc: PageCrc::new(page_size),
            image: if keep == Keep::Image { Some(Image::new(page_size)?) } else { None },
            stored: keep.is_by_place().then(|| Stored::new(page_size)),
            copy: None,
            keep,
            spool,
        })
    }

    /// What is kept of the pages.
    pub fn keep(&self) -> Keep {
        self.keep
    }

    /// Bytes in a page.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Adds a block of `used_length` bytes, whole pages, and returns its number.
    pub fn add_block(&mut self, name: String, used_length: u64) -> usize {
        let first_page = self.next_page;
        self.next_page = PageTable::align(first_page.saturating_add(used_length / self.page_size));
        self.blocks.push(Block { name, used_length, pages: 0, zero_pages: 0, first_page });
        self.blocks.len() - 1
    }

    /// All blocks, in the order in which they were added.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The page at byte `offset` of `block` now holds `bytes`.
    pub fn put(&mut self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.stored.is_some() {
            let room = self.spool.clone();
            let (stored, page) = self.stored(block, offset)?.ok_or_else(no_block)?;
            return match is_zero(bytes) {
                true => self.put_zero(block, offset),
                false => {
                    stored.write(page, bytes, &room)?;
                    self.came(block, offset, 1)?;
                    self.copy(block, offset, bytes)
                }
            };
        }
        let crc = crc32fast::hash(bytes);
        // Only a page with the CRC of a zero page can be one.
        let zero = crc == self.crc.zero_page() && is_zero(bytes);
        let state = if zero { PageState::Zero } else { PageState::Data };
        self.set(block, offset, state, crc, bytes)
    }

    /// The page at byte `offset` of `block` now holds zeroes.
    pub fn put_zero(&mut self, block: usize, offset: u64) -> io::Result<()> {
        self.set(block, offset, PageState::Zero, self.crc.zero_page(), &[])
    }

    /// The pages in `len` bytes from `offset` of `block` now hold zeroes.
    pub fn put_zeroes(&mut self, block: usize, offset: u64, len: u64) -> io::Result<()> {
        self.fill(block, offset, len, PageState::Zero)
    }

    /// The pages in `len` bytes from `offset` of `block` have no content any more.
    pub fn discard(&mut self, block: usize, offset: u64, len: u64) -> io::Result<()> {
        self.fill(block, offset, len, PageState::Absent)
    }

    /// The page at byte `offset` of `block` came, but its content was jumped over ([`Keep::Nothing`]).
    pub fn put_unread(&mut self, block: usize, offset: u64) -> io::Result<()> {
        self.set(block, offset, PageState::Data, 0, &[])
    }

    /// The pages in `len` bytes from `offset` of `block` on now hold what lies at `at` of `source`, which is called
    /// `name` and can be read in any order. For [`Keep::Contents`] and [`Keep::Places`].
    pub fn put_place(
        &mut self,
        block: usize,
        offset: u64,
        len: u64,
        (name, source, at): (&str, &Source, u64),
    ) -> io::Result<()> {
        if self.copy.is_some() {
            let (mut page, (input, base)) =
                (vec![0; self.page_size as usize], source.shared().ok_or(io::ErrorKind::Unsupported)?);
            return (0..len).step_by(page.len()).try_for_each(|done| {
                read_exact_at(&**input, &mut page, (at + done).saturating_sub(base))?;
                self.put_read(block, offset + done, &page, 0, (name, source, at + done))
            });
        }
        let pages = len / self.page_size;
        match self.stored(block, offset)? {
            Some((stored, page)) => {
                stored.keep((page, pages), (name, source, at), 0)?;
                self.came(block, offset, pages)
            }
            None => Err(io::Error::other("places of pages are not kept")),
        }
    }

    /// As [`put_place`](Self::put_place), of pages that were read anyway: they are in `bytes`, with `gap` others
    /// between each two.
    pub(crate) fn put_read(
        &mut self,
        block: usize,
        offset: u64,
        bytes: &[u8],
        gap: u16,
        (name, source, mut at): (&str, &Source, u64),
    ) -> io::Result<()> {
        let (size, each) = (self.page_size as usize, self.page_size + u64::from(gap));
        let mut pages = (offset..).step_by(size).zip(bytes.chunks(each as usize)).peekable();
        while let Some((offset, first)) = pages.next() {
            if is_zero(&first[..size]) {
                self.put_zero(block, offset)?;
                at += each;
                continue;
            }
            self.copy(block, offset, &first[..size])?;
            let mut count = 1;
            while let Some((offset, next)) = pages.next_if(|(_, next)| !is_zero(&next[..size])) {
                self.copy(block, offset, &next[..size])?;
                count += 1;
            }
            let (stored, number) = self.stored(block, offset)?.ok_or_else(no_block)?;
            stored.keep((number, count), (name, source, at), gap)?;
            self.came(block, offset, count)?;
            at += count * each;
        }
        Ok(())
    }

    /// From now on pages are copied as they come. For [`Keep::Contents`], before the first page that is not of zeroes.
    pub(crate) fn copy_to(&mut self, mut copying: Copying) -> io::Result<()> {
        for (block, Block { first_page, used_length, .. }) in self.blocks.iter().enumerate() {
            let (size, mut offset) = (self.page_size, 0);
            self.table.walk(*first_page, used_length / size, |run| {
                let (len, start) = (run.pages * size, offset);
                offset += len;
                match run.state {
                    PageState::Zero => copying.zeroes(block, start, len, size, false),
                    _ => Ok(()),
                }
            })?;
        }
        self.copy = Some(copying);
        Ok(())
    }

    /// Pages are copied as they come, and have to be read for that.
    pub(crate) fn is_copied(&self) -> bool {
        self.copy.is_some()
    }

    /// Ends copying, and tells what is in `file`: the last contents of these parts of the memory, but for pages of
    /// zeroes where nothing was written.
    pub(crate) fn copied_to(&mut self, file: &File, name: &str) -> Result<Vec<Destination>, Error> {
        match self.take_copy(file, name)? {
            Some(Copying::Placed(copy)) => copy.finish(),
            _ => Ok(Vec::new()),
        }
    }

    /// Ends copying, and gives the stream in `file` with all pages of the memory.
    pub(crate) fn streamed_to(&mut self, file: &File, name: &str) -> Result<Option<Ordered>, Error> {
        match self.take_copy(file, name)? {
            Some(Copying::Ordered(copy)) => Ok(copy.finish()),
            _ => Ok(None),
        }
    }

    fn take_copy(&mut self, file: &File, name: &str) -> Result<Option<Copying>, Error> {
        let is_to = self.copy.as_ref().map_or(Ok(false), |copy| copy.is_to(file));
        let is_to = is_to.map_err(|error| Failure::io(name, 0, &error))?;
        Ok(self.copy.take_if(|_| is_to))
    }

    fn copy(&mut self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.copy.as_mut().map_or(Ok(()), |copy| copy.put(block, offset, bytes))
    }

    /// Pages from `offset` of `block` on have contents that are stored.
    fn came(&mut self, block: usize, offset: u64, pages: u64) -> io::Result<()> {
        match self.keep {
            Keep::Contents => (0..pages)
                .try_for_each(|page| self.note(block, offset + page * self.page_size, PageState::Data, 0).map(drop)),
            _ => Ok(()),
        }
    }

    /// The pages where they lie, for [`Keep::Places`].
    pub(crate) fn into_stored(self) -> io::Result<StoredPages> {
        let stored = self.stored.ok_or_else(|| io::Error::other("places of pages were not kept"))?;
        stored.finish(&self.blocks)
    }

    /// Where pages stay in the files, and the number of the page at `offset` of `block`.
    fn stored(&mut self, block: usize, offset: u64) -> io::Result<Option<(&mut Stored, u64)>> {
        let found = self.blocks.get(block).ok_or_else(no_block)?;
        let page = found.first_page + offset / self.page_size;
        Ok(self.stored.as_mut().map(|stored| (stored, page)))
    }

    /// What is known of the page at byte `offset` of `block`.
    pub fn state(&mut self, block: usize, offset: u64) -> io::Result<PageState> {
        match self.blocks.get(block) {
            Some(found) => self.table.state(found.first_page + offset / self.page_size),
            None => Ok(PageState::Absent),
        }
    }

    /// Reads the page at byte `offset` of `block`; needs the contents. Pages that never came are zeroes.
    pub fn read(&mut self, block: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if let Some((stored, page)) = self.stored(block, offset)? {
            return stored.read(page, bytes);
        }
        let found = self.blocks.get(block).ok_or_else(no_block)?;
        let page = found.first_page + offset / self.page_size;
        let Some(image) = &mut self.image else {
            return Err(io::Error::other("page contents were not kept"));
        };
        match self.table.state(page)? {
            PageState::Data => image.read(page, bytes),
            PageState::Zero | PageState::Absent => {
                bytes.fill(0);
                Ok(())
            }
        }
    }

    /// Calls `visit` with the offset of each page of `block` whose content differs from that of the page at the same
    /// offset of block `other_block` of `other`, up to the shorter one's end. Pages are compared by CRC-32; those that
    /// never came count as zeroes.
    pub fn differences(
        &mut self,
        block: usize,
        other: &mut GuestRam,
        other_block: usize,
        mut visit: impl FnMut(u64),
    ) -> io::Result<()> {
        let (Some(ours), Some(theirs)) = (self.blocks.get(block), other.blocks.get(other_block)) else {
            return Err(no_block());
        };
        let (first, other_first) = (ours.first_page, theirs.first_page);
        let pages = ours.used_length.min(theirs.used_length) / self.page_size;
        let zero = self.crc.zero_page();
        let crc = |run: &Run| if run.state == PageState::Data { run.crc } else { zero };
        let none = Run { state: PageState::Absent, pages: 0, crc: 0 };
        let (mut page, mut ours, mut theirs) = (0, none, none);
        while page < pages {
            if ours.pages == 0 {
                ours = self.table.run_at(first + page, first + pages)?;
            }
            if theirs.pages == 0 {
                theirs = other.table.run_at(other_first + page, other_first + pages)?;
            }
            // Where the contents differ, one of the runs is a single page.
            let both = ours.pages.min(theirs.pages);
            if crc(&ours) != crc(&theirs) {
                visit(page * self.page_size);
            }
            page += both;
            ours.pages -= both;
            theirs.pages -= both;
        }
        Ok(())
    }

    /// The digest of `block` over its whole used length, in lower-case hexadecimal.
    pub fn digest(&mut self, block: usize, kind: RamDigest) -> io::Result<String> {
        let Some(Block { used_length, first_page, .. }) = self.blocks.get(block).cloned() else {
            return Err(no_block());
        };
        let pages = used_length / self.page_size;
        match kind {
            RamDigest::Crc32 if self.stored.is_some() => Err(io::Error::other("no digests of pages were kept")),
            RamDigest::Crc32 => {
                let mut crc = 0;
                let combine = &self.crc;
                self.table.walk(first_page, pages, |run| {
                    crc = match run.state {
                        PageState::Absent | PageState::Zero => combine.append_zero_pages(crc, run.pages),
                        PageState::Data => combine.append(crc, run.crc),
                    };
                    Ok(())
                })?;
                Ok(format!("{crc:08x}"))
            }
            RamDigest::Sha256 => {
                let (mut sha, blank) = (Sha256::new(), vec![0; self.page_size as usize]);
                self.stretches(block, 0, used_length, |_, stretch| {
                    match stretch {
                        Stretch::Data(page) => sha.update(page),
                        Stretch::Absent(pages) | Stretch::Zero(pages) => (0..pages).for_each(|_| sha.update(&blank)),
                    }
                    Ok::<(), Failure>(())
                })
                .map_err(io::Error::other)?;
                Ok(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
            }
        }
    }

    fn fill(&mut self, block: usize, offset: u64, len: u64, state: PageState) -> io::Result<()> {
        let pages = len / self.page_size;
        if let Some((stored, page)) = self.stored(block, offset)? {
            stored.clear(page, pages);
            if self.keep == Keep::Places {
                return Ok(());
            }
        }
        let found = self.blocks.get_mut(block).ok_or_else(no_block)?;
        let first = found.first_page + offset / self.page_size;
        let before = self.table.fill(first, pages, state)?;
        found.pages -= before.zero + before.data;
        found.zero_pages -= before.zero;
        if state == PageState::Zero {
            found.pages += pages;
            found.zero_pages += pages;
        }
        match (&mut self.copy, state) {
            (Some(copy), PageState::Zero) => copy.zeroes(block, offset, len, self.page_size, before.data > 0),
            (Some(copy), _) => copy.discard(block, offset, len, before.data > 0),
            (None, _) => Ok(()),
        }
    }

    fn set(&mut self, block: usize, offset: u64, state: PageState, crc: u32, bytes: &[u8]) -> io::Result<()> {
        if let Some((stored, page)) = self.stored(block, offset)? {
            // Pages with content come by [`put`](Self::put) and [`put_place`](Self::put_place).
            stored.clear(page, 1);
            if self.keep == Keep::Places {
                return Ok(());
            }
        }
        let (page, before) = self.note(block, offset, state, crc)?;
        if let Some(copy) = &mut self.copy
            && state == PageState::Zero
        {
            copy.zeroes(block, offset, self.page_size, self.page_size, before == PageState::Data)?;
        }
        if let Some(image) = &mut self.image
            && state == PageState::Data
        {
            if bytes.is_empty() {
                return Err(io::Error::other("page without content"));
            }
            image.write(page, bytes, &self.spool)?;
        }
        Ok(())
    }

    /// Notes state and digest of a page, and gives its number and its state so far.
    fn note(&mut self, block: usize, offset: u64, state: PageState, crc: u32) -> io::Result<(u64, PageState)> {
        let found = self.blocks.get_mut(block).ok_or_else(no_block)?;
        let page = found.first_page + offset / self.page_size;
        let before = self.table.set(page, state, crc)?;
        found.pages = found.pages + u64::from(state != PageState::Absent) - u64::from(before != PageState::Absent);
        found.zero_pages =
            found.zero_pages + u64::from(state == PageState::Zero) - u64::from(before == PageState::Zero);
        Ok((page, before))
    }
}

/// Most pages with content have some in their first words.
fn is_zero(bytes: &[u8]) -> bool {
    let (first, rest) = bytes.split_at(bytes.len().min(64));
    first.iter().all(|byte| *byte == 0) && rest.iter().fold(0, |all, byte| all | byte) == 0
}

#[cfg(test)]
pub(crate) mod tests;
