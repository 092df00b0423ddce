//! `qevm-conformance lifecycle`.

use anyhow::Result;
use clap::Args;
use qevm_conformance::lifecycle::{self, table};
use qevm_conformance::peer::Monitor;

use super::{Reporting, wanted};

#[derive(Args)]
pub(crate) struct Lifecycle {
    /// Every row, and not the representative subset alone
    #[arg(long)]
    full: bool,
    /// Only rows whose name contains this (may be given several times; of all, not of the subset alone)
    #[arg(long)]
    only: Vec<String>,
    /// Print the rows with their outcomes as they are expected, and stop
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    reporting: Reporting,
}

impl Lifecycle {
    pub(crate) fn run(self) -> Result<bool> {
        let mut rows = if self.full || !self.only.is_empty() { table::all() } else { table::quick() };
        rows.retain(|row| wanted(&row.name, &self.only));
        if self.list {
            rows.iter().for_each(|row| println!("{:<52} {}", row.name, row.expected));
            return Ok(true);
        }
        let program = Monitor::new(std::env::current_exe()?);
        let report = lifecycle::run(&rows, &program, |row| println!("{}", row.line()))?;
        self.reporting.tell("rows", &report, report.summary())?;
        Ok(report.holds())
    }
}
