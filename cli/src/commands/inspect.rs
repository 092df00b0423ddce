//! `qevm inspect`: what is in a stream.

mod fields;

use super::Output;
use crate::args;
use crate::failure::Stop;
use crate::progress::Progress;
use crate::table::{Table, count};
use fields::{Choice, Gather};
use qevm_inspect::aside::Aside;
use qevm_inspect::failure::Failure;
use qevm_inspect::open::Container;
use qevm_inspect::ram::Keep;
use qevm_inspect::report::{Members, Report};
use qevm_inspect::size::size;
use qevm_inspect::stream::{Analysis, Settings, analyze};
use qevm_multifd::Uuid;
use qevm_savevm::configuration::ConfigurationSubsection;
use serde::{Serialize, Serializer};
use serde_json::Value;

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the stream is bad, [`Stop::Usage`] if a file cannot be opened.
pub fn run(inspect: &args::Inspect) -> Result<(), Stop> {
    let mut inputs = super::open(&inspect.input, inspect.output, |report, out| {
        out.json(&Inspected::new(&Analysis::default(), &[], report))
    })?;
    // Who asks for certain fields wants to see these alone.
    let only_fields = !inspect.output.json && (!inspect.section.is_empty() || inspect.field.is_some());
    let keep = match (inspect.no_digest || only_fields, inspect.ram_digest) {
        (true, _) => Keep::Nothing,
        (false, args::RamDigest::Crc32) => Keep::Digests,
        (false, args::RamDigest::Sha256) => Keep::Image,
    };
    let settings = Settings {
        keep,
        reencode: false,
        complete: false,
        strict: false,
        live: false,
        layouts: inspect.layouts.open()?,
        spool: inspect.bounds.spool(),
        max_ram: if keep == Keep::Image { inspect.bounds.max_ram } else { u64::MAX },
    };
    let choice = match inspect.fields || !inspect.section.is_empty() || inspect.field.is_some() {
        true => Choice::Named(inspect.section.clone()),
        false => Choice::None,
    };
    let progress = Progress::new("reading", inputs.main.source.total());
    let (filter, aside) = (inspect.field.clone(), Aside::new(settings.spool.clone()));
    let mut gather = Gather { choice, filter, json: inspect.output.json, aside, failed: None, progress };
    let mut analysis = analyze(&mut inputs, &settings, &mut gather);
    let mut report = analysis.report(inspect.ram_digest.into());
    gather.progress = Progress::hidden();
    if let Some(error) = gather.failed.take() {
        report.error.get_or_insert_with(|| Failure::io("temporary file", 0, &error));
    }
    let mut out = Output::new();
    match inspect.output.json {
        true if matches!(gather.choice, Choice::Named(_)) => {
            out.json_with_list(&Inspected::new(&analysis, &inputs.containers, &report), "fields", |out| {
                gather.copy(out)
            })?;
        }
        true => out.json(&Inspected::new(&analysis, &inputs.containers, &report))?,
        false if only_fields && gather.aside.is_empty() => {
            out.line("no such field in the sections that the stream describes")?;
        }
        false => {
            if !only_fields {
                for container in &inputs.containers {
                    out.line(format!("{:<14}{}", "container", container.describe()))?;
                }
                print(&mut out, &analysis, &report, inspect.records)?;
            }
            out.copy(|out| gather.copy(out))?;
        }
    }
    out.finish()?;
    report.error.map_or(Ok(()), |failure| Err(Stop::Bad(failure)))
}

/// The object of `verify`, without what `inspect` did not do, and with what only `inspect` tells.
#[derive(Serialize)]
struct Inspected<'a> {
    #[serde(flatten)]
    report: Members<'a>,
    containers: Vec<Value>,
    machine: Option<String>,
    capabilities: Vec<String>,
    page_size: u64,
    footers: Option<bool>,
    #[serde(serialize_with = "commands")]
    commands: &'a [(u64, String)],
    description: Option<Description>,
    notes: &'a [String],
}

#[derive(Serialize)]
struct Description {
    offset: u64,
    size: usize,
}

impl<'a> Inspected<'a> {
    fn new(analysis: &'a Analysis, containers: &[Container], report: &'a Report) -> Self {
        Inspected {
            report: report.members(false),
            containers: containers.iter().map(Container::json).collect(),
            machine: analysis.machine(),
            capabilities: capabilities(analysis),
            page_size: analysis.page_size,
            footers: analysis.footers,
            commands: &analysis.commands,
            description: analysis
                .description
                .as_ref()
                .map(|(offset, text)| Description { offset: *offset, size: text.len() }),
            notes: &analysis.notes,
        }
    }
}

fn commands<S: Serializer>(commands: &&[(u64, String)], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Command<'a> {
        offset: u64,
        command: &'a str,
    }
    serializer.collect_seq(commands.iter().map(|(offset, command)| Command { offset: *offset, command }))
}

/// Everything, for people.
pub(super) fn print(out: &mut Output, analysis: &Analysis, report: &Report, records: bool) -> Result<(), Stop> {
    heading(out, analysis, report)?;
    if !report.ram.is_empty() {
        out.line("\nRAM blocks")?;
        out.print(ram_table(report))?;
        out.line(page_line(analysis))?;
    }
    for line in analysis.channels.iter().chain(&analysis.return_path) {
        out.line(line)?;
    }
    if !analysis.sections.is_empty() {
        out.line("\nSections")?;
        out.print(if records { record_table(analysis) } else { section_table(analysis) })?;
    }
    if !analysis.commands.is_empty() {
        out.line("\nCommands")?;
        let mut table = Table::new(&[">offset", "command"]);
        analysis.commands.iter().for_each(|(offset, text)| table.row([offset.to_string(), text.clone()]));
        out.print(table)?;
    }
    analysis.notes.iter().try_for_each(|note| out.line(note))?;
    Ok(())
}

fn heading(out: &mut Output, analysis: &Analysis, report: &Report) -> Result<(), Stop> {
    let mut line = |label: &str, text: String| out.line(format!("{label:<14}{text}"));
    if !analysis.header {
        return Ok(());
    }
    line("stream", format!("version 3, {} ({} bytes)", size(report.bytes), count(report.bytes)))?;
    line("machine", analysis.machine().unwrap_or_else(|| "no configuration section".into()))?;
    let capabilities = capabilities(analysis);
    if !capabilities.is_empty() {
        line("capabilities", capabilities.join(", "))?;
    }
    let uuid = analysis.configuration.iter().flat_map(|c| &c.subsections).find_map(|s| match s {
        ConfigurationSubsection::Uuid(uuid) => Some(Uuid(*uuid).to_string()),
        _ => None,
    });
    if let Some(uuid) = uuid {
        line("uuid", uuid)?;
    }
    if analysis.footers == Some(false) {
        line("footers", "none".into())?;
    }
    line("written by", report.qemu_profile.clone())?;
    let description = match &analysis.description {
        Some((offset, text)) => format!("{} of JSON at {offset}", size(text.len() as u64)),
        None => "none".into(),
    };
    line("description", description)
}

fn capabilities(analysis: &Analysis) -> Vec<String> {
    let subsections = analysis.configuration.iter().flat_map(|configuration| &configuration.subsections);
    subsections
        .filter_map(|subsection| match subsection {
            ConfigurationSubsection::Capabilities(names) => Some(names.iter().map(ToString::to_string)),
            _ => None,
        })
        .flatten()
        .collect()
}

/// One line for each RAM block.
pub(super) fn ram_table(report: &Report) -> Table {
    let digest = report.ram.iter().find_map(|block| block.digest.as_ref()).map(|(kind, _)| *kind);
    let mut columns = vec!["block", ">length", ">bytes", ">pages", ">zero"];
    columns.extend(digest);
    let mut table = Table::new(&columns);
    for block in &report.ram {
        let value = block.digest.as_ref().map_or(String::new(), |(_, value)| value.clone());
        let (length, bytes) = (size(block.used_length), block.used_length.to_string());
        table.row([block.name.clone(), length, bytes, block.pages.to_string(), block.zero_pages.to_string(), value]);
    }
    table
}

fn page_line(analysis: &Analysis) -> String {
    let pages = &analysis.main_pages;
    let kinds = [
        (pages.page, "pages"),
        (pages.zero, "zero pages"),
        (pages.xbzrle, "XBZRLE pages"),
        (pages.compressed, "compressed pages"),
        (pages.mapped, "mapped-ram pages"),
    ];
    let kinds: Vec<String> =
        kinds.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{} {what}", count(*n))).collect();
    match kinds.is_empty() {
        true => "  main channel: no pages".into(),
        false => format!("  main channel: {}", kinds.join(", ")),
    }
}

fn section_table(analysis: &Analysis) -> Table {
    let mut table = Table::new(&[">offset", ">size", "type", ">id", "name", ">instance", ">version", ">records"]);
    for section in &analysis.sections {
        table.row([
            section.offset.to_string(),
            section.size.to_string(),
            section.kind.as_str().to_owned(),
            section.header.section_id.to_string(),
            section.header.idstr.to_string(),
            section.header.instance_id.to_string(),
            section.header.version_id.to_string(),
            section.records.to_string(),
        ]);
    }
    table
}

fn record_table(analysis: &Analysis) -> Table {
    let mut table = Table::new(&[">offset", ">size", "type", ">id", "name", ">instance"]);
    for record in &analysis.records {
        let header = &analysis.sections[record.section].header;
        table.row([
            record.offset.to_string(),
            record.size.to_string(),
            record.kind.as_str().to_owned(),
            header.section_id.to_string(),
            header.idstr.to_string(),
            header.instance_id.to_string(),
        ]);
    }
    table
}
