//! The `reference-vmm` program.

mod command;

use std::process::ExitCode;

use clap::Parser;

/// A KVM virtual machine monitor laid out like QEMU's microvm, to exchange running guests with QEMU.
#[derive(Parser)]
#[command(version, about, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Run(command::run::Run),
    Demo(command::demo::Demo),
    Payload(command::payload::Payload),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let result = match Arguments::parse().command {
        Command::Run(run) => run.execute(),
        Command::Demo(demo) => demo.execute(),
        Command::Payload(payload) => payload.execute(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("reference-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}
