//! QEMU's own QMP package for Python, `qemu.qmp`, drives reference-vmm.

use super::endpoint::start_reference_process;
use super::monitor::Monitor;
use crate::patience::PATIENCE;
use crate::process::run;
use crate::roots::cache_dir;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package as on PyPI.
const PACKAGE: &str = "qemu.qmp==0.0.6";
const CLIENT: &str = include_str!("client.py");

/// A Python with the package.
#[derive(Debug)]
pub struct Python(PathBuf);

impl Python {
    /// Makes a virtual environment with the package in the cache, if it is not there yet.
    ///
    /// # Errors
    /// There is no Python with `venv`, or the package cannot be downloaded.
    pub fn install() -> Result<Python> {
        let dir = cache_dir()?.join("python").join(PACKAGE.replace("==", "-"));
        let python = dir.join("bin/python3");
        let stamp = dir.join("installed");
        if !stamp.exists() {
            let _ = fs::remove_dir_all(&dir);
            let parent = dir.parent().context("the cache has folders")?;
            fs::create_dir_all(parent)?;
            run(Command::new("python3").args(["-m", "venv"]).arg(&dir), PATIENCE).context("python3 -m venv")?;
            let mut pip = Command::new(&python);
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]);
            run(&mut pip, PATIENCE).with_context(|| format!("installing {PACKAGE}"))?;
            fs::write(&stamp, PACKAGE)?;
        }
        Ok(Python(python))
    }

    /// Lets it migrate a guest from one reference-vmm to another, and gives what it saw.
    ///
    /// # Errors
    /// A monitor does not start, or the client fails; its own words are in the error.
    pub fn drive(&self, program: &Monitor, scratch: &Path) -> Result<Value> {
        let arguments = |more: &[&str]| -> Vec<String> {
            ["-m", "64M"].iter().chain(more).map(|argument| argument.to_string()).collect()
        };
        let (_source, source) = start_reference_process(program, "python-source", &arguments(&[]), scratch)?;
        let incoming = arguments(&["--incoming", "defer"]);
        let (_destination, destination) = start_reference_process(program, "python-destination", &incoming, scratch)?;
        let script = scratch.join("client.py");
        fs::write(&script, CLIENT)?;
        let mut client = Command::new(&self.0);
        client.arg(&script).args([&source, &destination, &scratch.join("python.migration")]);
        let said = run(&mut client, PATIENCE).context("the client")?;
        serde_json::from_str(said.trim()).with_context(|| format!("the client said {said:?}"))
    }
}
