//! `qevm check`: whether a destination will load a stream.

use super::Output;
use crate::args;
use crate::failure::Stop;
use crate::live;
use crate::progress::Progress;
use crate::table::Table;
use qevm_inspect::check::{Against, Destination, Judged, Stated, Stream, compared, judge, summarize};
use qevm_inspect::failure::{Failure, printable};
use qevm_inspect::report::error_json;
use qevm_savevm::check::{Outcome, Subject};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

/// Runs the command.
///
/// # Errors
/// [`Stop::Found`] if the stream will not load, [`Stop::Undecided`] if that cannot be told, [`Stop::Bad`] if it is bad,
/// [`Stop::Usage`] if a file cannot be opened or what is said to tell of the destination does not.
pub fn run(check: &args::Check) -> Result<(), Stop> {
    if let Some(socket) = live::socket(&check.input.main) {
        return live::run(check, socket);
    }
    if let Some(running) = check.against.iter().find(|path| live::socket(path).is_some()) {
        let running = running.display();
        return Err(Stop::Usage(format!(
            "--against {running}: a running QEMU is compared with a running one (qmp:SOCKET); what a stream is compared with is a stream \
             that the destination writes: `migrate exec:cat>FILE` there"
        )));
    }
    let compared = stream(check).and_then(|stream| {
        let destination = destination(check, &stream)?;
        Ok((judge(&stream, &destination), destination))
    });
    let mut out = Output::new();
    let (findings, destination) = match compared {
        Ok(compared) => compared,
        Err(Stop::Bad(failure)) if check.output.json => {
            out.json(&object(&[], &Destination::default(), Some(&failure)))?;
            out.finish()?;
            return Err(Stop::Bad(failure));
        }
        Err(stop) => return Err(stop),
    };
    match check.output.json {
        true => out.json(&object(&findings, &destination, None))?,
        false => print(&mut out, &findings, &destination)?,
    }
    out.finish()?;
    match worst(&findings) {
        Outcome::Loads => Ok(()),
        Outcome::MayFail => Err(Stop::Undecided),
        Outcome::Fails => Err(Stop::Found),
    }
}

fn stream(check: &args::Check) -> Result<Stream, Stop> {
    let mut inputs = check.input.open()?;
    let mut bar = Progress::new("reading", inputs.main.source.total());
    Ok(summarize(&mut inputs, &check.bounds.of_command(), &mut |at| bar.at(at))?)
}

/// What the command line tells of the destination of `stream`.
fn destination(check: &args::Check, stream: &Stream) -> Result<Destination, Stop> {
    let snapshot = check.against_snapshot.as_deref().or(check.input.snapshot.as_deref());
    let mut destination = Destination::default();
    for path in &check.against {
        let against = Against::open(path, snapshot)?;
        let mut bar = Progress::new("reading", against.total());
        destination.add(against.read(&check.bounds.of_command(), &mut |at| bar.at(at))?);
    }
    let stated = Stated {
        qemu: check.qemu,
        machine: check.machine.clone(),
        page_size: check.page_size,
        uuid: check.uuid.map(|uuid| uuid.0),
        capabilities: check.capability.clone(),
        ram_blocks: check.ram_block.clone(),
    };
    destination.state(&stated, stream);
    Ok(destination)
}

fn worst(findings: &[Judged]) -> Outcome {
    findings.iter().map(|judged| judged.finding.outcome).max().unwrap_or(Outcome::Loads)
}

/// What would tell.
fn settles(destination: &Destination) -> &'static str {
    let known = compared(destination);
    let (stream, models) = (known.contains(&"fields"), known.contains(&"device models"));
    match (stream, models) {
        (false, _) => {
            "a stream that the destination writes itself tells: `migrate exec:cat>FILE` there, with the same options and -S, and --against FILE"
        }
        (true, false) => {
            "its device models may tell: `qemu-system-… -M TYPE -dump-vmstate SCHEMA` there, and a second --against SCHEMA"
        }
        (true, true) => "what tells is to load the stream there: `-incoming`, with -S",
    }
}

/// What is printed for machines.
#[derive(Serialize)]
struct Object<'a> {
    verdict: &'static str,
    compared: Vec<&'static str>,
    #[serde(serialize_with = "all")]
    findings: &'a [Judged],
    error: Option<Value>,
}

fn all<S: Serializer>(findings: &&[Judged], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(findings.iter().map(finding_json))
}

fn object<'a>(findings: &'a [Judged], destination: &Destination, failure: Option<&Failure>) -> Object<'a> {
    let verdict = if failure.is_some() { Outcome::Fails } else { worst(findings) };
    let (verdict, compared) = (verdict.as_str(), compared(destination));
    Object { verdict, compared, findings, error: failure.map(error_json) }
}

fn finding_json(Judged { finding, qemu_says }: &Judged) -> Value {
    let (kind, name, instance_id, path) = match &finding.subject {
        Subject::Configuration => ("configuration", None, None, None),
        Subject::MachineType => ("machine", None, None, None),
        Subject::PageSize => ("page_size", None, None, None),
        Subject::Uuid => ("uuid", None, None, None),
        Subject::Capability(name) => ("capability", Some((*name).to_owned()), None, None),
        Subject::Command(name) => ("command", Some((*name).to_owned()), None, None),
        Subject::Footers => ("footers", None, None, None),
        Subject::RamBlock(name) => ("ram_block", Some(name.clone()), None, None),
        Subject::Section { idstr, instance_id } => ("section", Some(idstr.clone()), Some(*instance_id), None),
        Subject::Fields { idstr, instance_id, path } => {
            ("fields", Some(idstr.clone()), Some(*instance_id), Some(path.clone()))
        }
        _ => ("other", None, None, None),
    };
    json!({
        "kind": kind,
        "name": name,
        "instance_id": instance_id,
        "path": path,
        "found": finding.found,
        "expected": finding.expected,
        "outcome": finding.outcome.as_str(),
        "cause": finding.cause,
        "qemu_says": qemu_says,
    })
}

/// For people: a table with the usual cause under each row, and the verdict.
fn print(out: &mut Output, findings: &[Judged], destination: &Destination) -> Result<(), Stop> {
    if !findings.is_empty() {
        let mut table = Table::new(&["outcome", "what", "stream", "destination"]);
        for Judged { finding, .. } in findings {
            let cells = [finding.subject.to_string(), finding.found.clone(), finding.expected.clone()];
            let cells = cells.iter().map(|cell| printable(cell));
            table.row(std::iter::once(finding.outcome.as_str().to_owned()).chain(cells));
        }
        let text = table.within(super::line_width()).to_string();
        let mut lines = text.lines();
        lines.next().map_or(Ok(()), |header| out.line(header))?;
        for (line, Judged { finding, qemu_says }) in lines.zip(findings) {
            out.line(line)?;
            finding.cause.map_or(Ok(()), |cause| out.line(format!("            usual cause: {cause}")))?;
            qemu_says
                .as_ref()
                .map_or(Ok(()), |said| out.line(format!("            QEMU says: {}", printable(said))))?;
        }
        out.line("")?;
    }
    let count = |outcome| findings.iter().filter(|judged| judged.finding.outcome == outcome).count();
    let verdict = match worst(findings) {
        Outcome::Fails => "the destination will refuse the stream",
        Outcome::MayFail => "the destination may refuse the stream",
        Outcome::Loads => "nothing stops the stream from loading",
    };
    let counts = match findings.len() {
        0 => "no differences".to_owned(),
        _ => format!(
            "{} fatal, {} that may be, {} harmless",
            count(Outcome::Fails),
            count(Outcome::MayFail),
            count(Outcome::Loads)
        ),
    };
    out.line(format!("{verdict}: {counts} (compared: {})", compared(destination).join(", ")))?;
    if worst(findings) == Outcome::MayFail {
        out.line(format!("not decidable from what was compared; {}", settles(destination)))?;
    }
    Ok(())
}
