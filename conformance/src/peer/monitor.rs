//! Which reference-vmm is under judgement.

use std::path::{Path, PathBuf};

/// The environment variable that names another `reference-vmm` to judge.
const PROGRAM_VARIABLE: &str = "REFERENCE_VMM_BIN";
/// The hidden subcommand of `qevm-conformance` that is `reference-vmm` itself.
pub const BUILT_IN: &str = "reference-vmm";

/// How to start the reference-vmm under judgement.
#[derive(Debug, Clone)]
pub struct Monitor {
    pub(super) program: PathBuf,
    pub(super) leading: Vec<String>,
    judge: PathBuf,
}

impl Monitor {
    /// `$REFERENCE_VMM_BIN` when it is set, otherwise the one inside `judge`, the program `qevm-conformance`.
    pub fn new(judge: PathBuf) -> Monitor {
        match std::env::var_os(PROGRAM_VARIABLE) {
            Some(program) => Monitor { program: program.into(), leading: Vec::new(), judge },
            None => Monitor { program: judge.clone(), leading: vec![BUILT_IN.into()], judge },
        }
    }

    /// The reference-vmm at `program`, which the one under judgement is compared with.
    pub fn other(&self, program: PathBuf) -> Monitor {
        Monitor { program, leading: Vec::new(), judge: self.judge.clone() }
    }

    /// The same in a network namespace.
    pub(crate) fn inside(&self, namespace: &str) -> Monitor {
        let mut leading = ["netns", "exec", namespace].map(String::from).to_vec();
        leading.push(self.program.display().to_string());
        leading.extend(self.leading.iter().cloned());
        Monitor { program: "ip".into(), leading, judge: self.judge.clone() }
    }

    /// The program `qevm-conformance`.
    pub(super) fn judge(&self) -> &Path {
        &self.judge
    }
}
