//! The command line. It is in the library so that the conformance suite runs the very monitor it was built with.

mod demo;
mod device;
mod machine;
mod object;
mod options;
mod payload;
mod qmp_object;
mod run;
mod signals;
mod vfio;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::descriptors::Descriptors;
use crate::log;

/// A KVM virtual machine monitor laid out like QEMU's microvm, to exchange running guests with QEMU.
#[derive(Parser)]
#[command(name = "reference-vmm", version, about, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Run(Box<run::Run>),
    Demo(demo::Demo),
    Payload(payload::Payload),
}

/// Runs the program with these arguments, the first of which is its name, and gives its exit status. `inherited`: what it
/// may use by number (`fd:NUMBER`).
pub fn main(arguments: impl Iterator<Item = OsString>, inherited: Descriptors) -> ExitCode {
    let command = Arguments::parse_from(arguments.map(two_dashes)).command;
    let _log = match log::init() {
        Ok(log) => log,
        Err(error) => {
            eprintln!("reference-vmm: cannot start the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = match command {
        Command::Run(run) => run.execute(inherited),
        Command::Demo(demo) => demo.execute(),
        Command::Payload(payload) => payload.execute(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            log::say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Options that are written with one dash for a QEMU, and may be here.
const ONE_DASH: [&str; 3] = ["-action", "-no-reboot", "-no-shutdown"];

fn two_dashes(argument: OsString) -> OsString {
    match argument.to_str() {
        Some(text) if ONE_DASH.contains(&text) => format!("-{text}").into(),
        _ => argument,
    }
}
