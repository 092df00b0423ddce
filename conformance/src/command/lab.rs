//! `qevm-conformance lab`.

use anyhow::{Context, Result, ensure};
use clap::Args;
use qevm_conformance::lab::{self, Job, Outcome};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// How well a recording is packed. It is done once and read often.
const LEVEL: i32 = 19;

#[derive(Args)]
pub(crate) struct Lab {
    /// Only jobs whose name contains this (may be given several times)
    #[arg(long)]
    only: Vec<String>,
    /// The workspace in which reference-vmm is built
    #[arg(long, default_value = ".")]
    workspace: PathBuf,
    /// Keep what the machine printed in this file
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Measure instead, by a clock that follows the machine's instructions
    #[arg(long)]
    figures: bool,
    /// Record migrations with VFIO devices in this folder instead
    #[arg(long, conflicts_with = "figures")]
    record: Option<PathBuf>,
}

impl Lab {
    pub(crate) fn run(self) -> Result<bool> {
        let mut jobs = match (&self.record, self.figures) {
            (Some(_), _) => lab::recordings(),
            (None, true) => lab::figures(),
            (None, false) => lab::jobs(),
        };
        jobs.retain(|job| self.only.is_empty() || self.only.iter().any(|only| job.name.contains(only)));
        ensure!(!jobs.is_empty(), "no job has such a name");
        println!("building what they run without dynamic libraries");
        let programs = lab::build(&self.workspace, &jobs)?;
        println!("{} jobs in an emulated machine with kvm_amd", jobs.len());
        let scratch = tempfile::tempdir()?;
        let run = self.twice(&programs, &jobs, scratch.path());
        if let Some(path) = &self.keep {
            keep(&scratch.path().join(lab::SERIAL), path);
        }
        let (failures, outcomes) = run?;
        let (tables, missed) = lab::tables(&outcomes);
        if !tables.is_empty() {
            println!("\n{tables}");
        }
        missed.iter().for_each(|missed| println!("MISSED {missed}"));
        let failures = failures + missed.len();
        println!("{}", json!({ "jobs": jobs.len(), "failures": failures }));
        if let Some(folder) = self.record.filter(|_| failures == 0) {
            pack(&scratch.path().join("share"), &folder)?;
        }
        Ok(failures == 0)
    }

    /// Runs the jobs, and those that fail once more; gives the number of those that failed both times, and what became
    /// of the others.
    fn twice(&self, programs: &lab::Programs, jobs: &[Job], scratch: &Path) -> Result<(usize, Vec<Outcome>)> {
        let mut jobs = jobs.to_vec();
        let mut good = Vec::new();
        for last in [false, true] {
            let mut failed = Vec::new();
            for outcome in lab::run(programs, &jobs, scratch)? {
                match &outcome.result {
                    Ok(numbers) => {
                        println!("ok    {} {numbers}", outcome.name);
                        good.push(outcome);
                    }
                    Err(error) => {
                        let what = if last { "FAILS" } else { "again" };
                        println!("{what} {}: {error:#}\n{}", outcome.name, outcome.said.trim_end());
                        failed.push(outcome.name);
                    }
                }
            }
            jobs.retain(|job| failed.contains(&job.name));
            if jobs.is_empty() {
                break;
            }
        }
        Ok((jobs.len(), good))
    }
}

fn keep(serial: &Path, path: &Path) {
    if let Err(error) = fs::copy(serial, path) {
        eprintln!("what the machine printed cannot be kept: {error}");
    }
}

/// Compresses recordings: `NAME.zst` is the main channel, `NAME-channel-N.zst` a page channel, `NAME.return-path` what
/// came back.
fn pack(share: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for job in fs::read_dir(share)? {
        let job = job?;
        let name = job.file_name().to_string_lossy().into_owned();
        let name = name.strip_prefix(lab::RECORDING).context("a folder that no recording left")?;
        for file in fs::read_dir(job.path())? {
            let file = file?;
            let bytes = fs::read(file.path())?;
            let kept = match file.file_name().to_string_lossy().as_ref() {
                "main" => (format!("{name}.zst"), zstd::encode_all(&bytes[..], LEVEL)?),
                "return-path" => (format!("{name}.return-path"), bytes),
                // Nothing comes back on page channels.
                other if other.ends_with("-return") => continue,
                other => (format!("{name}-{other}.zst"), zstd::encode_all(&bytes[..], LEVEL)?),
            };
            fs::write(folder.join(&kept.0), kept.1)?;
            println!("recorded {}", kept.0);
        }
    }
    Ok(())
}
