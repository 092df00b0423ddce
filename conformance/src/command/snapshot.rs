//! `qevm-conformance bench snapshot`.

use super::common::progress;
use anyhow::Result;
use clap::Args;
use qevm_conformance::peer;
use qevm_conformance::roots::Suite;

#[derive(Args)]
pub(crate) struct Snapshot {
    /// What the guest rewrites, and a quarter of that which it only checks, MiB
    #[arg(long, default_value_t = 192, value_parser = clap::value_parser!(u32).range(1..))]
    mib: u32,
    /// What it rewrites in a second, MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// What is written to the file in a second, MiB (max-bandwidth)
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    bandwidth: u32,
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
    /// Print nothing but one JSON object
    #[arg(long)]
    json: bool,
}

impl Snapshot {
    pub(crate) fn run(self) -> Result<bool> {
        let Snapshot { mib, rate, bandwidth, repetitions, json } = self;
        let options = peer::bench_snapshot::Options { mib, rate, bandwidth, repetitions, suite: Suite::Sid };
        let program = peer::Monitor::new(std::env::current_exe()?);
        let tell = progress(json);
        println!("{}", peer::bench_snapshot::snapshot(&options, &program, tell)?);
        Ok(true)
    }
}
