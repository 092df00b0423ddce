//! A thread that reads the pages of one channel.

use super::stream::Payload;
use super::{Gate, PageStream, States};
use crate::channel::ReadSlice;
use crate::core::{PageAction, PageTurn};
use crate::ram_receiver::Listed;
use crate::zero::{ZERO_PAGE, is_zero};
use crate::{Guest, LoadError, MigrationError, PAGE_SIZE, RamView};
use qevm_multifd::{Compression, Decompressor, RamPacket, Run};
use qevm_wire::{Located, PageGeometry};
use std::sync::OnceLock;
use vm_memory::{Bytes, VolatileSlice};

/// Reads a channel to its end. `listed` are the RAM blocks that the main channel listed, as soon as it has; `states`
/// gets what devices send.
pub(crate) fn receive_pages(
    guest: &dyn Guest,
    stream: &mut PageStream,
    compression: Compression,
    listed: &OnceLock<Vec<Listed>>,
    gate: &Gate,
    states: &States,
) -> Result<(), MigrationError> {
    let decompressor = match compression {
        Compression::None => None,
        method => Some(Decompressor::new(method, PageGeometry::X86)?),
    };
    let mut receiver = Receiver { guest, listed, blocks: Vec::new(), decompressor, payload: Vec::new() };
    let number = stream.number();
    let synchronisation = |error| MigrationError::from(Located::new(LoadError::from(error), 0));
    loop {
        let PageStream { channel, core, header, filled, ahead } = &mut *stream;
        let length_of = |name: &[u8]| receiver.block(name).map(|(listed, _)| listed.used_length);
        let PageTurn { consumed, action } = core.next(&header[..*filled], length_of)?;
        match action {
            PageAction::Read { at_least } => stream.fill(at_least)?,
            PageAction::Packet(packet) => {
                // All of the header is used.
                *filled = 0;
                receiver.packet(&packet, Payload { channel: &**channel, core, ahead, filled }, gate)?;
                stream.advance();
            }
            PageAction::DeviceState(packet) => {
                let mut content = states.spare();
                stream.read_content(consumed, packet.payload_len as usize, &mut content)?;
                gate.count(content.len() as u64);
                states.put(&packet, content).map_err(|error| stream.core.refuse(error))?;
            }
            // A packet's payload is read with the packet, so that none is left.
            PageAction::Payload { remaining } => return Err(core.cut(remaining, 0)),
            PageAction::Synchronise => gate.channel_sync(number).map_err(synchronisation)?,
            PageAction::End => {
                states.channel_end();
                return gate.channel_end(number).map_err(synchronisation);
            }
        }
    }
}

struct Receiver<'r> {
    guest: &'r dyn Guest,
    listed: &'r OnceLock<Vec<Listed>>,
    blocks: Vec<(&'r Listed, RamView<'r>)>,
    decompressor: Option<Decompressor>,
    payload: Vec<u8>,
}

const PAGE: usize = PAGE_SIZE as usize;

impl<'r> Receiver<'r> {
    fn packet(&mut self, packet: &RamPacket<'_>, mut payload: Payload<'_>, gate: &Gate) -> Result<(), MigrationError> {
        if !packet.has_pages() {
            return Ok(());
        }
        // A block that is unknown was refused.
        let Some((listed, view)) = self.block(packet.block_bytes()) else { return Ok(()) };
        listed.presence.note(&listed.name).map_err(|error| payload.core.refuse(error))?;
        let pages = |run: &Run| PageGeometry::X86.index(run.offset)..PageGeometry::X86.index(run.offset + run.len);
        let received = |run: &Run| listed.received.iter().for_each(|received| received.mark(pages(run)));
        for run in packet.zero_runs() {
            received(&run);
            for offset in (run.offset..run.offset + run.len).step_by(PAGE) {
                if listed.written.contains(PageGeometry::X86.index(offset)) {
                    let page = part(&view, Run { offset, len: PAGE as u64 })?;
                    if !is_zero(&page) {
                        page.copy_from(&ZERO_PAGE[..]);
                    }
                }
            }
        }
        let len = packet.payload_len() as usize;
        if packet.normal_count() == 0 {
            return Ok(());
        }
        let mut runs = Vec::new();
        for run in packet.normal_runs() {
            listed.written.mark(pages(&run));
            received(&run);
            runs.push(part(&view, run)?);
        }
        match &mut self.decompressor {
            None => payload.read(runs.iter().map(ReadSlice::guest).collect(), len)?,
            Some(decompressor) => {
                // The decoder has checked the length against its limit, 1 MiB.
                self.payload.resize(len, 0);
                payload.read(vec![ReadSlice::bytes(&mut self.payload)], len)?;
                decompress(decompressor, &self.payload, packet.normal_count(), &runs, &payload)?;
            }
        }
        gate.count(len as u64);
        Ok(())
    }

    /// The block of this name, if the main channel has listed it.
    fn block(&mut self, name: &[u8]) -> Option<(&'r Listed, RamView<'r>)> {
        if self.blocks.is_empty() {
            let views = self.guest.ram();
            let view =
                |listed: &'r Listed| views.iter().find(|view| listed.name == *view.name).map(|view| (listed, *view));
            self.blocks = self.listed.get()?.iter().filter_map(view).collect();
        }
        self.blocks.iter().find(|(listed, _)| listed.name.as_bytes() == name).copied()
    }
}

/// Unpacks a payload page by page, over a copy that stays in the processor's first cache.
fn decompress(
    decompressor: &mut Decompressor,
    data: &[u8],
    pages: u32,
    runs: &[VolatileSlice<'_>],
    payload: &Payload<'_>,
) -> Result<(), MigrationError> {
    let mut copy = [0; PAGE];
    let mut source = decompressor.packet(data, pages).map_err(|error| payload.fail(error))?;
    for run in runs {
        for at in (0..run.len()).step_by(PAGE) {
            source.fill(&mut copy).map_err(|error| payload.fail(error))?;
            run.write_slice(&copy, at)
                .map_err(|error| MigrationError::Guest { doing: "write guest memory", source: error.into() })?;
        }
    }
    source.finish().map_err(|error| payload.fail(error))
}

/// Memory of a run of pages, which was checked against the block's length.
fn part<'g>(view: &RamView<'g>, run: Run) -> Result<VolatileSlice<'g>, MigrationError> {
    view.memory
        .subslice(run.offset as usize, run.len as usize)
        .map_err(|error| MigrationError::Guest { doing: "reach a page of guest memory", source: error.into() })
}
