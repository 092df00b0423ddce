//! Captures of other targets than x86, and of a few of x86 beside them, judged as the scenarios of the matrix are.
//!
//! The [`table`] lists the machines. Each is saved by its QEMU with markers in its RAM; qevm has to decode all of the
//! stream, to write it again byte for byte, to find the same RAM as QEMU and the same values as `analyze-migration.py`,
//! and to place the RAM in [`physical`] memory where the monitor has it; and the QEMU has to load what qevm converts.

mod capture;
pub mod physical;
pub mod table;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use self::capture::Captured;
pub use self::table::Machine;
use crate::analyze::Script;
use crate::judge;
use crate::matrix::REQUIRE_QEMU;
use crate::outcome::{Outcome, Report, Row};
use crate::roots::{Root, Suite};
use crate::subject::Subject;

/// Differences that are told.
const TOLD: usize = 3;

/// What was seen of a machine that holds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Seen {
    /// The target.
    pub target: &'static str,
    /// Bytes of the stream.
    pub bytes: u64,
    /// Device sections and iterable ones.
    pub sections: usize,
    /// Bytes that are shown raw, as listed.
    pub opaque_bytes: u64,
    /// RAM blocks whose digest equals QEMU's.
    pub blocks: usize,
    /// Values that are the same as those of `analyze-migration.py`.
    pub values: usize,
    /// Places of guest-physical memory at which qevm has what the monitor's `xp` shows.
    pub markers: usize,
    /// Converted streams that QEMU loaded.
    pub loads: usize,
    /// What is listed as otherwise, and was so.
    pub exceptions: Vec<String>,
    /// What else should be known.
    pub remarks: Vec<String>,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Seen { bytes, sections, blocks, values, markers, loads, .. } = self;
        if *bytes > 0 {
            write!(f, "{bytes} bytes, {sections} sections, {blocks} RAM blocks, {values} values, {markers} markers")?;
            write!(f, ", loaded {loads}x")?;
        }
        let mut remarks = self.exceptions.iter().chain(&self.remarks);
        remarks.try_for_each(|remark| write!(f, "; {remark}"))
    }
}

/// Captures and judges machines one after the other, telling `each` about every row as it ends. Streams are kept in
/// `keep`, if there is such a folder.
///
/// # Errors
/// `analyze-migration.py` cannot be had. Everything else is a row of the report.
pub fn run(
    machines: &[Machine],
    subject: &Subject,
    keep: Option<&Path>,
    mut each: impl FnMut(&Row<Seen>),
) -> Result<Report<Seen>> {
    let script = Script::install()?;
    let mut roots: BTreeMap<(Suite, bool), Result<Root, String>> = BTreeMap::new();
    let mut rows = Vec::new();
    for machine in machines {
        let started = Instant::now();
        let x86 = machine.is_x86();
        let install = if x86 { Root::install } else { Root::install_targets };
        let root = roots.entry((machine.suite, x86));
        let root = root.or_insert_with(|| install(machine.suite).map_err(|why| format!("{why:#}")));
        let outcome = match root {
            Err(why) => Outcome::unavailable(REQUIRE_QEMU, why),
            Ok(root) => play(machine, &root.of_target(machine.target), subject, &script, keep).into(),
        };
        let row = Row { name: machine.name(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    Ok(Report { rows })
}

/// The numbers alone, for scripts.
pub fn summary(report: &Report<Seen>) -> Value {
    let mut summary = report.summary();
    // Those that QEMU does not save show nothing of their target.
    let captured = || report.held().filter(|seen| seen.bytes > 0);
    let sum = |of: fn(&Seen) -> u64| captured().map(of).sum::<u64>();
    let numbers = json!({
        "captured": captured().count(),
        "targets": captured().map(|seen| seen.target).collect::<BTreeSet<_>>().len(),
        "bytes": sum(|seen| seen.bytes),
        "sections": sum(|seen| seen.sections as u64),
        "opaque_bytes": sum(|seen| seen.opaque_bytes),
        "ram_blocks": sum(|seen| seen.blocks as u64),
        "values": sum(|seen| seen.values as u64),
        "read_by_script": captured().filter(|seen| seen.values > 0).count(),
        "with_markers": captured().filter(|seen| seen.markers > 0).count(),
        "markers": sum(|seen| seen.markers as u64),
        "loaded_by_qemu": sum(|seen| seen.loads as u64),
        "exceptions": report.held().map(|seen| seen.exceptions.len()).sum::<usize>(),
    });
    if let (Some(summary), Value::Object(numbers)) = (summary.as_object_mut(), numbers) {
        summary.extend(numbers);
    }
    summary
}

/// The numbers of a [`summary`] in a line.
pub fn totals(summary: &Value) -> String {
    format!(
        "{} machines of {} targets captured: {} bytes in {} sections, {} shown raw; {} RAM blocks equal to QEMU's; {} values \
         equal to analyze-migration.py's in {} of them; {} markers as xp shows them in {}; {} conversions loaded by QEMU; \
         {} listed exceptions",
        summary["captured"],
        summary["targets"],
        summary["bytes"],
        summary["sections"],
        summary["opaque_bytes"],
        summary["ram_blocks"],
        summary["values"],
        summary["read_by_script"],
        summary["markers"],
        summary["with_markers"],
        summary["loaded_by_qemu"],
        summary["exceptions"],
    )
}

fn play(machine: &Machine, root: &Root, subject: &Subject, script: &Script, keep: Option<&Path>) -> Result<Seen> {
    // Sockets live here, and their paths must be short.
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let kept = keep.map(|keep| keep.join(machine.name().replace(' ', "-")));
    let folder = kept.as_deref().unwrap_or(scratch.path());
    std::fs::create_dir_all(folder)?;
    let mut seen = Seen { target: machine.target, ..Default::default() };
    let captured = capture::capture(machine, root, folder, scratch.path());
    if let Some(why) = expected("QEMU does not save it", machine.exceptions.save, &captured)? {
        seen.exceptions.push(why);
        return Ok(seen);
    }
    let Captured { recording, marked } = captured?;
    let stream = folder.join(&recording.files.main);

    let judgement = judge::judge_with_opaque(&recording, folder, subject, machine.exceptions.opaque)?;
    ensure!(judgement.problems.is_empty(), "{}", judgement.problems.join("; "));
    seen.bytes = judgement.bytes;
    (seen.sections, seen.blocks, seen.opaque_bytes) = (judgement.sections, judgement.blocks, judgement.opaque_bytes);
    if seen.opaque_bytes > 0 {
        seen.exceptions.push(format!("{} bytes are shown raw", seen.opaque_bytes));
    }
    let read = judge::judge_fields(&recording, folder, subject, script)?.map_err(anyhow::Error::msg);
    if let Some(why) = expected("analyze-migration.py does not read it", machine.exceptions.script, &read)? {
        seen.exceptions.push(why);
    } else {
        let fields = read.context("analyze-migration.py")?;
        let told: Vec<&str> = fields.differences.iter().take(TOLD).map(String::as_str).collect();
        ensure!(fields.different == 0, "{} values differ: {}", fields.different, told.join("; "));
        ensure!(fields.fields > 0, "analyze-migration.py reads no value");
        seen.values = fields.fields;
    }
    let compared =
        physical::compare(&stream, &marked, machine.is_x86(), scratch.path()).context("guest-physical memory")?;
    seen.markers = compared.markers;
    if compared.nowhere > 0 {
        seen.remarks.push(format!("{} RAM blocks are not in guest-physical memory", compared.nowhere));
    }
    let (loads, exception) = capture::load_again(machine, root, &recording, folder, subject)?;
    seen.loads = loads;
    seen.exceptions.extend(exception);
    Ok(seen)
}

/// A remark, if something is listed as failing and failed so.
///
/// # Errors
/// It did not fail, or by another reason than the listed one.
fn expected<T>(what: &str, listed: Option<&str>, result: &Result<T>) -> Result<Option<String>> {
    match (listed, result) {
        (None, _) => Ok(None),
        (Some(listed), Ok(_)) => anyhow::bail!("{what} is listed ('{listed}'), and not so"),
        (Some(listed), Err(error)) => {
            let said = format!("{error:#}");
            ensure!(said.contains(listed), "{what}, but not as listed ('{listed}'): {said}");
            Ok(Some(format!("{what}: {listed}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listed_as_failing_has_to_fail_so() {
        let (good, bad): (Result<()>, Result<()>) = (Ok(()), Err(anyhow::anyhow!("blocked: cpu")));
        assert_eq!(expected("It", None, &bad).unwrap(), None);
        assert_eq!(expected("It", Some("blocked"), &bad).unwrap().as_deref(), Some("It: blocked"));
        assert!(expected("It", Some("blocked"), &good).is_err());
        assert!(expected("It", Some("crash"), &bad).is_err());
    }

    #[test]
    fn only_captured_machines_count_as_such() {
        let row = |seen| Row { name: "a".into(), outcome: Outcome::Held(seen), seconds: 1.0 };
        let captured = || Seen { target: "avr", bytes: 9, values: 2, markers: 20, ..Default::default() };
        let refused = Seen { target: "sh4", exceptions: vec!["cpu".into()], ..Default::default() };
        let summary = summary(&Report { rows: vec![row(captured()), row(captured()), row(refused)] });
        assert_eq!((&summary["rows"], &summary["captured"], &summary["targets"]), (&json!(3), &json!(2), &json!(1)));
        assert_eq!((&summary["markers"], &summary["exceptions"]), (&json!(40), &json!(1)));
    }
}
