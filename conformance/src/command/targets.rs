//! `qevm-conformance targets`.

use super::common::{Reporting, subject, wanted};
use anyhow::{Result, ensure};
use clap::Args;
use qevm_conformance::targets::{self, table};
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Targets {
    /// Only machines whose name contains this (may be given several times)
    #[arg(long)]
    only: Vec<String>,
    /// Print the machines and stop
    #[arg(long)]
    list: bool,
    /// Keep the streams in this folder
    #[arg(long)]
    keep: Option<PathBuf>,
    #[command(flatten)]
    reporting: Reporting,
}

impl Targets {
    pub(super) fn run(self) -> Result<bool> {
        let mut machines = table::all()?;
        machines.retain(|machine| wanted(&machine.name(), &self.only));
        ensure!(!machines.is_empty(), "no machine has such a name");
        if self.list {
            machines.iter().for_each(|machine| println!("{}: {}", machine.name(), machine.arguments.join(" ")));
            return Ok(true);
        }
        let report = targets::run(&machines, &subject()?, self.keep.as_deref(), |row| println!("{}", row.line()))?;
        let summary = targets::summary(&report);
        if !self.reporting.json {
            println!("{}", targets::totals(&summary));
        }
        self.reporting.tell("machines", &report, summary)?;
        Ok(report.holds())
    }
}
