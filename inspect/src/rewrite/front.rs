//! What a mapped-ram file has up to its last page, which is known before any page is.

use super::capability::{MAPPED_RAM, with_capability};
use super::unwritable::cannot_write;
use crate::failure::Error;
use crate::ram::{Copying, Destination, PageCopy};
use qevm_savevm::configuration::Configuration;
use qevm_savevm::event::Event;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::mapped_ram::MappedBlock;
use qevm_savevm::ram::{MappedRamHeader, RamBlock, RamRecord};
use qevm_savevm::{Encoder, StreamWriter};
use qevm_wire::PageGeometry;
use std::fs::File;

/// What a mapped-ram file has up to its last page.
pub(super) struct Front {
    /// Where the stream goes on.
    pub(super) stream: StreamWriter,
    pub(super) parts: Vec<(u64, Vec<u8>)>,
    pub(super) blocks: Vec<MappedBlock>,
    /// Offset in the file of what is in `stream`.
    pub(super) offset: u64,
}

/// `absent`: this block has no pages.
pub(super) fn front(
    mut stream: StreamWriter,
    configuration: Option<Configuration>,
    ram_section: &SectionHeader,
    ram_blocks: &[RamBlock],
    pages: PageGeometry,
    absent: impl Fn(usize) -> bool,
    name: &str,
) -> Result<Front, Error> {
    let configuration = configuration.map(|c| with_capability(c, MAPPED_RAM));
    stream.header(configuration.as_ref()).map_err(cannot_write)?;
    stream.section_start(ram_section).map_err(cannot_write)?;
    let total = ram_blocks.iter().map(|block| block.used_length).sum();
    stream.event(&Event::Ram(RamRecord::MemSize { total })).map_err(cannot_write)?;
    let (mut parts, mut offset) = (Vec::new(), 0);
    let mut blocks = Vec::with_capacity(ram_blocks.len());
    for (index, block) in ram_blocks.iter().enumerate() {
        // What x-ignore-shared has left out stays out.
        if block.address.is_some() && absent(index) {
            let header = MappedRamHeader::absent(pages.size());
            let listed = RamBlock { mapped_ram: Some(header), ..block.clone() };
            stream.event(&Event::Ram(RamRecord::Block(listed))).map_err(cannot_write)?;
            blocks.push(MappedBlock { header, used_length: block.used_length });
            continue;
        }
        let layout = MappedBlock::place_record(offset + stream.bytes().len() as u64, block, pages)
            .ok_or_else(|| Error::Usage(format!("{name}: RAM block '{}' does not fit a file", block.name)))?;
        let listed = RamBlock { mapped_ram: Some(layout.header), ..block.clone() };
        stream.event(&Event::Ram(RamRecord::Block(listed))).map_err(cannot_write)?;
        parts.push((offset, stream.take()));
        offset = layout.end();
        blocks.push(layout);
    }
    Ok(Front { stream, parts, blocks, offset })
}

/// Where the memory is in a file with these blocks.
pub(super) fn destinations(blocks: &[MappedBlock]) -> Vec<Destination> {
    let there = blocks.iter().enumerate().filter(|(_, layout)| !layout.header.is_absent());
    let destination = |(block, layout): (usize, &MappedBlock)| {
        let (len, file_offset) = (layout.used_length, layout.header.pages_offset);
        Destination { block, block_offset: 0, len, file_offset }
    };
    there.map(destination).collect()
}

/// Copies pages to where they will be in a mapped-ram file, if that can be told before the first one came.
pub(super) fn copy(
    configuration: Option<Configuration>,
    ram_section: &SectionHeader,
    blocks: &[RamBlock],
    pages: PageGeometry,
    file: &File,
    name: &str,
) -> Option<Copying> {
    // Which blocks x-ignore-shared has left out shows when they do not come.
    if blocks.iter().any(|block| block.address.is_some()) {
        return None;
    }
    let stream = StreamWriter::new(Encoder::new(pages), true);
    let front = front(stream, configuration, ram_section, blocks, pages, |_| false, name).ok()?;
    // If they cannot be copied now, they will be written later.
    PageCopy::new(file, name, destinations(&front.blocks)).ok()?.map(Copying::Placed)
}
