//! `qevm-conformance bench tool`.

use super::common::{progress, subject};
use anyhow::Result;
use clap::Args;
use qevm_conformance::bench::tool::{self, Options};

#[derive(Args)]
pub(crate) struct Tool {
    /// Guest RAM, every page of it different and none zero, MiB. Twice that is needed in $TMPDIR
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..))]
    mib: u64,
    /// How often each pair runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
    /// Print nothing but one JSON object
    #[arg(long)]
    json: bool,
}

impl Tool {
    pub(crate) fn run(self) -> Result<bool> {
        let options = Options { mib: self.mib, repetitions: self.repetitions };
        let report = tool::tool(&options, &subject()?, progress(self.json))?;
        println!("{}", report.json());
        Ok(report.holds())
    }
}
