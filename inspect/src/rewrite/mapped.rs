//! A guest as a mapped-ram file: every page at its own place.

use super::front::{Front, destinations, front};
use super::{SavedGuest, cannot_write};
use crate::failure::{Error, Failure};
use crate::output_file::{Runs, empty};
use crate::ram::Stretch;
use qevm_savevm::mapped_ram::MappedBlock;
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
        let copied = self.ram.copied_to(file, name)?;
        let is_copied = !copied.is_empty() && copied == destinations(&layout.blocks);
        if !is_copied {
            empty(file).map_err(|error| Failure::io(name, 0, &error))?;
        }
        layout.parts.iter().try_for_each(|(offset, bytes)| place.write_at(bytes, *offset))?;
        let mut done = 0;
        for (block, layout) in layout.blocks.iter().enumerate() {
            let mut present = Present::new(layout.header.bitmap_offset);
            if is_copied {
                self.ram.contents(block, |first, pages| {
                    (first..first + pages).try_for_each(|page| present.set(page, &place))
                })?;
                present.write(&place)?;
                continue;
            }
            let size = self.pages.size();
            let failed = |(at, error): (u64, std::io::Error)| Error::from(Failure::io(name, at, &error));
            let mut runs = Runs::new(file);
            self.ram.stretches(block, 0, layout.used_length, |offset, stretch| {
                let Stretch::Data(contents) = stretch else { return Ok::<(), Error>(()) };
                let first = offset / size;
                let pages = contents.len() as u64 / size;
                (first..first + pages).try_for_each(|page| present.set(page, &place))?;
                runs.put(layout.header.pages_offset + offset, contents).map_err(failed)?;
                done += contents.len() as u64;
                position(done);
                Ok(())
            })?;
            runs.flush().map_err(failed)?;
            present.write(&place)?;
        }
        Ok(layout.len)
    }

    /// What such a file, which is called `name` in errors, has beside pages and bitmaps, and where those are.
    pub(super) fn layout(&self, name: &str) -> Result<Layout, Error> {
        let absent = |index: usize| self.ram.blocks().get(index).is_some_and(|block| block.pages == 0);
        let Front { mut stream, mut parts, blocks, offset } = front(
            self.stream(),
            self.configuration.clone(),
            &self.ram_section,
            &self.blocks,
            self.pages,
            absent,
            name,
        )?;
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
