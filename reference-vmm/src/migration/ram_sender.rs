//! The source's RAM: which pages are to be sent, and the sending of them straight from guest memory.

use super::{
    Channel, DirtyLog, MigrationError, RamView,
    bitmap::PageBitmap,
    channel::{Source, write_all},
    multifd::{Batch, Counts, Queue},
    page_file::Saving,
    zero::is_zero,
};
use crate::memory::PAGE_SIZE;
use qevm_savevm::{StreamWriter, ram::BlockId};
use qevm_wire::PageGeometry;
use std::{ops::Range, time::Duration};
use vm_memory::VolatileSlice;

/// The least whose log is reset in one call, in pages.
const RESET_PAGES: u64 = 256;
/// The most that is reset in one call, in `RESET_PAGES`: 16 MiB (QEMU's `x-clear-bitmap-shift` of 18 is 1 GiB).
const MAX_RESET: u64 = 16;
/// How long a page may wait for its turn after its log was reset. What the guest writes meanwhile is sent and then sent again,
/// so little is reset at a time when the link is slow; when it is fast, calls would cost more than that.
const RESET_AHEAD: Duration = Duration::from_millis(5);

/// Pages in one vectored write: a part for each page and one for the records before it, within `MAX_PARTS`.
pub(crate) const BATCH_PAGES: u64 = 256;

/// Pages in one packet of a page channel (524288 bytes; QEMU 5.2 to 11.1).
const PACKET_PAGES: u64 = qevm_multifd::layout::PACKET_DATA / PAGE_SIZE;

/// Counts of what was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) bytes: u64,
    pub(crate) normal: u64,
    pub(crate) zero: u64,
}

/// The pages to send, and where the sweep over them is.
pub(crate) struct RamSender<'g> {
    blocks: Vec<Block<'g>>,
    pages: PageGeometry,
    place: (usize, u64),
    /// How much is reset in one call, in [`RESET_PAGES`].
    reset_ahead: u64,
}

struct Block<'g> {
    view: RamView<'g>,
    /// Pages to send.
    dirty: PageBitmap,
    /// Chunks of [`RESET_PAGES`] in which pages were found dirty whose log was not reset since.
    to_reset: PageBitmap,
}

impl<'g> RamSender<'g> {
    /// Everything is to be sent.
    pub(crate) fn new(views: Vec<RamView<'g>>, pages: PageGeometry) -> Self {
        let blocks = views
            .into_iter()
            .map(|view| {
                let count = pages.index(view.memory.len() as u64);
                let to_reset = PageBitmap::new(count.div_ceil(RESET_PAGES));
                Block { view, dirty: PageBitmap::full(count), to_reset }
            })
            .collect();
        RamSender { blocks, pages, place: (0, 0), reset_ahead: MAX_RESET }
    }

    /// Says how many bytes per second go out.
    pub(crate) fn expect(&mut self, bandwidth: u64) {
        let bytes = u128::from(bandwidth) * RESET_AHEAD.as_nanos() / 1_000_000_000;
        let steps = bytes / u128::from(RESET_PAGES * self.pages.size());
        self.reset_ahead = u64::try_from(steps).unwrap_or(MAX_RESET).clamp(1, MAX_RESET);
    }

    /// Name and remaining bytes of every block.
    pub(crate) fn remaining(&self) -> impl Iterator<Item = (&str, u64)> {
        self.blocks.iter().map(|block| (block.view.name, block.dirty.count() * self.pages.size()))
    }

    /// Pages to send.
    pub(crate) fn remaining_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    /// Adds what the log has to what is to be sent, and starts a new sweep. Says how many pages are new.
    pub(crate) fn read_log(&mut self, log: &mut dyn DirtyLog) -> Result<u64, MigrationError> {
        let mut new = 0;
        let blocks = &mut self.blocks;
        log.read(&mut |block, word_number, word| {
            let Some(block) = blocks.get_mut(block) else { return };
            new += block.dirty.merge_word(word_number, word);
            if word != 0 {
                let chunk = word_number as u64 * 64 / RESET_PAGES;
                block.to_reset.set_range(chunk..chunk + 1);
            }
        })
        .map_err(MigrationError::guest("read the dirty log"))?;
        self.place = (0, 0);
        Ok(new)
    }

    /// Sends up to `limit` pages (at most [`BATCH_PAGES`]) of the sweep behind what `stream` holds already. Nothing is
    /// left in `stream`. With `log`, the log of the pages is reset before they are read; without, the guest stands still.
    ///
    /// Says `None` for the counts of pages when the sweep has reached its end.
    pub(crate) fn send(
        &mut self,
        channel: &dyn Channel,
        stream: &mut StreamWriter,
        mut log: Option<&mut dyn DirtyLog>,
        limit: u64,
    ) -> Result<Option<Sent>, MigrationError> {
        let mut sent = Sent::default();
        let mut layout: Vec<(Range<usize>, VolatileSlice<'g>)> = Vec::new();
        let mut header_start = 0;
        let mut left = limit.clamp(1, BATCH_PAGES);
        let mut any = false;
        while left > 0 {
            let Some((index, run)) = self.next_run(left) else { break };
            any = true;
            self.reset_log(index, &run, &mut log)?;
            let block = &mut self.blocks[index];
            // Out of the set before it is read: a page that changes from here on turns up in the log again.
            block.dirty.clear_range(run.clone());
            left -= run.end - run.start;
            self.place = (index, run.end);
            let id = BlockId(index as u32);
            for page in run {
                let offset = page * self.pages.size();
                let memory = page_of(&block.view, offset, self.pages.size())?;
                if is_zero(&memory) {
                    stream.zero_page(id, offset)?;
                    sent.zero += 1;
                } else {
                    stream.page_header(id, offset)?;
                    sent.normal += 1;
                    layout.push((header_start..stream.bytes().len(), memory));
                    header_start = stream.bytes().len();
                }
            }
        }
        let mut parts = Vec::with_capacity(2 * layout.len() + 1);
        for (header, memory) in &layout {
            parts.push(Source::bytes(&stream.bytes()[header.clone()]));
            parts.push(Source::guest(memory));
        }
        parts.push(Source::bytes(&stream.bytes()[header_start..]));
        sent.bytes = parts.iter().map(|part| part.len() as u64).sum();
        write_all(channel, &mut parts).map_err(|source| MigrationError::Send { doing: "pages", source })?;
        stream.clear();
        Ok(any.then_some(sent))
    }

    /// Like [`send`](Self::send), but writes the pages to their places in a file.
    pub(crate) fn save(
        &mut self,
        saving: &Saving,
        mut log: Option<&mut dyn DirtyLog>,
        limit: u64,
    ) -> Result<Option<Sent>, MigrationError> {
        let Some((index, run)) = self.next_run(limit.clamp(1, BATCH_PAGES)) else { return Ok(None) };
        self.reset_log(index, &run, &mut log)?;
        let block = &mut self.blocks[index];
        block.dirty.clear_range(run.clone());
        self.place = (index, run.end);
        let offsets: Vec<_> = run.map(|page| page * self.pages.size()).collect();
        let Counts { bytes, normal, zero } = saving.save(index, &block.view, &offsets)?;
        Ok(Some(Sent { bytes, normal, zero }))
    }

    /// Like [`send`](Self::send), but hands the pages to the page channels, a packet at a time. With `legacy`, zero pages are
    /// found here and go into `stream`, whose content the caller sends.
    ///
    /// The counts are those of the zero pages only; the channels count the others when they have sent them.
    pub(crate) fn hand_over(
        &mut self,
        queue: &Queue,
        stream: &mut StreamWriter,
        mut log: Option<&mut dyn DirtyLog>,
        limit: u64,
        legacy: bool,
    ) -> Result<Option<Sent>, MigrationError> {
        let mut sent = Sent::default();
        let mut batch: Option<Batch> = None;
        let mut left = limit.clamp(1, PACKET_PAGES);
        while left > 0 {
            let Some((index, run)) = self.next_run(left) else { break };
            // A packet holds pages of one block.
            if batch.as_ref().is_some_and(|batch| batch.block != index) {
                break;
            }
            self.reset_log(index, &run, &mut log)?;
            let block = &mut self.blocks[index];
            block.dirty.clear_range(run.clone());
            left -= run.end - run.start;
            self.place = (index, run.end);
            let batch = batch.get_or_insert_with(|| Batch { block: index, pages: Vec::new() });
            for page in run {
                let offset = page * self.pages.size();
                if legacy && is_zero(&page_of(&block.view, offset, self.pages.size())?) {
                    stream.zero_page(BlockId(index as u32), offset)?;
                    sent.zero += 1;
                } else {
                    batch.pages.push(offset);
                }
            }
        }
        let Some(batch) = batch else { return Ok(None) };
        if !batch.pages.is_empty() {
            queue.push(batch)?;
        }
        Ok(Some(sent))
    }

    /// The next pages to send at or behind the place of the sweep.
    fn next_run(&mut self, limit: u64) -> Option<(usize, Range<u64>)> {
        loop {
            let (index, page) = self.place;
            if let Some(run) = self.blocks.get(index)?.dirty.next_run(page, limit) {
                return Some((index, run));
            }
            self.place = (index + 1, 0);
        }
    }

    /// Resets the log of the chunks that hold `run`, where that was not done since the log was read.
    fn reset_log(
        &mut self,
        index: usize,
        run: &Range<u64>,
        log: &mut Option<&mut dyn DirtyLog>,
    ) -> Result<(), MigrationError> {
        let Some(log) = log else { return Ok(()) };
        let block = &mut self.blocks[index];
        let chunks = run.start / RESET_PAGES..run.end.div_ceil(RESET_PAGES);
        let next = |block: &Block<'_>| block.to_reset.next_run(chunks.start, self.reset_ahead);
        while let Some(chunk) = next(block).filter(|chunk| chunk.start < chunks.end) {
            let pages = chunk.start * RESET_PAGES..(chunk.end * RESET_PAGES).min(block.dirty.pages());
            log.reset(index, pages).map_err(MigrationError::guest("reset the dirty log"))?;
            block.to_reset.clear_range(chunk);
        }
        Ok(())
    }
}

fn page_of<'g>(view: &RamView<'g>, offset: u64, size: u64) -> Result<VolatileSlice<'g>, MigrationError> {
    view.memory
        .subslice(offset as usize, size as usize)
        .map_err(|error| MigrationError::Guest { doing: "reach a page of guest memory", source: error.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::{Guest, GuestError, Target, pair::FakeGuest};
    use qevm_savevm::{Encoder, framing::SectionHeader, ram::RamBlock};
    use qevm_wire::CountedString;
    use std::io;

    #[derive(Debug)]
    struct Sink;

    impl Channel for Sink {
        fn write(&self, parts: &[Source<'_>]) -> io::Result<usize> {
            Ok(parts.iter().map(Source::len).sum())
        }
        fn read(&self, _: &mut [Target<'_>]) -> io::Result<usize> {
            Ok(0)
        }
        fn finish_writing(&self) {}
        fn stop_reading(&self) {}
        fn close(&self) {}
    }

    /// Everything is dirty, and what is reset is written down.
    struct Recorder(Vec<Range<u64>>);

    impl DirtyLog for Recorder {
        fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
            (0..PAGES / 64).for_each(|word| found(0, word, u64::MAX));
            Ok(())
        }
        fn reset(&mut self, _: usize, pages: Range<u64>) -> Result<(), GuestError> {
            self.0.push(pages);
            Ok(())
        }
    }

    const PAGES: usize = 10_240;

    /// The calls that reset the log of a whole block at this bandwidth.
    fn resets(bandwidth: Option<u64>) -> Vec<Range<u64>> {
        let guest = FakeGuest::new(&[("microvm.ram", PAGES)]);
        let mut ram = RamSender::new(guest.ram(), PageGeometry::X86);
        let mut log = Recorder(Vec::new());
        ram.read_log(&mut log).unwrap();
        if let Some(bandwidth) = bandwidth {
            ram.expect(bandwidth);
        }
        let mut stream = StreamWriter::new(Encoder::new(PageGeometry::X86), true);
        let (name, len) = (CountedString::new("microvm.ram").unwrap(), PAGES as u64 * PAGE_SIZE);
        let (idstr, instance_id, version_id) = (CountedString::new("ram").unwrap(), 0, 4);
        stream.section_start(&SectionHeader { section_id: 1, idstr, instance_id, version_id }).unwrap();
        stream.ram_setup([RamBlock::new(name, len)]).unwrap();
        stream.section_part(1).unwrap();
        while ram.send(&Sink, &mut stream, Some(&mut log), u64::MAX).unwrap().is_some() {}
        log.0
    }

    #[test]
    fn a_slow_link_resets_little_ahead_and_a_fast_one_much() {
        let steps =
            |step: usize| (0..PAGES as u64).step_by(step).map(move |at| at..(at + step as u64).min(PAGES as u64));
        for (bandwidth, pages) in [(None, 4096), (Some(u64::MAX), 4096), (Some(1), 256), (Some(420_000_000), 512)] {
            assert_eq!(resets(bandwidth), steps(pages).collect::<Vec<_>>(), "{bandwidth:?}");
        }
    }
}
