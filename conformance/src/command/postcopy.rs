//! `qevm-conformance bench postcopy`.

use super::common::progress;
use anyhow::Result;
use clap::Args;
use qevm_conformance::peer;
use qevm_conformance::roots::Suite;

#[derive(Args)]
pub(crate) struct Postcopy {
    /// Guest memory that is read at random, MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(16..=2048))]
    mib: u32,
    /// How often each way is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
    /// Remote faults that are waited for without background traffic
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    faults: u64,
    /// Over a UNIX socket (default: TCP on the loopback)
    #[arg(long)]
    unix: bool,
    /// Print nothing but one JSON object
    #[arg(long)]
    json: bool,
}

impl Postcopy {
    pub(crate) fn run(self) -> Result<bool> {
        let Postcopy { mib, repetitions, faults, unix, json } = self;
        let options = peer::bench_postcopy::Options { mib, repetitions, faults, unix, suite: Suite::Sid };
        let program = peer::Monitor::new(std::env::current_exe()?);
        let report = peer::bench_postcopy::postcopy(&options, &program, progress(json))?;
        println!("{report}");
        Ok(report["goals_met"] == true)
    }
}
