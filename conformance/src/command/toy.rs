//! `qevm-conformance toy`.

use anyhow::Result;
use clap::Args;
use qevm_conformance::toy;

use super::{Reporting, wanted};

#[derive(Args)]
pub(crate) struct Toy {
    /// Every trip, and not the representative subset alone
    #[arg(long)]
    full: bool,
    /// Only trips whose name contains this (may be given several times; of all, not of the subset alone)
    #[arg(long)]
    only: Vec<String>,
    /// Print the trips and stop
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    reporting: Reporting,
}

impl Toy {
    pub(crate) fn run(self) -> Result<bool> {
        let mut trips = if self.full || !self.only.is_empty() { toy::all() } else { toy::quick() };
        trips.retain(|trip| wanted(&trip.name(), &self.only));
        if self.list {
            trips.iter().for_each(|trip| println!("{}", trip.name()));
            return Ok(true);
        }
        let report = toy::run(&trips, &std::env::current_exe()?, |row| println!("{}", row.line()));
        self.reporting.tell("trips", &report, report.summary())?;
        Ok(report.holds())
    }
}
