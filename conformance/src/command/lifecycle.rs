//! `qevm-conformance lifecycle`.

use super::common::{Choice, Reporting};
use anyhow::Result;
use clap::Args;
use qevm_conformance::lifecycle::{self, Row, table};
use qevm_conformance::peer::Monitor;

#[derive(Args)]
pub(crate) struct Lifecycle {
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    reporting: Reporting,
}

impl Lifecycle {
    pub(crate) fn run(self) -> Result<bool> {
        let line = |row: &Row| format!("{:<52} {}", row.name, row.expected);
        let Some(rows) = self.choice.rows(table::all, table::quick, |row| row.name.clone(), line) else {
            return Ok(true);
        };
        let program = Monitor::new(std::env::current_exe()?);
        let report = lifecycle::run(&rows, &program, |row| println!("{}", row.line()))?;
        self.reporting.tell("rows", &report, report.summary())?;
        Ok(report.holds())
    }
}
