//! The source's RAM: which pages are to be sent, and the sending of them straight from guest memory.

mod sweep;

use super::{
    Channel, DirtyLog, GuestError, MigrationError, RamView,
    channel::{Source, write_all},
    multifd::{Batch, Counts, Queue},
    page_file::Saving,
    zero::{is_zero, prefetch},
};
use crate::PAGE_SIZE;
use qevm_savevm::{StreamWriter, ram::BlockId};
use qevm_wire::PageGeometry;
use std::ops::Range;
use sweep::Sweep;
use vm_memory::VolatileSlice;

/// Pages in one vectored write: a part for each page and one for the records before it, within `MAX_PARTS`.
pub(crate) const BATCH_PAGES: u64 = 256;

/// How many pages ahead of the one that is looked at the next is fetched: from far memory it takes as long as looking at a few.
const PREFETCH: u64 = 8;

/// Pages in one packet of a page channel (524288 bytes; QEMU 5.2 to 11.1).
const PACKET_PAGES: u64 = qevm_multifd::layout::PACKET_DATA / PAGE_SIZE;

/// Counts of what was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) bytes: u64,
    pub(crate) normal: u64,
    pub(crate) zero: u64,
}

/// The blocks of RAM, and the pages of them to send.
pub(crate) struct RamSender<'g> {
    views: Vec<RamView<'g>>,
    sweep: Sweep,
    pages: PageGeometry,
}

impl<'g> RamSender<'g> {
    /// Everything is to be sent.
    pub(crate) fn new(views: Vec<RamView<'g>>, pages: PageGeometry) -> Self {
        let sweep = Sweep::new(views.iter().map(|view| pages.index(view.memory.len() as u64)));
        RamSender { views, sweep, pages }
    }

    /// Says how many bytes per second go out.
    pub(crate) fn expect(&mut self, bandwidth: u64) {
        self.sweep.expect(bandwidth / self.pages.size());
    }

    /// Name and remaining bytes of every block.
    pub(crate) fn remaining(&self) -> impl Iterator<Item = (&str, u64)> {
        let bytes = self.sweep.remaining().map(|pages| pages * self.pages.size());
        self.views.iter().map(|view| view.name).zip(bytes)
    }

    /// Pages to send.
    pub(crate) fn remaining_pages(&self) -> u64 {
        self.sweep.remaining().sum()
    }

    /// Adds what the log has to what is to be sent, and starts a new sweep. Says how many pages were written to since the last.
    pub(crate) fn read_log(&mut self, log: &mut dyn DirtyLog) -> Result<u64, MigrationError> {
        self.sweep.begin(log).map_err(MigrationError::guest("read the dirty log"))
    }

    /// In the first sweep, leaves what the guest has written to meanwhile for the next.
    pub(crate) fn look_ahead(&mut self, log: &mut dyn DirtyLog) -> Result<(), MigrationError> {
        self.sweep.defer(log).map_err(MigrationError::guest("read the dirty log"))?;
        self.sweep.reset_lead(log).map_err(not_reset)
    }

    /// Whether all pages of the sweep were sent.
    pub(crate) fn is_swept(&mut self) -> bool {
        self.sweep.is_over()
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
            let Some((index, run)) = self.sweep.take(left, &mut log).map_err(not_reset)? else { break };
            any = true;
            left -= run.end - run.start;
            let id = BlockId(index as u32);
            let page = |number| page_of(&self.views[index], number * self.pages.size(), self.pages.size());
            let end = run.end;
            for number in run {
                let (offset, memory) = (number * self.pages.size(), page(number)?);
                if number + PREFETCH < end {
                    prefetch(&page(number + PREFETCH)?);
                }
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
        let limit = limit.clamp(1, BATCH_PAGES);
        let Some((index, run)) = self.sweep.take(limit, &mut log).map_err(not_reset)? else { return Ok(None) };
        let offsets: Vec<_> = run.map(|page| page * self.pages.size()).collect();
        let Counts { bytes, normal, zero } = saving.save(index, &self.views[index], &offsets)?;
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
            // A packet holds pages of one block.
            let next = self.sweep.next_block();
            if batch.as_ref().is_some_and(|batch| next != Some(batch.block)) {
                break;
            }
            let Some((index, run)) = self.sweep.take(left, &mut log).map_err(not_reset)? else { break };
            left -= run.end - run.start;
            let batch = batch.get_or_insert_with(|| Batch { block: index, pages: Vec::new() });
            for page in run {
                let offset = page * self.pages.size();
                if legacy && is_zero(&page_of(&self.views[index], offset, self.pages.size())?) {
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
}

fn not_reset(error: GuestError) -> MigrationError {
    MigrationError::guest("reset the dirty log")(error)
}

fn page_of<'g>(view: &RamView<'g>, offset: u64, size: u64) -> Result<VolatileSlice<'g>, MigrationError> {
    view.memory
        .subslice(offset as usize, size as usize)
        .map_err(|error| MigrationError::Guest { doing: "reach a page of guest memory", source: error.into() })
}
