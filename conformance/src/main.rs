//! `qevm-conformance`: drives real QEMUs against qevm.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use qevm_conformance::roots::{Root, Suite};
use qevm_conformance::{corpus, record, table};

#[derive(Parser)]
#[command(version, about = "Real QEMUs of several releases as the judge of qevm")]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Install QEMU of Debian's suites side by side under $QEVM_CACHE (default: ~/.cache/qevm)
    Setup {
        /// Only these suites (default: all)
        #[arg(long, value_enum)]
        suite: Vec<Suite>,
    },
    /// Record scenarios with real QEMU into one folder each
    Record {
        /// Where the recordings go
        #[arg(long)]
        out: PathBuf,
        /// Only scenarios whose name contains this (may be given several times)
        #[arg(long)]
        only: Vec<String>,
        /// Record again what is already there
        #[arg(long)]
        again: bool,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Action::Setup { suite } => {
            let suites = if suite.is_empty() { Suite::ALL.to_vec() } else { suite };
            for suite in suites {
                let root = Root::install(suite)?;
                println!("{suite}: QEMU {} in {}", root.version(), root.dir().display());
            }
            Ok(())
        }
        Action::Record { out, only, again } => record_all(&out, &only, again),
    }
}

fn record_all(out: &Path, only: &[String], again: bool) -> Result<()> {
    let mut failed = 0;
    for scenario in table::all() {
        let wanted = only.is_empty() || only.iter().any(|o| scenario.name.contains(o.as_str()));
        let folder = out.join(scenario.folder());
        if !wanted || (!again && folder.join(record::MANIFEST).exists()) {
            continue;
        }
        let root = Root::install(scenario.suite)?;
        let started = Instant::now();
        match record::record(&scenario, &root, &folder) {
            Ok(_) => println!("recorded {} in {:.1} s", scenario.name, started.elapsed().as_secs_f64()),
            Err(e) => {
                failed += 1;
                println!("FAILED   {}: {e:#}", scenario.name);
            }
        }
    }
    for suite in Suite::ALL {
        let folder = out.join("dump-vmstate");
        if again || !folder.join(format!("{}-microvm.json", suite.series())).exists() {
            corpus::dump_vmstate(&Root::install(suite)?, &folder)?;
        }
    }
    println!("{} recordings in {}", corpus::write_index(out)?, out.display());
    match failed {
        0 => Ok(()),
        n => bail!("{n} scenarios could not be recorded"),
    }
}
