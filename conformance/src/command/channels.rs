//! `qevm-conformance channels`.

use super::common::{Choice, subject};
use anyhow::Result;
use clap::Args;
use qevm_conformance::channels::{run, table};

#[derive(Args)]
pub(crate) struct Channels {
    #[command(flatten)]
    choice: Choice,
    /// Source QEMUs in flight at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print one JSON object with the numbers as the last line
    #[arg(long)]
    json: bool,
}

impl Channels {
    pub(super) fn run(self) -> Result<bool> {
        let line = |row: &table::Row| format!("{}{}", row.name, if row.quick { " (quick)" } else { "" });
        let Some(rows) = self.choice.rows(table::all, table::quick, |row| row.name.clone(), line) else {
            return Ok(true);
        };
        let report = run::run(&rows, &subject()?, self.jobs, |line| println!("{}", line.text()));
        println!("\n{}", report.text());
        if self.json {
            println!("{}", report.summary());
        }
        Ok(report.holds())
    }
}
