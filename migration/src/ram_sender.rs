//! Sending pages straight from guest memory: the source's core says which.

use super::channel::{WriteSlice, write_all};
use super::core::source::{Batch, BlockRange, Sent};
use super::multifd::{self, Counts, Queue};
use super::page_file::Saving;
use super::snapshot::Copied;
use super::zero::{is_zero, prefetch};
use super::{Channel, MigrationError, PAGE_SIZE, RamView};
use qevm_savevm::StreamWriter;
use qevm_savevm::ram::BlockId;
use qevm_wire::PageGeometry;
use std::ops::Range;
use vm_memory::VolatileSlice;

/// How many pages ahead of the one that is looked at the next is fetched: from far memory it takes as long as looking
/// at a few.
const PREFETCH: u64 = 8;

/// The blocks of RAM, whose pages are sent straight from guest memory.
pub(crate) struct RamSender<'g> {
    views: Vec<RamView<'g>>,
    pages: PageGeometry,
}

impl<'g> RamSender<'g> {
    pub(crate) fn new(views: Vec<RamView<'g>>, pages: PageGeometry) -> Self {
        RamSender { views, pages }
    }

    pub(crate) fn views(&self) -> &[RamView<'g>] {
        &self.views
    }

    /// Sends a batch after what `stream` holds already. Nothing is left in `stream`.
    pub(crate) fn send(
        &self,
        channel: &dyn Channel,
        stream: &mut StreamWriter,
        batch: &Batch,
    ) -> Result<Sent, MigrationError> {
        let mut sent = Sent::default();
        let mut layout: Vec<(Range<usize>, VolatileSlice<'g>)> = Vec::new();
        let mut header_start = 0;
        for BlockRange { block, pages: run } in &batch.runs {
            let view = self.view(*block)?;
            let id = BlockId(*block as u32);
            let page = |number| page_of(view, number * self.pages.size(), self.pages.size());
            for number in run.clone() {
                let (offset, memory) = (number * self.pages.size(), page(number)?);
                if number + PREFETCH < run.end {
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
            parts.push(WriteSlice::bytes(&stream.bytes()[header.clone()]));
            parts.push(WriteSlice::guest(memory));
        }
        parts.push(WriteSlice::bytes(&stream.bytes()[header_start..]));
        sent.bytes = parts.iter().map(|part| part.len() as u64).sum();
        write_all(channel, &mut parts).map_err(|source| MigrationError::Send { doing: "pages", source })?;
        stream.clear();
        Ok(sent)
    }

    /// Writes the pages of a batch to their places in a file.
    pub(crate) fn save(&self, saving: &Saving, batch: &Batch) -> Result<Sent, MigrationError> {
        let mut sent = Sent::default();
        for BlockRange { block, pages: run } in &batch.runs {
            let offsets: Vec<_> = run.clone().map(|page| page * self.pages.size()).collect();
            let Counts { bytes, normal, zero, .. } = saving.save(*block, self.view(*block)?, &offsets)?;
            sent.bytes += bytes;
            sent.normal += normal;
            sent.zero += zero;
        }
        Ok(sent)
    }

    /// Hands a batch, which is of one block, to the page channels. With `legacy`, zero pages are found here and go into
    /// `stream`, whose content the caller sends.
    ///
    /// The counts are those of the zero pages only; the channels count the others when they have sent them.
    pub(crate) fn hand_over(
        &self,
        queue: &Queue,
        stream: &mut StreamWriter,
        batch: &Batch,
        legacy: bool,
    ) -> Result<Sent, MigrationError> {
        let mut sent = Sent::default();
        let Some(first) = batch.runs.first() else { return Ok(sent) };
        let view = self.view(first.block)?;
        let mut packet = multifd::Batch { block: first.block, pages: Vec::new() };
        for page in batch.runs.iter().flat_map(|run| run.pages.clone()) {
            let offset = page * self.pages.size();
            if legacy && is_zero(&page_of(view, offset, self.pages.size())?) {
                stream.zero_page(BlockId(first.block as u32), offset)?;
                sent.zero += 1;
            } else {
                packet.pages.push(offset);
            }
        }
        if !packet.pages.is_empty() {
            queue.push(packet)?;
        }
        Ok(sent)
    }

    /// A page of a block.
    pub(crate) fn page(&self, block: usize, offset: u64) -> Result<VolatileSlice<'g>, MigrationError> {
        page_of(self.view(block)?, offset, self.pages.size())
    }

    fn view(&self, block: usize) -> Result<&RamView<'g>, MigrationError> {
        let missing = || MigrationError::guest("reach a RAM block")(format!("there is no block {block}").into());
        self.views.get(block).ok_or_else(missing)
    }
}

/// Sends copies of pages after what `stream` holds already. Nothing is left in `stream`.
pub(crate) fn send_copy(
    channel: &dyn Channel,
    stream: &mut StreamWriter,
    copied: &Copied,
) -> Result<Sent, MigrationError> {
    let mut sent = Sent::default();
    let (id, size) = (BlockId(copied.block as u32), PAGE_SIZE as usize);
    for (offset, content) in (copied.offset..).step_by(size).zip(copied.bytes.chunks(size)) {
        if content.iter().all(|byte| *byte == 0) {
            stream.zero_page(id, offset)?;
            sent.zero += 1;
        } else {
            stream.page_header(id, offset)?;
            stream.payload(content)?;
            sent.normal += 1;
        }
    }
    sent.bytes = stream.bytes().len() as u64;
    write_all(channel, &mut [WriteSlice::bytes(stream.bytes())])
        .map_err(|source| MigrationError::Send { doing: "pages", source })?;
    stream.clear();
    Ok(sent)
}

fn page_of<'g>(view: &RamView<'g>, offset: u64, size: u64) -> Result<VolatileSlice<'g>, MigrationError> {
    view.memory
        .subslice(offset as usize, size as usize)
        .map_err(|error| MigrationError::Guest { doing: "reach a page of guest memory", source: error.into() })
}
