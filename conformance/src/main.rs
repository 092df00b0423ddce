//! `qevm-conformance`: drives real QEMUs against qevm.

use anyhow::Result;
use clap::{Parser, Subcommand};
use qevm_conformance::roots::{Root, Suite};

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
    }
}
