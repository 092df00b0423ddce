//! One question, and what it is asked with.

use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use crate::subject::Subject;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;

/// What a trial is played with.
#[derive(Debug)]
pub struct TrialEnv<'b> {
    pub(super) roots: &'b BTreeMap<Suite, Root>,
    /// The qevm under judgement.
    pub subject: &'b Subject,
    /// An empty folder of the trial's own.
    pub scratch: &'b Path,
}

impl TrialEnv<'_> {
    /// The QEMU of `suite`, which the trial has said it needs.
    ///
    /// # Errors
    /// It has not.
    pub fn root(&self, suite: Suite) -> Result<&Root> {
        self.roots.get(&suite).ok_or_else(|| anyhow::anyhow!("the trial does not say that it needs {suite}"))
    }
}

type Play = Box<dyn Fn(&TrialEnv<'_>) -> Result<String>>;

/// One question.
pub struct Trial {
    /// Unique: what it is about, releases, what is special.
    pub name: String,
    pub(super) suites: Vec<Suite>,
    pub(super) kvm: bool,
    pub(super) play: Play,
}

impl Trial {
    pub(super) fn new(
        name: String,
        suites: &[Suite],
        kvm: bool,
        play: impl Fn(&TrialEnv<'_>) -> Result<String> + 'static,
    ) -> Trial {
        Trial { name, suites: suites.to_vec(), kvm, play: Box::new(play) }
    }
}

/// How QEMU's options and the names of trials call an accelerator.
pub(super) fn accel_name(accel: Accel) -> &'static str {
    match accel {
        Accel::Tcg => "tcg",
        Accel::Kvm => "kvm",
    }
}
