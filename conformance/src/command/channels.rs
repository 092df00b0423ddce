//! `qevm-conformance channels`.

use anyhow::Result;
use clap::Args;
use qevm_conformance::channels::{run, table};

use super::{subject, wanted};

#[derive(Args)]
pub(crate) struct Channels {
    /// Every row, and not the representative subset
    #[arg(long)]
    full: bool,
    /// Only rows whose name contains this (may be given several times; of all, not of the subset alone)
    #[arg(long)]
    only: Vec<String>,
    /// Source QEMUs in flight at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print the rows and stop
    #[arg(long)]
    list: bool,
    /// Print one JSON object with the numbers as the last line
    #[arg(long)]
    json: bool,
}

impl Channels {
    pub(super) fn run(self) -> Result<bool> {
        let mut rows = if self.full || !self.only.is_empty() { table::all() } else { table::quick() };
        rows.retain(|row| wanted(&row.name, &self.only));
        if self.list {
            for row in &rows {
                println!("{}{}", row.name, if row.quick { " (quick)" } else { "" });
            }
            return Ok(true);
        }
        let report = run::run(&rows, &subject()?, self.jobs, |line| println!("{}", line.text()));
        println!("\n{}", report.text());
        if self.json {
            println!("{}", report.summary());
        }
        Ok(report.holds())
    }
}
