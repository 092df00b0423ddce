//! Guest memory that stays where it is: the index of its pages, and the files in which they lie.

use super::block::{Block, no_block};
use super::image::Image;
use super::places::{Place, Places, Stretch};
use crate::bounds::{Exceeded, Spool};
use crate::failure::Failure;
use crate::read_at::{ReadAt, Stamp, read_exact_at};
use crate::source::Source;
use std::fmt;
use std::io;
use std::sync::Arc;

/// Bytes of pages that are read in one go: they stay in a processor's cache.
const RUN_BYTES: u64 = 256 << 10;
/// Number of the temporary file among the stores.
const SPOOLED: u16 = 0;

/// Something that pages lie in.
struct Store {
    /// As the user wrote it.
    name: String,
    input: Arc<dyn ReadAt>,
    /// Offset of its first byte.
    base: u64,
    stamp: Option<Stamp>,
}

impl Store {
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        read_exact_at(&*self.input, bytes, offset.saturating_sub(self.base))
    }

    /// Fails if it was written to. A file changes after its time of change.
    fn unchanged(&self) -> io::Result<()> {
        if self.stamp.is_some() && self.input.stamp()? != self.stamp {
            let message = "the file has changed since it was opened: its pages may be elsewhere now";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(())
    }
}

/// Pages as they come, on the way to [`StoredPages`]. What cannot be read again where it was goes to a temporary file.
pub(super) struct Stored {
    places: Places,
    /// Without the temporary file, whose number is [`SPOOLED`].
    stores: Vec<Store>,
    image: Option<Image>,
    page_size: u64,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored").field("stores", &self.stores.len()).finish_non_exhaustive()
    }
}

impl Stored {
    pub(super) fn new(page_size: u64) -> Self {
        Stored { places: Places::new(page_size), stores: Vec::new(), image: None, page_size }
    }

    /// The content of page number `page` is `bytes`, which must be kept, and are not all zeroes.
    pub(super) fn write(&mut self, page: u64, bytes: &[u8], room: &Spool) -> io::Result<()> {
        let image = match &mut self.image {
            Some(image) => image,
            none => none.insert(Image::new(self.page_size)?),
        };
        let offset = image.write(page, bytes, room)?;
        self.put(page, 1, SPOOLED, offset, 0)
    }

    /// `count` pages from number `page` on lie one after the other, with `gap` bytes between each two, from `offset` of
    /// `source` on, which is called `name`.
    pub(super) fn keep(
        &mut self,
        (page, count): (u64, u64),
        (name, source, offset): (&str, &Source, u64),
        gap: u16,
    ) -> io::Result<()> {
        let (input, base) = source.shared().ok_or(io::ErrorKind::Unsupported)?;
        let known = self.stores.iter().rposition(|store| Arc::ptr_eq(&store.input, input));
        let store = match known {
            Some(store) => store,
            None => {
                let stamp = input.stamp()?;
                self.stores.push(Store { name: name.to_owned(), input: input.clone(), base, stamp });
                self.stores.len() - 1
            }
        };
        self.put(page, count, u16::try_from(store + 1).unwrap_or(u16::MAX), offset, gap)
    }

    fn put(&mut self, page: u64, count: u64, store: u16, offset: u64, gap: u16) -> io::Result<()> {
        let far = || io::Error::other(Exceeded::new(format!("page at byte {offset}, beyond what an index can hold")));
        let each = self.page_size + u64::from(gap);
        let end = count.checked_mul(each).and_then(|len| offset.checked_add(len)).ok_or_else(far)?;
        Place::new(store, end).ok_or_else(far)?;
        self.places.put(page, count, Place::new(store, offset).ok_or_else(far)?, gap);
        Ok(())
    }

    pub(super) fn clear(&mut self, page: u64, count: u64) {
        self.places.clear(page, count);
    }

    /// Reads the page with this number.
    pub(super) fn read(&mut self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        match (self.places.stretch(page, page + 1).place, &mut self.image) {
            (None, _) => {
                bytes.fill(0);
                Ok(())
            }
            (Some(place), Some(image)) if place.store() == usize::from(SPOOLED) => image.read(page, bytes),
            (Some(place), _) => {
                let store = place.store().checked_sub(1).and_then(|store| self.stores.get(store));
                store.ok_or_else(no_block)?.read(bytes, place.offset())
            }
        }
    }

    /// Reads the page with this number, which has a place, and those behind it that lie next to it, up to number `end`;
    /// tells how many.
    pub(super) fn read_run(&mut self, page: u64, end: u64, contents: &mut Vec<u8>) -> Result<u64, Failure> {
        let temporary = |error: io::Error| Failure::io("temporary file", 0, &error);
        let Stretch { pages, place, gap } = self.places.stretch(page, end);
        let place = place.ok_or_else(no_block).map_err(temporary)?;
        let size = self.page_size;
        let pages = pages.min((RUN_BYTES / size).max(1));
        if place.store() == usize::from(SPOOLED) {
            let pages = if gap == 0 { pages.min(Image::run_end(page) - page) } else { 1 };
            contents.resize((pages * size) as usize, 0);
            self.image.as_mut().ok_or_else(no_block).and_then(|image| image.read(page, contents)).map_err(temporary)?;
            return Ok(pages);
        }
        let store = place.store().checked_sub(1).and_then(|store| self.stores.get(store));
        let store = store.ok_or_else(no_block).map_err(temporary)?;
        // With what lies between the pages, which is little.
        contents.resize((pages * (size + gap) - gap) as usize, 0);
        let failed = |error: io::Error| Failure::io(&store.name, place.offset(), &error);
        store.read(contents, place.offset()).map_err(failed)?;
        store.unchanged().map_err(failed)?;
        if gap > 0 {
            for number in 1..pages as usize {
                let from = number * (size + gap) as usize;
                contents.copy_within(from..from + size as usize, number * size as usize);
            }
            contents.truncate((pages * size) as usize);
        }
        Ok(pages)
    }

    pub(super) fn finish(self, blocks: &[Block]) -> io::Result<StoredPages> {
        let input: Arc<dyn ReadAt> = match self.image {
            Some(image) => Arc::new(image.finish()?),
            None => Arc::new(Vec::new()),
        };
        let spooled = Store { name: "temporary file".into(), input, base: 0, stamp: None };
        let first_pages = blocks.iter().map(|block| block.first_page).collect();
        let stores = std::iter::once(spooled).chain(self.stores).collect();
        Ok(StoredPages { places: self.places, stores, first_pages, page_size: self.page_size })
    }
}

/// Guest memory, page by page in any order, for any number of threads.
pub(crate) struct StoredPages {
    places: Places,
    stores: Vec<Store>,
    /// Number of each block's first page.
    first_pages: Vec<u64>,
    page_size: u64,
}

/// Why a page cannot be had.
pub(crate) struct Lost<'s> {
    /// The file.
    pub(crate) file: &'s str,
    /// Offset of the page in it.
    pub(crate) offset: u64,
    /// Offset of the page in its RAM block.
    pub(crate) page: u64,
    /// What happened.
    pub(crate) error: io::Error,
}

impl fmt::Debug for StoredPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredPages").field("page_size", &self.page_size).finish_non_exhaustive()
    }
}

impl StoredPages {
    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Reads pages of `block` from `offset` on, both whole pages, that are within it.
    pub(crate) fn read(&self, block: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Lost<'_>> {
        let mut page = offset / self.page_size;
        let end = page + bytes.len() as u64 / self.page_size;
        let mut rest = bytes;
        while page < end {
            let Stretch { pages, place, gap } = self.stretch(block, page, end);
            // One read for pages with nothing between them.
            let pages = if gap == 0 { pages } else { 1 };
            let (part, later) = rest.split_at_mut((pages * self.page_size) as usize);
            match place {
                None => part.fill(0),
                Some(place) => {
                    let store = &self.stores[place.store()];
                    let lost =
                        |error| Lost { file: &store.name, offset: place.offset(), page: page * self.page_size, error };
                    store.read(part, place.offset()).map_err(lost)?;
                    store.unchanged().map_err(lost)?;
                }
            }
            (rest, page) = (later, page + pages);
        }
        Ok(())
    }

    /// What starts at page number `page` of `block`, and ends at `end` at the latest: how many pages, and whether they
    /// are anything but zero.
    pub(crate) fn run(&self, block: usize, page: u64, end: u64) -> (u64, bool) {
        let Stretch { pages, place, .. } = self.stretch(block, page, end);
        (pages, place.is_some())
    }

    fn stretch(&self, block: usize, page: u64, end: u64) -> Stretch {
        let first = self.first_pages[block];
        self.places.stretch(first + page, first + end)
    }
}
