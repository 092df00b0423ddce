//! What is run in the lab, with what, and what becomes of it.

use super::boot::Boot;
use super::vfio;
use anyhow::Result;
use serde_json::Value;
use std::path::PathBuf;

/// What is run in the lab.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub name: String,
    pub(super) command: String,
    /// The driver's plan, for a job with VFIO devices.
    pub(super) plan: Option<String>,
    pub(super) boot: Boot,
    pub(super) judge: Judge,
}

#[derive(Debug, Clone)]
pub(super) enum Judge {
    /// By what it prints.
    Printed(fn(&str) -> Result<Value>),
    /// By what the driver saw.
    Case(Box<vfio::Case>),
}

/// What became of a job.
#[derive(Debug)]
pub struct Outcome {
    /// The job's name.
    pub name: String,
    /// Numbers, if it holds; otherwise why it does not.
    pub result: Result<Value>,
    /// What it printed.
    pub said: String,
}

impl From<vfio::Case> for Job {
    fn from(case: vfio::Case) -> Job {
        let plan = serde_json::to_string(&case.plan()).unwrap_or_default();
        Job {
            name: case.name.clone(),
            command: format!("/driver /plans/{}", case.name),
            plan: Some(plan),
            boot: case.boot,
            judge: Judge::Case(Box::new(case)),
        }
    }
}

/// The programs that go into the lab, as far as a job runs them.
#[derive(Debug)]
pub struct Programs {
    /// The workspace that they were built in.
    pub workspace: PathBuf,
    /// `reference-vmm`.
    pub monitor: Option<PathBuf>,
    /// Its tests on KVM.
    pub tests: Option<PathBuf>,
    /// The program that takes guests with VFIO devices from one monitor to another.
    pub driver: Option<PathBuf>,
    /// This program, which plays rows of its tables there.
    pub conformance: Option<PathBuf>,
    /// What Linux guests use their VFIO devices with.
    pub linux_guest: Option<PathBuf>,
}
