//! The destination's RAM: the check of the block list, and where pages go.

use super::atomic_page_set::AtomicPageSet;
use super::stream_reader::{Expected, MOST_EXPECTED};
use super::zero::{ZERO_PAGE, is_zero};
use super::{Guest, LoadError, PAGE_SIZE, RamView};
use qevm_savevm::ram::{BlockId, PageAt, RamBlock, flag};
use qevm_wire::{CountedString, PageGeometry};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{Bytes, VolatileSlice};

/// The blocks of the stream, matched to those of the guest.
#[derive(Default)]
pub(crate) struct RamReceiver<'g> {
    blocks: Vec<Block<'g>>,
    /// The guest may run before its memory is here, so that it counts which pages have come.
    counts: bool,
    /// What does not come.
    left: LeftOut,
    /// The page that came last, and how many came one after the other before it.
    last: Option<(BlockId, u64)>,
    run: u64,
}

/// What of guest memory does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum LeftOut {
    /// All does.
    #[default]
    Nothing,
    /// What is shared does not (capability `x-ignore-shared`).
    Shared,
    /// It is here (mode `cpr-transfer`).
    All,
}

struct Block<'g> {
    view: RamView<'g>,
    name: CountedString,
    /// Bytes of a page of the source's host.
    page_size: u64,
    /// Pages that hold something, or may do so.
    written: Arc<AtomicPageSet>,
    /// Pages that have come, where it counts.
    received: Option<Arc<AtomicPageSet>>,
    presence: Presence,
}

/// Whether any of a RAM block comes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Presence {
    /// It is a file that the source has, too: nothing of it does.
    shared: bool,
    came: Arc<AtomicBool>,
}

impl Presence {
    /// Some of the block called `name` has come.
    pub(crate) fn note(&self, name: &CountedString) -> Result<(), LoadError> {
        if self.shared {
            return Err(LoadError::SharedSent { name: name.clone() });
        }
        if !self.came.load(Ordering::Relaxed) {
            self.came.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A RAM block as the threads of the page channels know it.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    /// Its name.
    pub(crate) name: CountedString,
    /// Its length in bytes.
    pub(crate) used_length: u64,
    /// Bytes of a page of the source's host.
    pub(crate) page_size: u64,
    /// Pages that hold something, or may do so.
    pub(crate) written: Arc<AtomicPageSet>,
    /// Pages that have come, where the guest may run before its memory is here.
    pub(crate) received: Option<Arc<AtomicPageSet>>,
    /// Whether any has to come, or may.
    pub(crate) presence: Presence,
}

impl<'g> RamReceiver<'g> {
    /// Of no block. `postcopy` says that the guest may run before its memory is here.
    pub(crate) fn new(postcopy: bool, left: LeftOut) -> Self {
        RamReceiver { counts: postcopy, left, ..RamReceiver::default() }
    }

    /// Forgets the blocks.
    pub(crate) fn clear(&mut self) {
        *self = RamReceiver::new(self.counts, self.left);
    }

    /// A page of this block has come.
    ///
    /// # Errors
    /// None of it may.
    pub(crate) fn came(&mut self, block: BlockId) -> Result<(), LoadError> {
        let Block { presence, name, .. } = self.known(block);
        presence.note(name)
    }

    /// The pages of the block that was listed last have come from elsewhere.
    pub(crate) fn last_came(&self) -> Result<(), LoadError> {
        self.blocks.last().map_or(Ok(()), |block| block.presence.note(&block.name))
    }

    /// All pages have come that will. `streamed` says that they come in a stream, in which every page goes once at
    /// least, be it empty.
    ///
    /// # Errors
    /// Of a block that the source does not share with this machine there was none; of a guest there was none.
    pub(crate) fn check_presence(&self, streamed: bool) -> Result<(), LoadError> {
        let is_missing = |block: &&Block<'_>| {
            !block.presence.shared && !block.view.memory.is_empty() && !block.presence.came.load(Ordering::Relaxed)
        };
        if self.left == LeftOut::Nothing {
            let nothing = streamed && !self.blocks.is_empty() && self.blocks.iter().all(|block| is_missing(&block));
            return if nothing { Err(LoadError::NoMemory) } else { Ok(()) };
        }
        match self.blocks.iter().find(is_missing) {
            Some(block) => Err(LoadError::NotSent { name: block.name.clone() }),
            None => Ok(()),
        }
    }

    /// Where a page goes whose bytes are next in the stream.
    pub(crate) fn page(&mut self, page: &PageAt) -> VolatileSlice<'g> {
        let goes_on =
            self.last.is_some_and(|(id, last)| (id, last + PageGeometry::X86.size()) == (page.block, page.offset));
        self.run = if goes_on { self.run + 1 } else { 0 };
        self.last = Some((page.block, page.offset));
        let block = self.known(page.block);
        let index = PageGeometry::X86.index(page.offset);
        block.written.mark(index..index + 1);
        block.received.iter().for_each(|received| received.mark(index..index + 1));
        block.memory(page)
    }

    /// The pages that come next if the source goes on as before. Only those that hold nothing yet: nothing is lost
    /// there if something else comes.
    pub(crate) fn expected(&self) -> Vec<Expected<'g>> {
        let Some((id, last)) = self.last else { return Vec::new() };
        let block = &self.blocks[id.index()];
        let offsets = (1..=self.run.min(MOST_EXPECTED as u64)).map(|ahead| last + ahead * PageGeometry::X86.size());
        let free = |offset: &u64| {
            *offset < block.view.memory.len() as u64 && !block.written.contains(PageGeometry::X86.index(*offset))
        };
        let expected = |offset: u64| Expected {
            record: (offset | flag::PAGE | flag::CONTINUE).to_be_bytes(),
            memory: block.memory(&PageAt { block: id, offset, named: false }),
        };
        let mut pages = Vec::with_capacity(MOST_EXPECTED);
        pages.extend(offsets.take_while(free).map(expected));
        pages
    }

    /// Which pages of the block that was listed last were written to.
    pub(crate) fn last(&self) -> Option<Arc<AtomicPageSet>> {
        self.blocks.last().map(|block| block.written.clone())
    }

    /// The blocks listed so far.
    pub(crate) fn listed(&self) -> Vec<Listed> {
        let listed = |block: &Block<'_>| Listed {
            name: block.name.clone(),
            used_length: block.view.memory.len() as u64,
            page_size: block.page_size,
            written: block.written.clone(),
            received: block.received.clone(),
            presence: block.presence.clone(),
        };
        self.blocks.iter().map(listed).collect()
    }

    /// A block was listed.
    pub(crate) fn add_block(&mut self, guest: &'g dyn Guest, block: &RamBlock) -> Result<(), LoadError> {
        let find = || guest.ram().into_iter().enumerate().find(|(_, view)| block.name == *view.name);
        let Some((index, mut view)) = find() else {
            let names: Vec<_> = guest.ram().iter().map(|view| format!("\"{}\"", view.name)).collect();
            return Err(LoadError::UnknownRamBlock { found: block.name.clone(), expected: names.join(", ") });
        };
        if view.memory.len() as u64 != block.used_length {
            let expected = view.memory.len() as u64;
            let resized = guest.resize_ram(index, block.used_length);
            match (resized, find()) {
                (Ok(()), Some((_, resized))) if resized.memory.len() as u64 == block.used_length => view = resized,
                _ => {
                    let (name, found) = (block.name.clone(), block.used_length);
                    return Err(LoadError::RamBlockSize { name, found, expected });
                }
            }
        }
        let shared = match self.left {
            LeftOut::Nothing => false,
            LeftOut::Shared => guest.hooks().shares(index),
            LeftOut::All => true,
        };
        match block.address.filter(|_| shared) {
            Some(found) if found > 0 => return Err(LoadError::SharedAddress { name: block.name.clone(), found }),
            _ => {}
        }
        if !shared && block.mapped_ram.is_some_and(|header| header.is_absent()) {
            return Err(LoadError::NotSent { name: block.name.clone() });
        }
        let presence = Presence { shared, came: Arc::default() };
        let pages = PageGeometry::X86.index(block.used_length);
        let written = Arc::new(AtomicPageSet::new(pages, !view.pristine));
        let received = self.counts.then(|| Arc::new(AtomicPageSet::new(pages, false)));
        let page_size = block.page_size.unwrap_or(PAGE_SIZE);
        self.blocks.push(Block { view, name: block.name.clone(), page_size, written, received, presence });
        Ok(())
    }

    /// Clears a page, without touching it if it is clear.
    #[inline]
    pub(crate) fn clear_page(&mut self, page: &PageAt) {
        let block = self.known(page.block);
        let index = PageGeometry::X86.index(page.offset);
        block.received.iter().for_each(|received| received.mark(index..index + 1));
        if !block.written.contains(index) {
            return;
        }
        let memory = block.memory(page);
        if !is_zero(&memory) {
            memory.copy_from(&ZERO_PAGE[..memory.len()]);
        }
    }

    /// What has come of these bytes is old (postcopy).
    pub(crate) fn discard(&mut self, block: BlockId, ranges: &[Range<u64>]) {
        if let Some(received) = &self.known(block).received {
            let pages = |bytes: &Range<u64>| PageGeometry::X86.index(bytes.start)..PageGeometry::X86.index(bytes.end);
            ranges.iter().for_each(|range| received.clear(pages(range)));
        }
    }

    /// Changes a page by an XBZRLE difference.
    pub(crate) fn apply_difference(&mut self, page: &PageAt, data: &[u8]) -> Result<(), LoadError> {
        let memory = self.page(page);
        let mut content = vec![0; memory.len()];
        let outside = |error: vm_memory::VolatileMemoryError| LoadError::Unsupported(error.to_string());
        memory.read_slice(&mut content, 0).map_err(outside)?;
        qevm_savevm::xbzrle::decode(data, 0, &mut content).map_err(|error| LoadError::Stream(error.kind.into()))?;
        memory.write_slice(&content, 0).map_err(outside)
    }

    /// The decoder has checked that the block was listed, and that the page is in it.
    fn known(&mut self, id: BlockId) -> &mut Block<'g> {
        &mut self.blocks[id.index()]
    }
}

impl<'g> Block<'g> {
    fn memory(&self, page: &PageAt) -> VolatileSlice<'g> {
        let len = (self.view.memory.len() as u64 - page.offset).min(ZERO_PAGE.len() as u64);
        // The decoder has checked that the page is in the block, whose length was compared.
        self.view.memory.subslice(page.offset as usize, len as usize).unwrap_or(self.view.memory)
    }
}
