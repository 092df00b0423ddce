//! The `qevm` that is judged, run as its users run it: as a program.

use crate::patience::PATIENCE;
use crate::process::{Finished, run_any};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// The environment variable that names another `qevm` to judge.
pub const PROGRAM_VARIABLE: &str = "QEVM_BIN";
/// The hidden subcommand of `qevm-conformance` that is `qevm` itself, so that the judged program is always the one
/// built together with its judge.
pub const BUILT_IN: &str = "qevm";

/// How to start the `qevm` under judgement.
#[derive(Debug, Clone)]
pub struct Subject {
    program: PathBuf,
    leading: Vec<String>,
}

impl Subject {
    /// `$QEVM_BIN` when it is set, otherwise the `qevm` inside `judge`, the program `qevm-conformance`.
    pub fn new(judge: PathBuf) -> Subject {
        match std::env::var_os(PROGRAM_VARIABLE) {
            Some(program) => Subject { program: program.into(), leading: Vec::new() },
            None => Subject { program: judge, leading: vec![BUILT_IN.into()] },
        }
    }

    /// The command, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.leading).env_remove("RUST_BACKTRACE");
        command
    }

    /// Runs it to its end, whatever its exit status.
    ///
    /// # Errors
    /// It cannot start, or does not end in time.
    pub fn run<A: AsRef<std::ffi::OsStr>>(&self, arguments: &[A]) -> Result<Finished> {
        run_any(self.command().args(arguments), PATIENCE)
            .with_context(|| format!("running the qevm under judgement, {}", self.program.display()))
    }
}
