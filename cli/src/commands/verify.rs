//! `qevm verify`: decode everything, re-encode it, compare, rebuild RAM.

use super::{Bar, Output};
use crate::args::{self, RamDigest};
use crate::failure::Stop;
use crate::progress::Progress;
use crate::table::count;
use qevm_inspect::ram::Keep;
use qevm_inspect::report::Report;
use qevm_inspect::size::size;
use qevm_inspect::stream::{Analysis, Settings, analyze};

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the stream is bad, [`Stop::Usage`] if a file cannot be opened.
pub fn run(verify: &args::Verify) -> Result<(), Stop> {
    let mut inputs = super::open(&verify.input, verify.output, |report, out| out.json(report))?;
    let keep = match verify.ram_digest {
        RamDigest::Crc32 => Keep::Digests,
        RamDigest::Sha256 => Keep::Image,
    };
    let settings = Settings {
        keep,
        reencode: true,
        complete: true,
        strict: true,
        live: false,
        layouts: verify.layouts.open()?,
        spool: verify.bounds.spool(),
        max_ram: if keep == Keep::Image { verify.bounds.max_ram } else { u64::MAX },
    };
    let mut bar = Bar(Progress::new("verifying", inputs.main.source.total()));
    let mut analysis = analyze(&mut inputs, &settings, &mut bar);
    let report = analysis.report(verify.ram_digest.into());
    drop(bar);
    let mut out = Output::new();
    match verify.output.json {
        true => out.json(&report)?,
        false => print(&mut out, &analysis, &report)?,
    }
    out.finish()?;
    report.error.map_or(Ok(()), |failure| Err(Stop::Bad(failure)))
}

fn print(out: &mut Output, analysis: &Analysis, report: &Report) -> Result<(), Stop> {
    out.print(super::inspect::ram_table(report))?;
    for line in analysis.channels.iter().chain(&analysis.return_path).chain(&analysis.notes) {
        out.line(line)?;
    }
    let identical = match report.reencoded_identical {
        true => "re-encoded byte for byte",
        false => "not re-encoded to the same bytes",
    };
    let verdict = if report.error.is_none() { "ok" } else { "BAD" };
    out.line(format!(
        "{verdict}: {} in {} sections, {identical}, {} opaque; written by {}",
        size(report.bytes),
        report.sections.len(),
        match report.opaque_bytes {
            0 => "nothing".to_owned(),
            bytes => format!("{} bytes", count(bytes)),
        },
        report.qemu_profile,
    ))
}
