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
pub use guest::{Guest, GuestObserver, Wanted};
pub use kdump::PageCompression;
pub use memory_devices::{MemoryDevices, Tables};
pub use physical::{MemoryBlock, PhysicalMemory};
pub use piece::Piece;
pub use registers::CpuNotes;
pub use vmcoreinfo::VmCoreInfo;

use crate::failure::{Error, Failure};
use crate::output_file::{OutputFile, Runs, empty};
use crate::ram::{Destination, GuestRam, Stretch};
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
        let end = self.segments.last().map_or(0, |segment| segment.address + segment.len);
        write(ram, &output, &self.in_raw(), &[])?;
        finish(output, end)
    }

    /// Writes the memory as an ELF core with the registers of `cpus`.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if a file cannot be read or written.
    pub fn write_elf(&self, ram: &mut GuestRam, guest: &Guest, output: OutputFile) -> Result<u64, Error> {
        let (format, notes) = self.notes(ram, guest)?;
        let (header, destinations) = self.in_core(format, &notes);
        let end = destinations.last().map_or(header.len() as u64, |last| last.file_offset + last.len);
        write(ram, &output, &destinations, &header)?;
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

    /// Where the memory is in a raw file.
    fn in_raw(&self) -> Vec<Destination> {
        self.at(self.segments.iter().map(|segment| segment.address))
    }

    /// What precedes the memory in an ELF core, and where the memory is.
    fn in_core(&self, format: Format, notes: &[Note]) -> (Vec<u8>, Vec<Destination>) {
        let loads: Vec<Load> = self.segments.iter().map(|s| Load { address: s.address, len: s.len }).collect();
        let CoreHeader { bytes, offsets } = core_header_of(format, notes, &loads);
        (bytes, self.at(offsets.into_iter()))
    }

    fn at(&self, places: impl Iterator<Item = u64>) -> Vec<Destination> {
        let destination = |(segment, file_offset): (&Piece, u64)| {
            let Piece { block, block_offset, len, .. } = *segment;
            Destination { block, block_offset, len, file_offset }
        };
        self.segments.iter().zip(places).map(destination).collect()
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
    write(ram, &output, &[Destination { block, block_offset: 0, len, file_offset: 0 }], &[])?;
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

/// Writes `header`, and memory to its destinations, but for what was copied there as it came.
fn write(ram: &mut GuestRam, output: &OutputFile, destinations: &[Destination], header: &[u8]) -> Result<(), Error> {
    let (path, file) = (output.path(), output.file());
    let mut copied = ram.copied_to(file, &path.display().to_string())?;
    if !copied.iter().all(|copied| destinations.contains(copied)) {
        copied.clear();
    }
    if copied.is_empty() {
        empty(file).map_err(|error| write_error(path, 0, &error))?;
    }
    file.write_all_at(header, 0).map_err(|error| write_error(path, 0, &error))?;
    let mut left = destinations.iter().filter(|destination| !copied.contains(destination));
    left.try_for_each(|destination| copy_pages(ram, path, file, destination))
}

fn copy_pages(ram: &mut GuestRam, path: &Path, file: &File, destination: &Destination) -> Result<(), Error> {
    let Destination { block, block_offset, len, file_offset } = *destination;
    let failed = |(place, error): (u64, std::io::Error)| write_error(path, place, &error);
    let mut runs = Runs::new(file);
    ram.stretches(block, block_offset, len, |offset, stretch| {
        let Stretch::Data(pages) = stretch else { return Ok(()) };
        let here = (pages.len() as u64).min(block_offset + len - offset) as usize;
        runs.put(file_offset + (offset - block_offset), &pages[..here]).map_err(failed)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::Spool;
    use crate::pages::tests::{Told, stream, told};
    use crate::ram::Keep;
    use crate::source::Source;
    use crate::stream::{Inputs, Layouts, Settings, analyze};
    use proptest::prelude::*;

    /// A description that tells of this many CPUs.
    fn description(cpus: usize) -> Vec<u8> {
        let device = |n| format!(r#"{{"name":"cpu","instance_id":{n},"vmsd_name":"cpu","version":12,"fields":[]}}"#);
        let devices: Vec<String> = (0..cpus).map(device).collect();
        let text = format!(r#"{{"page_size":4096,"devices":[{}]}}"#, devices.join(","));
        [&[6], &(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
    }

    /// The file of a stream, and whether memory was copied to it as it came.
    fn extracted(bytes: &[u8], core: bool, copying: bool) -> (Vec<u8>, bool) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let output = OutputFile::create(&path, false).unwrap();
        let source = Source::seekable(std::sync::Arc::new(bytes.to_vec()), bytes.len() as u64);
        let settings = Settings {
            keep: Keep::Contents,
            reencode: false,
            complete: true,
            strict: false,
            live: false,
            layouts: Layouts::default(),
            spool: Spool::unlimited(),
            max_ram: u64::MAX,
        };
        let mut position = |_| ();
        let mut observer = GuestObserver::new(&mut position, None);
        if copying {
            observer = observer.copying(Wanted { output: &output, core, machine: None, blocks: &[] });
        }
        let analysis = analyze(&mut Inputs::single("file", source), &settings, &mut observer);
        assert_eq!(analysis.failure, None);
        let (guest, mut ram) = (observer.finish(), analysis.ram.unwrap());
        let physical = PhysicalMemory::find("", &ram, &guest, &Tables::default(), &[]).unwrap();
        let is_copied = ram.is_copied();
        match core {
            true => physical.write_elf(&mut ram, &guest, output).unwrap(),
            false => physical.write_raw(&mut ram, output).unwrap(),
        };
        (std::fs::read(&path).unwrap(), is_copied)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn memory_that_is_copied_as_it_comes_is_where_it_would_be_written_to(told in told(), core: bool) {
            let bytes = [stream(&told), description(0)].concat();
            let (copied, was_copied) = extracted(&bytes, core, true);
            prop_assert!(copied == extracted(&bytes, core, false).0);
            // What came before a page as it is was not.
            let first = told.iter().find(|(_, told)| !matches!(told, Told::Zero | Told::Difference(0)));
            prop_assert_eq!(was_copied, matches!(first, Some((_, Told::Page(_)))));
        }
    }

    /// The description tells of more CPUs than come, whose notes would move the memory.
    #[test]
    fn memory_that_was_copied_to_another_place_is_written_again() {
        let pages: Vec<(u64, Told)> = (3..500).map(|page| (page, Told::Page(page as u8))).collect();
        let bytes = [stream(&pages), description(20)].concat();
        let (copied, was_copied) = extracted(&bytes, true, true);
        assert!(was_copied);
        assert!(copied == extracted(&bytes, true, false).0);
    }
}
