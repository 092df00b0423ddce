//! The command line. It is in the library so that the conformance suite runs the very monitor it was built with.

mod demo;
mod device;
mod event_log;
mod machine;
mod object;
mod options;
mod payload;
mod qmp_object;
mod run;
mod signals;
mod vfio;
mod watch;

use crate::descriptors::Descriptors;
use crate::log;
use clap::Parser;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// A KVM virtual machine monitor laid out like QEMU's microvm, to exchange running guests with QEMU.
#[derive(Parser)]
#[command(name = "reference-vmm", version, about, max_term_width = 120)]
struct Arguments {
    /// What is logged: what is of this level, and what is worse
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info", value_enum)]
    log_level: log::Level,
    /// Append the log to a file, instead of writing it on standard error
    #[arg(long, global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Run(Box<run::Run>),
    Demo(demo::Demo),
    Payload(payload::Payload),
    Watch(watch::Watch),
}

/// Runs the program with these arguments, the first of which is its name, and gives its exit status. `inherited`: what
/// it may use by number (`fd:NUMBER`).
pub fn main(arguments: impl Iterator<Item = OsString>, inherited: Descriptors) -> ExitCode {
    let Arguments { log_level, log_file, command } = Arguments::parse_from(arguments.map(two_dashes));
    let _log = match log::init(log_level, log_file.as_deref()) {
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
        Command::Watch(watch) => watch.execute(),
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
