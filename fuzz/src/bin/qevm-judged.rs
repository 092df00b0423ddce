//! `qevm` itself, for the judge of costs, which runs it as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    qevm::run(std::env::args_os())
}
