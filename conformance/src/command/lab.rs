//! `qevm-conformance lab`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use qevm_conformance::lab;
use serde_json::json;

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
}

impl Lab {
    pub(crate) fn run(self) -> Result<bool> {
        let mut jobs = lab::jobs();
        jobs.retain(|job| self.only.is_empty() || self.only.iter().any(|only| job.name.contains(only)));
        println!("building reference-vmm without dynamic libraries");
        let programs = lab::build(&self.workspace)?;
        println!("{} jobs in an emulated machine with kvm_amd", jobs.len());
        let scratch = tempfile::tempdir()?;
        let run = lab::run(&programs, &jobs, scratch.path());
        if let Some(path) = &self.keep {
            keep(&scratch.path().join(lab::SERIAL), path);
        }
        let mut failures = 0;
        for outcome in run? {
            match outcome.result {
                Ok(numbers) => println!("ok    {} {numbers}", outcome.name),
                Err(error) => {
                    failures += 1;
                    println!("FAILS {}: {error:#}\n{}", outcome.name, outcome.said.trim_end());
                }
            }
        }
        println!("{}", json!({ "jobs": jobs.len(), "failures": failures }));
        Ok(failures == 0 && !jobs.is_empty())
    }
}

fn keep(serial: &Path, path: &Path) {
    if let Err(error) = fs::copy(serial, path) {
        eprintln!("what the machine printed cannot be kept: {error}");
    }
}
