//! `qevm-conformance toy`.

use super::common::{Choice, Reporting};
use anyhow::Result;
use clap::Args;
use qevm_conformance::toy;

#[derive(Args)]
pub(crate) struct Toy {
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    reporting: Reporting,
}

impl Toy {
    pub(crate) fn run(self) -> Result<bool> {
        let Some(trips) = self.choice.rows(toy::all, toy::quick, |trip| trip.name(), |trip| trip.name()) else {
            return Ok(true);
        };
        let report = toy::run(&trips, &std::env::current_exe()?, |row| println!("{}", row.line()));
        self.reporting.tell("trips", &report, report.summary())?;
        Ok(report.holds())
    }
}
