//! Whether a destination will load a stream: what is known of both sides, and what QEMU says about a difference.

mod pci;

use crate::bounds::Bounds;
use crate::failure::{Error, Failure};
use crate::open::is_disk_image;
use crate::ram::Keep;
use crate::stream::{Input, Inputs, Layouts, Observer, Settings, analyze, release_guess};
use qevm_savevm::Event;
use qevm_savevm::check::{Expectations, Finding, Outcome, Subject, Summary};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::RamBlock;
use qevm_savevm::vmdesc::{Description, Node, Schema};
use qevm_savevm::vmstate::{self, Context};
use qevm_wire::{Capability, CountedString, Limits, QemuVersion};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// What of a stream decides whether it loads.
#[derive(Debug, Default)]
pub struct Stream {
    summary: Summary,
    spaces: pci::Spaces,
    /// The release that most likely wrote it.
    qemu: Option<QemuVersion>,
}

/// What is known of a destination.
#[derive(Debug, Default)]
pub struct Destination {
    known: Expectations,
    spaces: pci::Spaces,
}

/// A difference, and what a destination prints when it meets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The difference.
    pub finding: Finding,
    /// A line to look for in the destination's log, in QEMU 7.2's words; newer releases put the same into one line with
    /// what it is inside of.
    pub qemu_says: Option<String>,
}

/// Compares a stream with what is known of its destination.
pub fn judge(stream: &Stream, destination: &Destination) -> Vec<Judged> {
    let findings = qevm_savevm::check::check(&stream.summary, &destination.known);
    let mut judged: Vec<Judged> =
        findings.into_iter().map(|finding| Judged { qemu_says: qemu_says(&finding), finding }).collect();
    let spaces = pci::compare(&stream.spaces, &destination.spaces);
    judged.extend(spaces.into_iter().map(|(finding, says)| Judged { finding, qemu_says: Some(says) }));
    judged
}

/// Reads what decides whether a stream loads, and tells `position` how far the main channel was read. Page contents are
/// jumped over.
///
/// # Errors
/// [`Error::Bad`] if the stream is bad, truncated included.
pub fn summarize(inputs: &mut Inputs, bounds: &Bounds, position: &mut dyn FnMut(u64)) -> Result<Stream, Error> {
    let mut gather = Gather { stream: Stream::default(), position };
    let layouts = Layouts::default();
    let (spool, max_ram) = (bounds.spool(), u64::MAX);
    let settings = Settings {
        keep: Keep::Nothing,
        reencode: false,
        complete: false,
        strict: false,
        live: false,
        layouts,
        spool,
        max_ram,
    };
    let mut analysis = analyze(inputs, &settings, &mut gather);
    if let Some(failure) = analysis.failure.take() {
        return Err(failure.into());
    }
    let mut stream = gather.stream;
    if let Some((offset, text)) = &analysis.description {
        let description = Description::parse_at(text, *offset, &Limits::default());
        stream.summary.description = Some(description.map_err(|error| Failure::located(&inputs.main.name, error))?);
    }
    stream.qemu = release_guess::guess(&analysis);
    Ok(stream)
}

struct Gather<'p> {
    stream: Stream,
    position: &'p mut dyn FnMut(u64),
}

impl Observer for Gather<'_> {
    fn position(&mut self, offset: u64) {
        (self.position)(offset);
    }

    fn restarted(&mut self) {
        self.stream = Stream::default();
    }

    fn event(&mut self, event: &Event<'_>) {
        self.stream.summary.event(event);
    }

    fn fields(&mut self, header: &SectionHeader, fields: &Node) {
        pci::note(header, fields, &mut self.stream.spaces);
        self.stream.summary.values.note(header, fields);
    }
}

/// A file that tells of a destination: a stream that was saved there, or a schema.
#[derive(Debug)]
pub struct Against(Kind);

#[derive(Debug)]
enum Kind {
    Schema(Box<Schema>),
    Stream(Box<Inputs>),
}

impl Against {
    /// Opens the file: a schema if it starts like the output of `-dump-vmstate`, a stream otherwise. `snapshot`: which
    /// one, if it is a qcow2 image.
    ///
    /// # Errors
    /// [`Error::Usage`] if the file cannot be read, or is neither.
    pub fn open(path: &Path, snapshot: Option<&str>) -> Result<Self, Error> {
        if let Some(schema) = schema(path)? {
            return Ok(Against(Kind::Schema(Box::new(schema))));
        }
        let snapshot = snapshot.filter(|_| is_disk_image(path));
        let inputs = Inputs::open(&Input::snapshot_of(path, snapshot)).map_err(of_against)?;
        Ok(Against(Kind::Stream(Box::new(inputs))))
    }

    /// Bytes to read, as far as that is known.
    pub fn total(&self) -> Option<u64> {
        match &self.0 {
            Kind::Schema(_) => None,
            Kind::Stream(inputs) => inputs.main.source.total(),
        }
    }

    /// Reads what it tells, and tells `position` how far it was read.
    ///
    /// # Errors
    /// [`Error::Usage`] if it is no whole stream.
    pub fn read(self, bounds: &Bounds, position: &mut dyn FnMut(u64)) -> Result<Destination, Error> {
        match self.0 {
            Kind::Schema(schema) => {
                let machine = schema.machine.as_ref().map(|name| name.clone().into_bytes());
                let known = Expectations { machine, schema: Some(*schema), ..Expectations::default() };
                Ok(Destination { known, ..Destination::default() })
            }
            Kind::Stream(mut inputs) => {
                let Stream { summary, spaces, qemu } = summarize(&mut inputs, bounds, position).map_err(of_against)?;
                let mut known = Expectations { qemu, ..summary.into() };
                known.models = models(&known);
                Ok(Destination { known, spaces })
            }
        }
    }
}

/// The fault is that of a file that only tells of the destination.
fn of_against(error: Error) -> Error {
    match error {
        Error::Bad(failure) => Error::Usage(format!("--against {failure}")),
        Error::Usage(message) => Error::Usage(message.replace("--snapshot:", "--against-snapshot:")),
    }
}

/// What the caller knows of a destination, which counts for more than what files tell of it.
#[derive(Debug, Clone, Default)]
pub struct Stated {
    /// Its release.
    pub qemu: Option<QemuVersion>,
    /// Its machine type.
    pub machine: Option<String>,
    /// Size of its target pages in bytes.
    pub page_size: Option<u64>,
    /// UUID of its guest, in the order of its text.
    pub uuid: Option<[u8; 16]>,
    /// Migration capabilities that are on or off there.
    pub capabilities: Vec<(Capability, bool)>,
    /// Lengths of RAM blocks in bytes; others are taken to be as the stream has them.
    pub ram_blocks: Vec<(CountedString, u64)>,
}

impl Destination {
    /// Adds what a further file tells. Of two that tell of the same thing, the first one is believed.
    pub fn add(&mut self, Destination { known: file, spaces }: Destination) {
        let known = &mut self.known;
        spaces.into_iter().for_each(|(key, space)| {
            self.spaces.entry(key).or_insert(space);
        });
        known.qemu = known.qemu.or(file.qemu);
        known.machine = known.machine.take().or(file.machine);
        known.page_size = known.page_size.or(file.page_size);
        known.uuid = known.uuid.or(file.uuid);
        known.ram = known.ram.take().or(file.ram);
        known.sections = known.sections.take().or(file.sections);
        known.footers = known.footers.or(file.footers);
        known.description = known.description.take().or(file.description);
        known.schema = known.schema.take().or(file.schema);
        if known.values.is_empty() {
            known.values = file.values;
        }
        for (name, on) in file.capabilities {
            known.capabilities.entry(name).or_insert(on);
        }
        known.models = models(known);
    }

    /// Sets what the caller knows of the destination of `stream`.
    pub fn state(&mut self, stated: &Stated, stream: &Stream) {
        let known = &mut self.known;
        known.qemu = stated.qemu.or(known.qemu);
        known.machine = stated.machine.as_ref().map(|name| name.clone().into_bytes()).or(known.machine.take());
        known.page_size = stated.page_size.or(known.page_size);
        known.uuid = stated.uuid.or(known.uuid);
        known
            .capabilities
            .extend(stated.capabilities.iter().map(|(capability, on)| (capability.name().to_owned(), *on)));
        if !stated.ram_blocks.is_empty() {
            // What is not named is as the stream has it, so that it gives no finding.
            let mut ram = known.ram.take().unwrap_or_else(|| stream.summary.ram.clone());
            for (name, size) in &stated.ram_blocks {
                match ram.iter_mut().find(|block| block.name == *name) {
                    Some(block) => block.used_length = *size,
                    None => ram.push(RamBlock::new(name.clone(), *size)),
                }
            }
            known.ram = Some(ram);
        }
        known.models = models(known);
    }
}

/// What is declared of the device models of its release.
fn models(known: &Expectations) -> Vec<vmstate::Description> {
    let machine = known.machine.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
    known.qemu.map(|qemu| qevm_devices::descriptions(&Context::new(qemu, &machine))).unwrap_or_default()
}

/// The schema, if the file starts like the output of `-dump-vmstate`; pipes are streams.
fn schema(path: &Path) -> Result<Option<Schema>, Error> {
    let cannot = |error: io::Error| Error::Usage(format!("{}: cannot be opened: {error}", path.display()));
    if path.as_os_str() == "-" {
        return Ok(None);
    }
    let mut file = File::open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Ok(None);
    }
    let mut start = Vec::new();
    file.by_ref().take(16).read_to_end(&mut start).map_err(cannot)?;
    if start.trim_ascii_start().first() != Some(&b'{') {
        return Ok(None);
    }
    let limits = Limits::default();
    file.take(limits.schema).read_to_end(&mut start).map_err(cannot)?;
    match Schema::parse(&start, &limits) {
        Ok(schema) => Ok(Some(schema)),
        Err(error) => {
            let failure = Failure::located(&path.display().to_string(), error);
            Err(Error::Usage(format!("--against {failure}")))
        }
    }
}

/// What of a destination is known, and therefore was compared.
pub fn compared(Destination { known, .. }: &Destination) -> Vec<&'static str> {
    let Expectations { qemu, machine, page_size, uuid, ram, sections, description, schema, capabilities, .. } = known;
    let all = [
        (qemu.is_some(), "release"),
        (machine.is_some(), "machine type"),
        (page_size.is_some(), "target page size"),
        (uuid.is_some(), "UUID"),
        (!capabilities.is_empty(), "capabilities"),
        (ram.is_some(), "RAM blocks"),
        (sections.is_some(), "sections"),
        (description.is_some(), "fields"),
        (schema.is_some(), "device models"),
    ];
    all.into_iter().filter(|(known, _)| *known).map(|(_, what)| what).collect()
}

fn qemu_says(finding: &Finding) -> Option<String> {
    if finding.outcome != Outcome::Fails {
        return None;
    }
    let Finding { found, expected, .. } = finding;
    let unhex = |text: &str| text.strip_suffix(" bytes").map(str::to_owned);
    Some(match &finding.subject {
        Subject::MachineType => format!("Machine type received is '{found}' and local is '{expected}'"),
        Subject::Capability(name @ ("x-ignore-shared" | "mapped-ram")) => {
            format!("Capability {name} is {expected}, but received capability is {found}")
        }
        Subject::Capability("postcopy-ram") => "RAM postcopy is disabled but have 16 byte advise".into(),
        Subject::Section { idstr, instance_id } if expected == "no such section" => {
            format!("Unknown savevm section or instance '{idstr}' {instance_id}")
        }
        Subject::RamBlock(name) if expected == "no such block" => {
            format!("Unknown ramblock \"{name}\", cannot accept migration")
        }
        Subject::RamBlock(name) => {
            let (found, expected) = (unhex(found)?, unhex(expected)?);
            format!("Size mismatch: {name}: {found} != {expected}: Invalid argument")
        }
        Subject::Uuid => format!("UUID received is {found} and local is {expected}"),
        Subject::Fields { idstr, path, .. } => fields_say(idstr, path, found, expected)?,
        Subject::Footers if found == "none" => "Missing section footer for ram".into(),
        Subject::Footers => "Unknown section type 126".into(),
        Subject::Command("SWITCHOVER_START") => "MIG_CMD 0xb unknown (len 0x0)".into(),
        _ => return None,
    })
}

/// Of the fields of a section; where QEMU gives no reason of its own, what it says of the section.
fn fields_say(idstr: &str, path: &str, found: &str, expected: &str) -> Option<String> {
    let device = idstr.rsplit('/').next().unwrap_or(idstr);
    let hex = |text: &str| text.trim_start_matches("exactly ").parse::<u64>().ok().map(|number| format!("{number:#x}"));
    if let Some(index) = path.strip_suffix("].num").and_then(|path| Some(path.rsplit_once("vq[")?.1)) {
        let (len, most) = (found.strip_suffix(" entries")?, expected.strip_prefix("at most ")?);
        return Some(format!("VQ {index} vring.num {len} exceeds allocated max {most}"));
    }
    let name = path.rsplit('.').next().unwrap_or(path);
    Some(match (device, name) {
        ("hpet", "num_timers_save") => "hpet/num_timers must match".into(),
        ("e1000e", "subsys" | "subsys_ven") => {
            "Cannot migrate while device properties (subsys/subsys_ven) differ".into()
        }
        ("virtio-gpu", "max_outputs") => format!("{} != {found}", expected.strip_prefix("exactly ")?),
        ("virtio-mem" | "virtio-mem-device-early", name) => {
            let property = match name {
                "addr" => "memaddr",
                "block_size" => "block-size",
                "region_size" => "memdev",
                other => other,
            };
            format!("Property '{property}' changed from {} to {}", hex(found)?, hex(expected)?)
        }
        ("virtio-console", _) => format!("error while loading state for instance 0x0 of device '{idstr}'"),
        (_, "ich9_pm/tco") => "Assertion `first_elem || !n_elems || !size' failed".into(),
        // Numbers that must be equal are refused where they are; other fields shift all that comes after them.
        _ if expected.starts_with("exactly ") || expected.starts_with("0 to ") => return None,
        _ => format!("Missing section footer for {idstr}"),
    })
}
