//! Whether a guest can be migrated, before it is tried: what two running QEMUs say of themselves by QMP, or one of
//! them and what else tells of the other.
//!
//! Nothing is changed at either side, and no experimental command is used: `x-query-virtio-status` of QEMU 11.1 ends
//! the guest.

mod compare;
mod domain;
mod facts;
mod qmp;

use crate::args;
use crate::commands::{Output, line_width};
use crate::failure::Stop;
use crate::table::Table;
use qevm_inspect::failure::printable;
use qevm_savevm::check::Outcome;
use qevm_savevm::vmdesc::Schema;
use qevm_wire::Limits;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

pub use compare::{Difference, compare};
pub use facts::{Cpu, Device, Facts};

/// The socket of a running QEMU, if that is what is named: `qmp:PATH`.
pub fn socket(name: &Path) -> Option<&Path> {
    name.to_str()?.strip_prefix("qmp:").map(Path::new)
}

/// `qevm check qmp:SOCKET`.
///
/// # Errors
/// [`Stop::Found`] if the destination will refuse the guest, [`Stop::Undecided`] if that cannot be told,
/// [`Stop::Usage`] if a side does not tell of itself.
pub fn run(check: &args::Check, source: &Path) -> Result<(), Stop> {
    let [against] = &check.against[..] else {
        return Err(Stop::Usage("of a running QEMU, one destination is compared: --against, once".to_owned()));
    };
    let source = qmp::facts(source)?;
    let destination = destination(against)?;
    let differences = compare(&source, &destination);
    let compared = source.common(&destination);
    let mut out = Output::new();
    match check.output.json {
        true => out.json(&object(&differences, &compared))?,
        false => print(&mut out, &differences, &compared)?,
    }
    out.finish()?;
    match worst(&differences) {
        Outcome::Loads => Ok(()),
        Outcome::MayFail => Err(Stop::Undecided),
        Outcome::Fails => Err(Stop::Found),
    }
}

/// What is known of the destination that `name` stands for.
fn destination(name: &Path) -> Result<Facts, Stop> {
    if let Some(socket) = socket(name) {
        return qmp::facts(socket);
    }
    let shown = name.display();
    let limits = Limits::default();
    let cannot = |error: io::Error| Stop::Usage(format!("--against {shown}: cannot be read: {error}"));
    let mut text = Vec::new();
    File::open(name).map_err(cannot)?.take(limits.schema + 1).read_to_end(&mut text).map_err(cannot)?;
    if text.len() as u64 > limits.schema {
        return Err(Stop::Usage(format!("--against {shown}: is longer than {} bytes", limits.schema)));
    }
    match text.trim_ascii_start().first() {
        Some(b'<') => domain::facts(&text).map_err(|error| Stop::Usage(format!("--against {shown}: {error}"))),
        Some(b'{') => {
            let schema = Schema::parse(&text, &limits)
                .map_err(|error| Stop::Usage(format!("--against {shown}: is no output of -dump-vmstate: {error}")))?;
            Ok(Facts { machine: schema.machine, ..Facts::default() })
        }
        _ => Err(Stop::Usage(format!(
            "--against {shown}: expected qmp:SOCKET, an output of -dump-vmstate or a domain XML of libvirt: a stream tells of no running guest"
        ))),
    }
}

fn worst(differences: &[Difference]) -> Outcome {
    differences.iter().map(|difference| difference.outcome).max().unwrap_or(Outcome::Loads)
}

fn object(differences: &[Difference], compared: &[&str]) -> Value {
    let findings: Vec<Value> = differences
        .iter()
        .map(|Difference { subject, source, destination, outcome, advice }| {
            json!({
                "subject": subject,
                "source": source,
                "destination": destination,
                "outcome": outcome.as_str(),
                "advice": advice,
            })
        })
        .collect();
    json!({"verdict": worst(differences).as_str(), "compared": compared, "findings": findings, "error": null})
}

/// For people: a table with what to do under each row, and the verdict.
fn print(out: &mut Output, differences: &[Difference], compared: &[&str]) -> Result<(), Stop> {
    if !differences.is_empty() {
        let mut table = Table::new(&["outcome", "what", "source", "destination"]);
        for difference in differences {
            let cells = [&difference.subject, &difference.source, &difference.destination].map(|cell| printable(cell));
            table.row(std::iter::once(difference.outcome.as_str().to_owned()).chain(cells));
        }
        let text = table.within(line_width()).to_string();
        let mut lines = text.lines();
        lines.next().map_or(Ok(()), |header| out.line(header))?;
        for (line, difference) in lines.zip(differences) {
            out.line(line)?;
            out.line(format!("            {}", printable(&difference.advice)))?;
        }
        out.line("")?;
    }
    let verdict = match worst(differences) {
        Outcome::Fails => "the destination will refuse the guest",
        Outcome::MayFail => "not decidable without a stream",
        Outcome::Loads => "nothing stops the guest from being migrated",
    };
    let count = |outcome| differences.iter().filter(|difference| difference.outcome == outcome).count();
    let (fails, may, loads) = (count(Outcome::Fails), count(Outcome::MayFail), count(Outcome::Loads));
    let counts = format!("{fails} fatal, {may} that may be, {loads} harmless");
    out.line(format!("{verdict}: {counts} (compared: {})", compared.join(", ")))
}
