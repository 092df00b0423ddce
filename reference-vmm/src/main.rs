//! The `reference-vmm` program.

use reference_vmm::descriptors::Descriptors;
use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: the process has opened nothing yet, and has no other thread.
    match unsafe { Descriptors::inherit() } {
        Ok(inherited) => reference_vmm::command::main(std::env::args_os(), inherited),
        Err(error) => {
            eprintln!("reference-vmm: cannot list the inherited descriptors: {error}");
            ExitCode::FAILURE
        }
    }
}
