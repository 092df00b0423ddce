//! `qevm-conformance`: drives real QEMUs against qevm.

mod command;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match command::Arguments::parse().command.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("qevm-conformance: {e:#}");
            ExitCode::FAILURE
        }
    }
}
