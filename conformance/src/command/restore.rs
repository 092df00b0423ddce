//! `qevm-conformance bench restore`.

use super::common::progress;
use anyhow::Result;
use clap::Args;
use qevm_conformance::peer;
use qevm_conformance::roots::Suite;

#[derive(Args)]
pub(crate) struct Restore {
    /// Guest RAM, MiB, of which the guest touches a twentieth
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 4096, 8192], value_parser = clap::value_parser!(u32).range(64..))]
    mib: Vec<u32>,
    /// How often each way is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
    /// Guests that run from one file at once, to measure the memory of each (PSS); 0 for none
    #[arg(long, default_value_t = 10)]
    guests: usize,
    /// Print nothing but one JSON object
    #[arg(long)]
    json: bool,
}

impl Restore {
    pub(crate) fn run(self) -> Result<bool> {
        let Restore { mib, repetitions, guests, json } = self;
        let options = peer::bench_restore::Options { mib, repetitions, guests, suite: Suite::Sid };
        let program = peer::Monitor::new(std::env::current_exe()?);
        let tell = progress(json);
        println!("{}", peer::bench_restore::restore(&options, &program, tell)?);
        Ok(true)
    }
}
