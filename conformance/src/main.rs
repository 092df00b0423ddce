//! `qevm-conformance`: drives real QEMUs against qevm.

mod command;

use std::process::ExitCode;

use clap::Parser;
use qevm_conformance::peer;
use qevm_conformance::subject::BUILT_IN;
use reference_vmm::descriptors::Descriptors;

fn main() -> ExitCode {
    // The judged programs are in here, so that they are never an older build than their judge.
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.peek().is_some_and(|a| a == BUILT_IN) {
        return qevm::run(arguments);
    }
    if arguments.peek().is_some_and(|a| a == peer::BUILT_IN) {
        return reference_vmm::command::main(arguments, Descriptors::default());
    }
    match command::Arguments::parse().command.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("qevm-conformance: {e:#}");
            ExitCode::FAILURE
        }
    }
}
