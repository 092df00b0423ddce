//! `qevm extract`: guest memory and device state as files.

use super::Output;
use crate::args;
use crate::failure::Stop;
use crate::progress::Progress;
use qevm_inspect::extract::{
    Devices, Guest, GuestObserver, PhysicalMemory, Tables, Wanted, write_block, write_devices,
};
use qevm_inspect::failure::{Failure, printable};
use qevm_inspect::open::Container;
use qevm_inspect::output_file::OutputFile;
use qevm_inspect::ram::{GuestRam, Keep};
use qevm_inspect::size::size;
use qevm_inspect::stream::{Analysis, Inputs, Settings, analyze};
use qevm_wire::Fault;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the stream is bad or a file cannot be written, [`Stop::Usage`] if a file exists that `--force` does
/// not replace, or the guest's memory map is not known.
pub fn run(extract: &args::Extract) -> Result<(), Stop> {
    let mut inputs = extract.input.open()?;
    let output =
        |path: &Option<PathBuf>| path.as_deref().map(|path| OutputFile::create(path, extract.force)).transpose();
    let named =
        [&extract.devices, &extract.memory, &extract.elf, &extract.kdump, &extract.xml].map(|path| path.as_deref());
    if let Some(twice) = (1..named.len()).find_map(|at| named[at].filter(|_| named[..at].contains(&named[at]))) {
        return Err(Stop::Usage(format!("{}: cannot be two of the files at once", twice.display())));
    }
    // That a file cannot be written must show before hours of reading.
    let devices_file = output(&extract.devices)?;
    let physical =
        Physical { memory: output(&extract.memory)?, elf: output(&extract.elf)?, kdump: output(&extract.kdump)? };
    let xml = output(&extract.xml)?.map(|output| domain_xml(&mut inputs).map(|xml| (output, xml))).transpose()?;
    let memory = extract.ram.is_some() || physical.is_wanted();
    let settings = Settings {
        keep: if memory { Keep::Contents } else { Keep::Nothing },
        reencode: false,
        // Device state is whole without the other channels' pages.
        complete: memory,
        strict: false,
        live: false,
        layouts: extract.layouts.open()?,
        spool: extract.bounds.spool(),
        max_ram: if memory { extract.bounds.max_ram } else { u64::MAX },
    };
    let devices = extract.devices.as_ref().map(|_| Devices::new(settings.spool.clone()));
    let mut bar = Progress::new("reading", inputs.main.source.total());
    let mut position = |at| bar.at(at);
    let mut observer = GuestObserver::new(&mut position, devices);
    if let Some((output, core)) = physical.first() {
        let (machine, blocks) = (extract.machine.as_deref(), &extract.memory_block[..]);
        observer = observer.copying(Wanted { output, core, machine, blocks });
    }
    // The domain XML is before the stream, which may be cut or damaged.
    let mut analysis = match memory || extract.devices.is_some() {
        true => analyze(&mut inputs, &settings, &mut observer),
        false => Analysis::default(),
    };
    let mut guest = observer.finish();
    drop(bar);
    let mut written = Written::default();
    let mut partial = false;
    if let Some(failure) = analysis.failure.take() {
        // A device section that is cut has no end that could be found, which is no different from a damaged one.
        let of_stream =
            [Fault::Truncated, Fault::Malformed, Fault::Mismatch].iter().any(|fault| fault.as_str() == failure.kind);
        if !extract.partial || !of_stream {
            return Err(failure.into());
        }
        partial = true;
        written.notes.push(format!("partial: only what came before this fault: {failure}"));
    }
    let machine = extract.machine.clone().or_else(|| analysis.machine()).unwrap_or_default();
    let mut out = Output::new();
    let complete = (|| {
        if let Some((output, xml)) = xml {
            let path = output.path().to_owned();
            let failed = |error: std::io::Error| Failure::io(&path.display().to_string(), 0, &error);
            let mut file = output.file();
            file.write_all(&xml).map_err(failed)?;
            output.publish().map_err(failed)?;
            written.file(&path, xml.len() as u64, "domain XML");
        }
        if let (Some(output), Some(devices)) = (devices_file, &mut guest.devices) {
            let path = output.path().to_owned();
            let len = write_devices(devices, &analysis, output)?;
            written.file(&path, len, &format!("{} device sections", devices.count()));
            written.notes.append(&mut analysis.notes);
        }
        if memory {
            let Some(ram) = &mut analysis.ram else {
                return Err(Stop::Usage(format!("{}: has no RAM to extract", inputs.main.name)));
            };
            if let Some(folder) = &extract.ram {
                write_blocks(ram, folder, extract.force, &mut written)?;
            }
            if physical.is_wanted() {
                physical.write(extract, &machine, ram, &guest, &mut written)?;
            }
        }
        Ok(())
    })();
    if let Err(stop) = complete {
        written.remove();
        return Err(stop);
    }
    match extract.output.json {
        true => {
            let mut object = Map::new();
            object.insert("machine".into(), Value::String(machine));
            object.insert("files".into(), written.files.into());
            object.insert("partial".into(), partial.into());
            object.insert("notes".into(), written.notes.into());
            out.json(&object)?;
        }
        false => {
            for line in written.lines.iter().chain(&written.notes) {
                out.line(line)?;
            }
        }
    }
    out.finish()
}

/// The domain XML of the save image that the stream is in.
fn domain_xml(inputs: &mut Inputs) -> Result<Vec<u8>, Stop> {
    let xml = inputs.containers.iter_mut().find_map(|container| match container {
        Container::SaveImage { xml, .. } => Some(std::mem::take(xml)),
        _ => None,
    });
    xml.ok_or_else(|| {
        Stop::Usage(format!("{}: is no libvirt save image, which alone has a domain XML (--xml)", inputs.main.name))
    })
}

#[derive(Default)]
struct Written {
    paths: Vec<PathBuf>,
    /// A directory that was not there.
    folder: Option<PathBuf>,
    files: Vec<Value>,
    lines: Vec<String>,
    notes: Vec<String>,
}

impl Written {
    fn file(&mut self, path: &Path, len: u64, what: &str) {
        self.paths.push(path.to_owned());
        let path = path.display().to_string();
        self.lines.push(format!("{path}: {what}, {}", size(len)));
        self.files.push(json!({"path": path, "len": len, "content": what}));
    }

    /// Takes back what was written, because the rest cannot be: whole files that are half of what was asked for.
    fn remove(&self) {
        // What cannot be removed does not make the reason to do so less important.
        self.paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
        self.folder.iter().for_each(|folder| drop(std::fs::remove_dir(folder)));
    }
}

/// One file for each RAM block. Files are numbered: a name from a stream is never part of a path.
fn write_blocks(ram: &mut GuestRam, folder: &Path, replace: bool, written: &mut Written) -> Result<(), Stop> {
    written.folder = (!folder.exists()).then(|| folder.to_owned());
    std::fs::create_dir_all(folder)
        .map_err(|error| Stop::Usage(format!("{}: cannot be created: {error}", folder.display())))?;
    for block in 0..ram.blocks().len() {
        let path = folder.join(format!("block-{block}.raw"));
        let len = write_block(ram, block, OutputFile::create(&path, replace)?)?;
        written.file(&path, len, &format!("RAM block '{}'", ram.blocks()[block].name));
    }
    Ok(())
}

/// Files of guest-physical memory.
struct Physical {
    memory: Option<OutputFile>,
    elf: Option<OutputFile>,
    kdump: Option<OutputFile>,
}

impl Physical {
    fn is_wanted(&self) -> bool {
        self.memory.is_some() || self.elf.is_some() || self.kdump.is_some()
    }

    /// The first file that is no dump, and whether it is a core.
    fn first(&self) -> Option<(&OutputFile, bool)> {
        let raw = self.memory.as_ref().map(|output| (output, false));
        raw.or_else(|| self.elf.as_ref().map(|output| (output, true)))
    }

    fn write(
        self,
        extract: &args::Extract,
        machine: &str,
        ram: &mut GuestRam,
        guest: &Guest,
        written: &mut Written,
    ) -> Result<(), Stop> {
        let tables = Tables::read(ram)?;
        let physical = PhysicalMemory::find(machine, ram, guest, &tables, &extract.memory_block)?;
        if let Some(line) = physical.left_out.first().filter(|_| extract.strict) {
            return Err(Stop::Usage(format!("--strict: {line}")));
        }
        let with_registers = self.elf.is_some() || self.kdump.is_some();
        if with_registers {
            physical.require_core(machine, ram, guest)?;
        }
        if let Some(output) = self.memory {
            let path = output.path().to_owned();
            let len = physical.write_raw(ram, output)?;
            written.file(&path, len, "guest-physical memory");
        }
        if let Some(output) = self.elf {
            let path = output.path().to_owned();
            let len = physical.write_elf(ram, guest, output)?;
            written.file(&path, len, &format!("ELF core with {} CPUs", guest.cpu_count()));
        }
        if let Some(output) = self.kdump {
            let path = output.path().to_owned();
            let mut bar = Progress::new("compressing", Some(physical.segments.iter().map(|segment| segment.len).sum()));
            let compression = extract.kdump_compression.into();
            let len = physical.write_kdump(ram, guest, compression, output, &mut |done| bar.at(done))?;
            written.file(&path, len, &format!("kdump-compressed dump with {} CPUs", guest.cpu_count()));
        }
        if with_registers {
            if guest.cpu_count() == 0 {
                written.notes.push("no CPU registers: the stream has no readable 'cpu' section".into());
            }
            written.notes.extend(guest.left_out());
            written.notes.extend(physical.vmcoreinfo(ram, guest)?.unread);
        }
        let other_target = physical.is_other_target(machine, ram);
        let source = match guest.cmos {
            _ if !extract.memory_block.is_empty() => "--memory-block",
            Some(_) if !other_target => "the guest's CMOS",
            _ => "the rules of the machine type",
        };
        for segment in &physical.segments {
            let (start, end) = (segment.address, segment.address + segment.len);
            let by = match physical.devices.contains(&segment.block) {
                true => format!("memory device '{}'", printable(&ram.blocks()[segment.block].name)),
                false => format!("according to {source}"),
            };
            written.notes.push(format!("memory at {start:#x} to {end:#x} ({by})"));
        }
        written.notes.extend(physical.notes);
        written.notes.extend(physical.left_out);
        // Sections of another target are tried as x86's, too.
        let unread = guest.unread.iter().filter(|_| !other_target).chain(&guest.other_unread);
        written.notes.extend(unread.map(|unread| format!("not read: {unread}")));
        Ok(())
    }
}
