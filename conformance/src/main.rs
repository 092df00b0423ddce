//! `qevm-conformance`: drives real QEMUs against qevm.

#[allow(dead_code)] // Its `main`.
mod async_vmm;
mod command;
#[allow(dead_code)] // Its `main`.
mod toy_vmm;

use clap::Parser;
use qevm_conformance::subject::BUILT_IN;
use qevm_conformance::{peer, toy};
use reference_vmm::descriptors::Descriptors;
use std::process::ExitCode;

fn main() -> ExitCode {
    // The judged programs are in here, so that they are never an older build than their judge.
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.peek().is_some_and(|a| a == BUILT_IN) {
        return qevm::run(arguments);
    }
    if arguments.peek().is_some_and(|a| a == peer::BUILT_IN) {
        return reference_vmm::command::main(arguments, Descriptors::default());
    }
    let example = toy::BUILT_IN.iter().position(|name| arguments.peek().is_some_and(|a| a == name));
    if let Some(example) = example {
        let arguments: Vec<String> = arguments.skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
        return match [toy_vmm::run, async_vmm::run][example](&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", toy::BUILT_IN[example]);
                ExitCode::FAILURE
            }
        };
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
