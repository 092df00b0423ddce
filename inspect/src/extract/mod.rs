//! Getting a guest out of a migration: RAM blocks as files, guest-physical memory as a raw file, an ELF core or a
//! compressed dump, device state as JSON.
//!
//! Output files are sparse: pages that are zero, or never came, are holes.

pub mod devices;
pub mod elf_core;
mod guest;
mod kdump;
mod memory_devices;
mod physical;
mod piece;
mod registers;
mod vmcoreinfo;

pub use devices::Devices;
pub use guest::{Guest, GuestObserver};
pub use kdump::PageCompression;
pub use memory_devices::{MemoryDevices, Tables};
pub use physical::{MemoryBlock, PhysicalMemory};
pub use piece::Piece;
pub use registers::CpuNotes;
pub use vmcoreinfo::VmCoreInfo;

use crate::failure::{Error, Failure};
use crate::output_file::{OutputFile, Runs};
use crate::ram::{GuestRam, Stretch};
use crate::stream::Analysis;
use elf_core::{CoreHeader, Format, Load, Note, core_header_of, x86_notes};
use std::fs::File;
use std::io::BufWriter;
use std::os::unix::fs::FileExt;
use std::path::Path;

impl PhysicalMemory {
    /// Writes the memory as a sparse raw file in which the offset is the guest-physical address.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if a file cannot be read or written.
    pub fn write_raw(&self, ram: &mut GuestRam, output: OutputFile) -> Result<u64, Error> {
        let (path, file) = (output.path(), output.file());
        let places = self.segments.iter().map(|segment| segment.address);
        let end = self.segments.last().map_or(0, |segment| segment.address + segment.len);
        self.write(ram, path, file, places)?;
        finish(output, end)
    }

    /// Writes the memory as an ELF core with the registers of `cpus`.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if a file cannot be read or written.
    pub fn write_elf(&self, ram: &mut GuestRam, guest: &Guest, output: OutputFile) -> Result<u64, Error> {
        let (path, file) = (output.path(), output.file());
        let loads: Vec<Load> = self.segments.iter().map(|s| Load { address: s.address, len: s.len }).collect();
        let (format, notes) = self.notes(ram, guest)?;
        let CoreHeader { bytes, offsets } = core_header_of(format, &notes, &loads);
        file.write_all_at(&bytes, 0).map_err(|error| write_error(path, 0, &error))?;
        self.write(ram, path, file, offsets.iter().copied())?;
        let end = offsets.last().zip(loads.last()).map_or(bytes.len() as u64, |(offset, load)| offset + load.len);
        finish(output, end)
    }

    /// The note in which the kernel of a `guest` with device `vmcoreinfo` tells of itself.
    /// [`write_elf`](Self::write_elf) and [`write_kdump`](Self::write_kdump) write it.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if a file cannot be read.
    pub fn vmcoreinfo(&self, ram: &mut GuestRam, guest: &Guest) -> Result<VmCoreInfo, Error> {
        let Some(place) = guest.vmcoreinfo else { return Ok(VmCoreInfo::default()) };
        let len = u64::from(place.len.min(vmcoreinfo::MAX_LEN));
        let bytes = self.read(ram, place.address, len)?;
        Ok(VmCoreInfo::read(guest.notes().0, place, &bytes))
    }

    /// Up to `len` bytes from `address` on, of one piece.
    fn read(&self, ram: &mut GuestRam, address: u64, len: u64) -> Result<Vec<u8>, Error> {
        let here = |piece: &&Piece| piece.address <= address && address - piece.address < piece.len;
        let Some(piece) = self.segments.iter().find(here) else { return Ok(Vec::new()) };
        let skipped = address - piece.address;
        let (from, len) = (piece.block_offset + skipped, len.min(piece.len - skipped));
        let mut bytes = vec![0; len as usize];
        ram.stretches(piece.block, from, len, |offset, stretch| {
            if let Stretch::Data(pages) = stretch {
                // The first page may begin before the first byte.
                let (to, skipped) = (offset.saturating_sub(from) as usize, from.saturating_sub(offset) as usize);
                let pages = pages.get(skipped..).unwrap_or_default();
                let here = pages.len().min(bytes.len() - to);
                bytes[to..to + here].copy_from_slice(&pages[..here]);
            }
            Ok::<(), Error>(())
        })?;
        Ok(bytes)
    }

    /// The kind of file for the `guest`, and all that it tells beside the memory.
    fn notes(&self, ram: &mut GuestRam, guest: &Guest) -> Result<(Format, Vec<Note>), Error> {
        let (format, mut notes) = guest.notes();
        notes.extend(self.vmcoreinfo(ram, guest)?.note);
        Ok((format, notes))
    }

    fn write(
        &self,
        ram: &mut GuestRam,
        path: &Path,
        file: &File,
        places: impl Iterator<Item = u64>,
    ) -> Result<(), Error> {
        for (segment, place) in self.segments.iter().zip(places) {
            copy_pages(ram, segment.block, segment.block_offset, segment.len, path, file, place)?;
        }
        Ok(())
    }
}

impl Guest {
    /// The kind of file for a guest of this target, and what it tells of the CPUs.
    fn notes(&self) -> (Format, Vec<Note>) {
        match self.other_cpus.first() {
            None => x86_notes(&self.cpus),
            Some(first) => (first.format, self.other_cpus.iter().flat_map(|cpu| cpu.notes.iter().cloned()).collect()),
        }
    }
}

/// Writes RAM block number `block` as a sparse raw file and returns its length.
///
/// # Errors
/// [`Error::Bad`] with kind `io` if a file cannot be read or written.
pub fn write_block(ram: &mut GuestRam, block: usize, output: OutputFile) -> Result<u64, Error> {
    let len = ram.blocks()[block].used_length;
    copy_pages(ram, block, 0, len, output.path(), output.file(), 0)?;
    finish(output, len)
}

/// Writes device state as JSON.
///
/// # Errors
/// [`Error::Bad`] with kind `io` if the file cannot be written.
pub fn write_devices(devices: &mut Devices, analysis: &Analysis, output: OutputFile) -> Result<u64, Error> {
    let written = devices.write(analysis, BufWriter::new(output.file())).and_then(|()| output.file().metadata());
    let len = written.map_err(|error| write_error(output.path(), 0, &error))?.len();
    finish(output, len)
}

fn copy_pages(
    ram: &mut GuestRam,
    block: usize,
    from: u64,
    len: u64,
    path: &Path,
    file: &File,
    to: u64,
) -> Result<(), Error> {
    let failed = |(place, error): (u64, std::io::Error)| write_error(path, place, &error);
    let mut runs = Runs::new(file);
    ram.stretches(block, from, len, |offset, stretch| {
        let Stretch::Data(pages) = stretch else { return Ok(()) };
        let here = (pages.len() as u64).min(from + len - offset) as usize;
        runs.put(to + (offset - from), &pages[..here]).map_err(failed)
    })?;
    runs.flush().map_err(failed)
}

/// The output is whole: from now on it is called by its name.
fn finish(output: OutputFile, len: u64) -> Result<u64, Error> {
    let path = output.path().to_owned();
    output.file().set_len(len).and_then(|()| output.publish()).map_err(|error| write_error(&path, len, &error))?;
    Ok(len)
}

fn write_error(path: &Path, offset: u64, error: &std::io::Error) -> Error {
    Failure::io(&path.display().to_string(), offset, error).into()
}
