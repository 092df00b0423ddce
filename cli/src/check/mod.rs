//! Whether a destination will load a stream: what is known of both sides, and what QEMU says about a difference.

mod pci;

use crate::args;
use crate::bounds::Bounds;
use crate::failure::{Failure, Stop};
use crate::open::is_disk_image;
use crate::progress::Progress;
use crate::ram::Keep;
use crate::stream::layouts::Layouts;
use crate::stream::writer::guess;
use crate::stream::{Inputs, Observer, Settings, analyze};
use qevm_savevm::Event;
use qevm_savevm::check::{Expectations, Finding, Outcome, Subject, Summary};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::RamBlock;
use qevm_savevm::vmdesc::{Description, Node, Schema};
use qevm_wire::{Limits, QemuVersion};
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
    /// A line to look for in the destination's log, in QEMU 7.2's words; newer releases put the same into one line with what
    /// it is inside of.
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

/// Reads what decides whether a stream loads. Page contents are jumped over.
///
/// # Errors
/// [`Stop::Usage`] if a file cannot be opened, [`Stop::Bad`] if the stream is bad, truncated included.
pub fn summarize(input: &args::Input, bounds: &Bounds) -> Result<Stream, Stop> {
    let mut inputs = Inputs::open(input)?;
    let progress = Progress::new("reading", inputs.main.source.total());
    let mut gather = Gather { stream: Stream::default(), progress };
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
    let mut analysis = analyze(&mut inputs, &settings, &mut gather);
    if let Some(failure) = analysis.failure.take() {
        return Err(failure.into());
    }
    let mut stream = gather.stream;
    if let Some((offset, text)) = &analysis.description {
        let description = Description::parse_at(text, *offset, &Limits::default());
        stream.summary.description = Some(description.map_err(|error| Failure::located(&inputs.main.name, error))?);
    }
    stream.qemu = guess(&analysis);
    Ok(stream)
}

struct Gather {
    stream: Stream,
    progress: Progress,
}

impl Observer for Gather {
    fn position(&mut self, offset: u64) {
        self.progress.at(offset);
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

/// What the command line tells of the destination of `stream`.
///
/// # Errors
/// [`Stop::Usage`] if a file cannot be read, or is neither a whole stream nor a schema.
pub fn destination(check: &args::Check, stream: &Stream) -> Result<Destination, Stop> {
    let Destination { mut known, mut spaces } = Destination::default();
    let snapshot = check.against_snapshot.as_deref().or(check.input.snapshot.as_deref());
    for path in &check.against {
        let Destination { known: file, spaces: more } = against(path, snapshot, &check.bounds)?;
        more.into_iter().for_each(|(key, space)| {
            spaces.entry(key).or_insert(space);
        });
        // Of two files that tell of the same thing, the first one is believed.
        known.qemu = known.qemu.or(file.qemu);
        known.machine = known.machine.or(file.machine);
        known.page_size = known.page_size.or(file.page_size);
        known.uuid = known.uuid.or(file.uuid);
        known.ram = known.ram.or(file.ram);
        known.sections = known.sections.or(file.sections);
        known.footers = known.footers.or(file.footers);
        known.description = known.description.or(file.description);
        known.schema = known.schema.or(file.schema);
        if known.values.is_empty() {
            known.values = file.values;
        }
        for (name, on) in file.capabilities {
            known.capabilities.entry(name).or_insert(on);
        }
    }
    known.qemu = check.qemu.or(known.qemu);
    known.machine = check.machine.as_ref().map(|name| name.clone().into_bytes()).or(known.machine);
    known.page_size = check.page_size.or(known.page_size);
    known.uuid = check.uuid.map(|uuid| uuid.0).or(known.uuid);
    known.capabilities.extend(check.capability.iter().map(|(capability, on)| (capability.name().to_owned(), *on)));
    if !check.ram_block.is_empty() {
        // What is not named is as the stream has it, so that it gives no finding.
        let mut ram = known.ram.take().unwrap_or_else(|| stream.summary.ram.clone());
        for (name, size) in &check.ram_block {
            match ram.iter_mut().find(|block| block.name == *name) {
                Some(block) => block.used_length = *size,
                None => ram.push(RamBlock::new(name.clone(), *size)),
            }
        }
        known.ram = Some(ram);
    }
    Ok(Destination { known, spaces })
}

/// What one file tells of the destination.
fn against(path: &Path, snapshot: Option<&str>, bounds: &Bounds) -> Result<Destination, Stop> {
    if let Some(schema) = schema(path)? {
        let machine = schema.machine.as_ref().map(|name| name.clone().into_bytes());
        let known = Expectations { machine, schema: Some(schema), ..Expectations::default() };
        return Ok(Destination { known, ..Destination::default() });
    }
    let snapshot = snapshot.filter(|_| is_disk_image(path));
    let input = args::Input::snapshot_of(path, snapshot);
    let Stream { summary, spaces, qemu } = summarize(&input, bounds).map_err(|stop| match stop {
        Stop::Bad(failure) => Stop::Usage(format!("--against {failure}")),
        Stop::Usage(message) => Stop::Usage(message.replace("--snapshot:", "--against-snapshot:")),
        other => other,
    })?;
    Ok(Destination { known: Expectations { qemu, ..summary.into() }, spaces })
}

/// The schema, if the file starts like the output of `-dump-vmstate`; pipes are streams.
fn schema(path: &Path) -> Result<Option<Schema>, Stop> {
    let cannot = |error: io::Error| Stop::Usage(format!("{}: cannot be opened: {error}", path.display()));
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
            Err(Stop::Usage(format!("--against {failure}")))
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
