//! multifd and preempt channels.

use super::connection::Halt;
use super::inputs::Named;
use super::memory::Memory;
use crate::failure::Failure;
use crate::source::Source;
use qevm_savevm::ram::{PreemptDecoder, RamBlocks, RamRecord};
use qevm_savevm::{Decoder, Step};
use qevm_wire::PageGeometry;
use std::sync::Arc;

/// First word of a multifd channel.
const MULTIFD_MAGIC: [u8; 4] = 0x1122_3344u32.to_be_bytes();

/// The channels beside the main one.
#[derive(Default)]
pub(super) struct Channels {
    multifd: Vec<Channel>,
    preempt: Vec<Channel>,
    bytes: u64,
    syncs: u64,
}

struct Channel {
    name: String,
    source: Source,
    description: String,
}

impl Channels {
    /// Recognises channels by their first bytes.
    pub(super) fn open(files: &mut Vec<Named>) -> Result<Self, Halt> {
        let mut channels = Channels::default();
        for Named { name, mut source } in files.drain(..) {
            source.fill(4).map_err(|error| Failure::io(&name, 0, &error))?;
            let multifd = source.window().starts_with(&MULTIFD_MAGIC);
            let channel = Channel { name, source, description: String::new() };
            if multifd { channels.multifd.push(channel) } else { channels.preempt.push(channel) }
        }
        Ok(channels)
    }

    pub(super) fn any_multifd(&self) -> bool {
        !self.multifd.is_empty()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn describe(&self) -> Vec<String> {
        self.multifd.iter().chain(&self.preempt).map(|c| format!("{}: {}", c.name, c.description)).collect()
    }

    pub(super) fn sync(
        &mut self,
        _memory: &mut Memory,
        _blocks: &Arc<RamBlocks>,
        _pages: PageGeometry,
        _main: &str,
        _at: u64,
    ) -> Result<(), Halt> {
        self.syncs += 1;
        Ok(())
    }

    pub(super) fn finish(&mut self, memory: &mut Memory, main: &Decoder, can_break: bool) -> Result<(), Halt> {
        for channel in &mut self.preempt {
            self.bytes += preempt(channel, memory, main, can_break)?;
        }
        Ok(())
    }
}

fn preempt(channel: &mut Channel, memory: &mut Memory, main: &Decoder, can_break: bool) -> Result<u64, Halt> {
    let Channel { name, source, description } = channel;
    let mut decoder = PreemptDecoder::new(main.ram_blocks().clone(), main.page_geometry());
    let io = |offset: u64, error: std::io::Error| Failure::io(name, offset, &error);
    let (mut pages, mut zeroes) = (0u64, 0u64);
    let page_size = main.page_geometry().size();
    let mut target = None;
    loop {
        let at = source.offset();
        match decoder.next(source.window()) {
            Ok(Step::Event { consumed, event }) => {
                match event {
                    RamRecord::Zero(page) => {
                        zeroes += 1;
                        memory.ram.put_zero(page.block.index(), page.offset).map_err(|e| io(at, e))?;
                    }
                    RamRecord::Page(page) => {
                        pages += 1;
                        target = Some(page);
                    }
                    _ => {}
                }
                source.consume(consumed);
            }
            Ok(Step::Payload { remaining }) => {
                source.fill(remaining as usize).map_err(|e| io(at, e))?;
                match (source.window().get(..page_size as usize), target) {
                    (Some(page), Some(place)) => {
                        memory.ram.put(place.block.index(), place.offset, page).map_err(|e| io(at, e))?;
                        source.consume(page_size as usize);
                        decoder.skip_payload(page_size).map_err(|error| Failure::located(name, error))?;
                    }
                    _ => decoder.end_of_input(),
                }
            }
            Ok(Step::NeedMore { at_least }) => {
                source.fill(at_least).map_err(|e| io(at, e))?;
                if source.at_end() {
                    decoder.end_of_input();
                }
            }
            Ok(Step::End) => break,
            Err(error) if can_break && error.is_truncated() => break,
            Err(error) => return Err(Failure::located(name, error).into()),
        }
    }
    // Whatever follows an EOS is no record.
    source.fill(1).map_err(|e| Failure::io(name, source.offset(), &e))?;
    if !source.window().is_empty() && !can_break {
        let message = "bytes behind the end of the preempt channel";
        return Err(Failure::mismatch(name, source.offset(), "preempt channel", message).into());
    }
    *description = format!("postcopy-preempt, {pages} pages, {zeroes} zero pages");
    Ok(source.offset())
}
