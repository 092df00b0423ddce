//! `qevm-conformance bench link`.

use anyhow::Result;
use clap::Args;
use qevm_conformance::bench::link;
use qevm_conformance::peer::Monitor;
use qevm_conformance::roots::Suite;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Link {
    /// Whose QEMU
    #[arg(long, value_enum, default_value_t = Suite::Sid)]
    suite: Suite,
    /// Speed of the link, Mbit/s
    #[arg(long, default_value_t = 1000)]
    megabits: u32,
    /// downtime-limit, ms
    #[arg(long, default_value_t = 300)]
    downtime_limit: u64,
    /// Working sets of the guest, MiB
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    sets: Vec<u32>,
    /// MiB per second that the guest dirties
    #[arg(long, default_value_t = 32)]
    rate: u32,
    /// Migrations of each kind
    #[arg(long, default_value_t = 5)]
    repetitions: u32,
    /// Let the pages go over this many page channels, with both monitors
    #[arg(long, default_value_t = 0, value_name = "CHANNELS")]
    multifd: u8,
    /// From QEMU to reference-vmm and from reference-vmm to QEMU as well
    #[arg(long)]
    pairs: bool,
    /// Let every destination touch its memory only when pages arrive. Then the host's giving of memory is measured as
    /// well, which varies most
    #[arg(long)]
    fresh: bool,
    /// Another build of reference-vmm, whose migrations take turns with those of this one
    #[arg(long, value_name = "PROGRAM")]
    before: Option<PathBuf>,
}

impl Link {
    pub(crate) fn run(self) -> Result<bool> {
        let Link { suite, megabits, downtime_limit, sets, rate, repetitions, pairs, fresh, multifd, before } = self;
        let options = link::Options { suite, megabits, downtime_limit, sets, rate, repetitions, pairs, fresh, multifd };
        let program = Monitor::new(std::env::current_exe()?);
        let before = before.map(|path| program.other(path));
        let object = link::run(&options, &program, before.as_ref())?;
        println!("{object}");
        Ok(object["goals_met"] == true)
    }
}
