//! `qevm-conformance crash`.

use anyhow::{Result, ensure};
use clap::Args;
use qevm_conformance::crash;

use super::common::{Reporting, subject, wanted};

#[derive(Args)]
pub(crate) struct Crash {
    /// Only guests whose name contains this (may be given several times)
    #[arg(long)]
    only: Vec<String>,
    /// Print the guests and stop
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    reporting: Reporting,
}

impl Crash {
    pub(super) fn run(self) -> Result<bool> {
        let mut guests = crash::all();
        guests.retain(|guest| wanted(&guest.name(), &self.only));
        ensure!(!guests.is_empty(), "no guest has such a name");
        if self.list {
            guests.iter().for_each(|guest| println!("{}", guest.name()));
            return Ok(true);
        }
        let report = crash::run(&guests, &subject()?, |row| println!("{}", row.line()));
        self.reporting.tell("guests", &report, report.summary())?;
        Ok(report.holds())
    }
}
