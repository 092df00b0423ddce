//! The library behind `qevm`, the operator's tool for QEMU migration streams.
//!
//! [`run`] is the whole program: arguments, tables and progress around [`qevm_inspect`], which does the work, and the
//! two ends of a live migration (`send`, `receive`).
//!
//! # Example
//!
//! ```
//! use std::process::ExitCode;
//!
//! // The status is 1 where a stream is bad, 2 for what cannot be done at all.
//! let arguments = ["qevm", "verify", "/nowhere/guest.qevm"].map(Into::into);
//! assert_eq!(qevm::run(arguments), ExitCode::from(2));
//! ```
#![forbid(unsafe_code)]

pub mod args;
pub mod commands;
pub mod failure;
pub mod live;
pub mod progress;
pub mod serve;
pub mod socket;
pub mod table;

use args::{Cli, Command};
use clap::Parser;
use failure::Stop;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

/// Exit code: the stream is bad.
const EXIT_BAD: u8 = 1;
/// Exit code: wrong usage.
const EXIT_USAGE: u8 = 2;
/// Exit code: what is known does not decide (`qevm check`).
const EXIT_UNDECIDED: u8 = 3;

/// What scripts get that asked for an object, where a command came to none: `ok` and `error`, as `qevm verify` has
/// them.
fn failed_json(result: &Result<(), Stop>) {
    let error = match result {
        Err(Stop::Bad(failure)) => qevm_inspect::report::error_json(failure),
        Err(Stop::Usage(message)) => {
            serde_json::json!({"kind": "usage", "offset": null, "path": "", "message": message})
        }
        _ => return,
    };
    // Nothing can be said if the place to say it is gone.
    let _ = writeln!(std::io::stdout(), "{}", serde_json::json!({"ok": false, "error": error}));
}

/// Runs the program with these arguments (the first is its name).
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Asking for help or the version is a success; everything else that clap reports is wrong usage.
            let code = if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
            // Nothing can be said if the place to say it is gone.
            let _ = error.print();
            return code;
        }
    };
    let result = match &cli.command {
        Command::Check(check) => commands::check::run(check),
        Command::Convert(convert) => commands::convert::run(convert),
        Command::Diff(diff) => commands::diff::run(diff),
        Command::Extract(extract) => commands::extract::run(extract),
        Command::Inspect(inspect) => commands::inspect::run(inspect),
        Command::Send(send) => commands::send::run(send),
        Command::Serve(serve) => commands::serve::run(serve),
        Command::Verify(verify) => commands::verify::run(verify),
        Command::Receive(receive) => commands::receive::run(receive),
        Command::Completions(completions) => commands::docs::completions(completions),
        Command::Man(man) => commands::docs::man(man),
        Command::InstallDocs(install) => commands::docs::install(install),
    };
    if cli.command.json() && !commands::printed_json() {
        failed_json(&result);
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Bad(failure)) => {
            eprintln!("qevm: {failure}");
            ExitCode::from(EXIT_BAD)
        }
        Err(Stop::Usage(message)) => {
            eprintln!("qevm: {}", qevm_inspect::failure::printable(&message));
            ExitCode::from(EXIT_USAGE)
        }
        Err(Stop::Found) => ExitCode::from(EXIT_BAD),
        Err(Stop::Undecided) => ExitCode::from(EXIT_UNDECIDED),
        Err(Stop::OutputClosed) => ExitCode::SUCCESS,
    }
}
