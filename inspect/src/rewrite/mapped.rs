//! A guest as a mapped-ram file: every page at its own place.

use super::{MAPPED_RAM, SavedGuest, cannot_write, with_capability};
use crate::failure::{Error, Failure};
use crate::output_file::Runs;
use qevm_savevm::event::Event;
use qevm_savevm::mapped_ram::MappedBlock;
use qevm_savevm::ram::{MappedRamHeader, RamBlock, RamRecord};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A mapped-ram file without its pages and their bitmaps.
#[derive(Debug)]
pub(super) struct Layout {
    /// Parts of the stream, each with its offset in the file.
    pub(super) parts: Vec<(u64, Vec<u8>)>,
    /// Where bitmap and pages of each block are.
    pub(super) blocks: Vec<MappedBlock>,
    /// Length of the file in bytes.
    pub(super) len: u64,
}

/// A file that is written piece by piece, with holes.
struct Place<'a> {
    file: &'a File,
    name: &'a str,
}

impl Place<'_> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        self.file.write_all_at(bytes, offset).map_err(|error| Failure::io(self.name, offset, &error).into())
    }
}

/// Bytes of a bitmap that are held at a time.
const PIECE: usize = 4096;

/// The bitmap of a block, written piece by piece: where no page is present, it is a hole. That of 1 PiB has 32 GiB.
struct Present {
    bitmap_offset: u64,
    /// Number of the piece that is held.
    piece: u64,
    bits: [u8; PIECE],
}

impl Present {
    fn new(bitmap_offset: u64) -> Self {
        Present { bitmap_offset, piece: 0, bits: [0; PIECE] }
    }

    /// Marks a page as present. Pages come in order.
    fn set(&mut self, page: u64, place: &Place<'_>) -> Result<(), Error> {
        let (piece, byte) = (page / 8 / PIECE as u64, (page / 8 % PIECE as u64) as usize);
        if piece != self.piece {
            self.write(place)?;
            self.piece = piece;
        }
        self.bits[byte] |= 1 << (page % 8);
        Ok(())
    }

    /// Writes what is held.
    fn write(&mut self, place: &Place<'_>) -> Result<(), Error> {
        let Some(last) = self.bits.iter().rposition(|byte| *byte != 0) else { return Ok(()) };
        place.write_at(&self.bits[..=last], self.bitmap_offset + self.piece * PIECE as u64)?;
        self.bits.fill(0);
        Ok(())
    }
}

impl SavedGuest {
    /// Writes the guest to `file`, which is called `name` in errors, and returns the file's length. Pages of zeroes
    /// become holes. Tells `position` how many bytes of pages are written.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if the file cannot be written.
    pub fn write_mapped(&mut self, file: &File, name: &str, position: &mut dyn FnMut(u64)) -> Result<u64, Error> {
        let place = Place { file, name };
        let layout = self.layout(name)?;
        layout.parts.iter().try_for_each(|(offset, bytes)| place.write_at(bytes, *offset))?;
        let mut done = 0;
        for (block, layout) in layout.blocks.iter().enumerate() {
            let mut present = Present::new(layout.header.bitmap_offset);
            let pages = self.pages;
            let failed = |(at, error): (u64, std::io::Error)| Error::from(Failure::io(name, at, &error));
            let mut runs = Runs::new(file);
            self.each_page(block, |offset, content| {
                if let Some(content) = content {
                    present.set(pages.index(offset), &place)?;
                    runs.put(layout.header.pages_offset + offset, content).map_err(failed)?;
                    done += content.len() as u64;
                    position(done);
                }
                Ok(())
            })?;
            runs.flush().map_err(failed)?;
            present.write(&place)?;
        }
        Ok(layout.len)
    }

    /// What such a file, which is called `name` in errors, has beside pages and bitmaps, and where those are.
    pub(super) fn layout(&self, name: &str) -> Result<Layout, Error> {
        let mut stream = self.stream();
        let configuration = self.configuration.clone().map(|c| with_capability(c, MAPPED_RAM));
        stream.header(configuration.as_ref()).map_err(cannot_write)?;
        stream.section_start(&self.ram_section).map_err(cannot_write)?;
        let total = self.blocks.iter().map(|block| block.used_length).sum();
        stream.event(&Event::Ram(RamRecord::MemSize { total })).map_err(cannot_write)?;
        let (mut parts, mut offset) = (Vec::new(), 0);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (index, block) in self.blocks.iter().enumerate() {
            // What x-ignore-shared has left out stays out.
            if block.address.is_some() && self.ram.blocks().get(index).is_some_and(|block| block.pages == 0) {
                let header = MappedRamHeader::absent(self.pages.size());
                let listed = RamBlock { mapped_ram: Some(header), ..block.clone() };
                stream.event(&Event::Ram(RamRecord::Block(listed))).map_err(cannot_write)?;
                blocks.push(MappedBlock { header, used_length: block.used_length });
                continue;
            }
            let layout = MappedBlock::place_record(offset + stream.bytes().len() as u64, block, self.pages)
                .ok_or_else(|| Error::Usage(format!("{name}: RAM block '{}' does not fit a file", block.name)))?;
            let listed = RamBlock { mapped_ram: Some(layout.header), ..block.clone() };
            stream.event(&Event::Ram(RamRecord::Block(listed))).map_err(cannot_write)?;
            parts.push((offset, stream.take()));
            offset = layout.end();
            blocks.push(layout);
        }
        stream.eos().map_err(cannot_write)?;
        stream.footer().map_err(cannot_write)?;
        self.write_setup(&mut stream)?;
        stream.section_end(self.ram_section.section_id).map_err(cannot_write)?;
        stream.eos().map_err(cannot_write)?;
        stream.footer().map_err(cannot_write)?;
        self.write_end(&mut stream)?;
        let end = stream.take();
        let len = offset + end.len() as u64;
        parts.push((offset, end));
        Ok(Layout { parts, blocks, len })
    }
}
