//! The `reference-vmm` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    reference_vmm::command::main(std::env::args_os())
}
