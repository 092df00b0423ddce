//! A saved guest in one call: what most tools need.

use crate::bounds::Bounds;
use crate::extract::{Devices, Guest, GuestObserver, PageCompression, PhysicalMemory, Tables, write_devices};
use crate::failure::Error;
use crate::output_file::OutputFile;
use crate::ram::{Block, GuestRam, Keep};
use crate::stream::{Analysis, Inputs, Layouts, Section, Settings, analyze};
use qevm_savevm::framing::SectionKind;
use std::path::Path;

/// A guest that was read to the end of its migration, with its memory and its devices.
///
/// ```
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/streams/7.2-return-path.zst"));
/// use qevm_inspect::Migration;
///
/// let guest = Migration::open(path)?;
/// assert_eq!(guest.machine(), "microvm");
/// assert_eq!((guest.blocks()[0].name.as_str(), guest.blocks()[0].used_length), ("mem", 4 << 20));
/// assert!(guest.devices().any(|device| device.header.idstr == "cpu"));
/// # Ok::<(), qevm_inspect::failure::Error>(())
/// ```
#[derive(Debug)]
pub struct Migration {
    analysis: Analysis,
    ram: GuestRam,
    guest: Guest,
}

impl Migration {
    /// Reads a file, whatever container its stream is in, within the default [`Bounds`].
    ///
    /// # Errors
    /// [`Error::Usage`] if the file cannot be opened or holds no stream that could be meant, [`Error::Bad`] if the
    /// stream is bad.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::read(&mut Inputs::of_file(path)?, &Bounds::default(), &mut |_| ())
    }

    /// Reads a migration that may be in several files, and tells `position` how far the main channel was read.
    ///
    /// # Errors
    /// [`Error::Bad`] if the migration is bad or incomplete, or takes more than the `bounds`; [`Error::Usage`] if it
    /// has no memory.
    pub fn read(inputs: &mut Inputs, bounds: &Bounds, position: &mut dyn FnMut(u64)) -> Result<Self, Error> {
        let settings = Settings {
            keep: Keep::Image,
            reencode: false,
            complete: true,
            strict: false,
            live: false,
            layouts: Layouts::default(),
            spool: bounds.spool(),
            max_ram: bounds.max_ram,
        };
        let mut observer = GuestObserver::new(position, Some(Devices::new(settings.spool.clone())));
        let mut analysis = analyze(inputs, &settings, &mut observer);
        let guest = observer.finish();
        if let Some(failure) = analysis.failure.take() {
            return Err(failure.into());
        }
        let ram = analysis.ram.take();
        let ram = ram.ok_or_else(|| Error::Usage(format!("{}: has no guest memory", inputs.main.name)))?;
        Ok(Migration { analysis, ram, guest })
    }

    /// The machine type, escaped for printing; empty if the stream does not tell it.
    pub fn machine(&self) -> String {
        self.analysis.machine().unwrap_or_default()
    }

    /// The RAM blocks, in the order of the stream.
    pub fn blocks(&self) -> &[Block] {
        self.ram.blocks()
    }

    /// The device sections, in the order of the stream.
    pub fn devices(&self) -> impl Iterator<Item = &Section> {
        self.analysis.sections.iter().filter(|section| section.kind == SectionKind::Full)
    }

    /// All that was found, but for the memory.
    pub fn analysis(&self) -> &Analysis {
        &self.analysis
    }

    /// The guest's memory, by block and offset.
    pub fn ram(&mut self) -> &mut GuestRam {
        &mut self.ram
    }

    /// Where the RAM blocks are in guest-physical memory.
    ///
    /// # Errors
    /// [`Error::Usage`] if that is not known: see [`PhysicalMemory::find`], which can be told.
    pub fn physical_memory(&mut self) -> Result<PhysicalMemory, Error> {
        let tables = Tables::read(&mut self.ram)?;
        PhysicalMemory::find(&self.machine(), &self.ram, &self.guest, &tables, &[])
    }

    /// Writes guest-physical memory and CPU registers to a new ELF core file, for gdb and crash, and returns its
    /// length.
    ///
    /// # Errors
    /// As [`physical_memory`](Self::physical_memory); [`Error::Usage`] if the guest's target has no cores here
    /// ([`PhysicalMemory::require_core`]) or something is called `path` already, [`Error::Bad`] of kind `io` if the
    /// file cannot be written.
    pub fn write_elf(&mut self, path: &Path) -> Result<u64, Error> {
        let physical = self.physical_memory()?;
        physical.require_core(&self.machine(), &self.ram, &self.guest)?;
        physical.write_elf(&mut self.ram, &self.guest, OutputFile::create(path, false)?)
    }

    /// Writes guest-physical memory and CPU registers to a new kdump-compressed file, for crash, and returns its
    /// length.
    ///
    /// # Errors
    /// As [`write_elf`](Self::write_elf); [`Error::Usage`] if the memory reaches up to an address that the format has
    /// no place for.
    pub fn write_kdump(&mut self, path: &Path, compression: PageCompression) -> Result<u64, Error> {
        let physical = self.physical_memory()?;
        physical.require_core(&self.machine(), &self.ram, &self.guest)?;
        let output = OutputFile::create(path, false)?;
        physical.write_kdump(&mut self.ram, &self.guest, compression, output, &mut |_| ())
    }

    /// Writes guest-physical memory to a new sparse file, in which the offset is the address, and returns its length.
    ///
    /// # Errors
    /// As [`write_elf`](Self::write_elf), of guests of any target.
    pub fn write_memory(&mut self, path: &Path) -> Result<u64, Error> {
        self.physical_memory()?.write_raw(&mut self.ram, OutputFile::create(path, false)?)
    }

    /// Writes all device sections, down to each field, to a new JSON file, and returns its length.
    ///
    /// # Errors
    /// [`Error::Usage`] if something is called `path` already, [`Error::Bad`] of kind `io` if the file cannot be
    /// written.
    pub fn write_devices(&mut self, path: &Path) -> Result<u64, Error> {
        let output = OutputFile::create(path, false)?;
        match &mut self.guest.devices {
            Some(devices) => write_devices(devices, &self.analysis, output),
            None => Err(Error::Usage(format!("{}: no device sections were kept", path.display()))),
        }
    }
}
