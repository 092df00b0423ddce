//! `qevm-conformance bench migrate`.

use super::common::progress;
use anyhow::Result;
use clap::Args;
use qevm_conformance::peer;
use qevm_conformance::roots::Suite;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Migrate {
    /// Guest RAM, MiB
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(16..))]
    mib: u32,
    /// How often each pairing is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
    /// Numbers of page channels
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4])]
    channels: Vec<u64>,
    /// Values of multifd-compression
    #[arg(long, value_delimiter = ',', default_values_t = ["none".to_owned(), "zlib".to_owned(), "zstd".to_owned()])]
    methods: Vec<String>,
    /// Measure page channels only, and not the main channel alone
    #[arg(long)]
    page_channels_only: bool,
    /// Let every destination touch its memory only when pages arrive. Then the host's giving of memory is measured as
    /// well, which takes longer than the migration and varies most
    #[arg(long)]
    fresh: bool,
    /// Secure all channels with TLS of this version, by certificates at both ends
    #[arg(long, value_name = "VERSION", value_parser = ["1.2", "1.3"])]
    tls: Option<String>,
    /// Another build of reference-vmm, whose migrations take turns with those of this one. Given again, that is only
    /// measured
    #[arg(long, value_name = "PROGRAM")]
    before: Vec<PathBuf>,
    /// Print nothing but one JSON object
    #[arg(long)]
    json: bool,
}

impl Migrate {
    pub(crate) fn run(self) -> Result<bool> {
        let Migrate { mib, repetitions, channels, methods, page_channels_only, fresh, tls, before, json } = self;
        let main_channel = !page_channels_only;
        let suite = Suite::Sid;
        let tls = tls.map(|version| if version == "1.2" { peer::Version::Tls12 } else { peer::Version::Tls13 });
        let options = peer::bench::Options { mib, repetitions, channels, methods, main_channel, fresh, tls, suite };
        let program = peer::Monitor::new(std::env::current_exe()?);
        let before: Vec<_> = before.into_iter().map(|path| program.other(path)).collect();
        let tell = progress(json);
        println!("{}", peer::bench::migrate(&options, &program, &before, tell)?);
        Ok(true)
    }
}
