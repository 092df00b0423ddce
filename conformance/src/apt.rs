//! Debian's packages by exact name, without touching the system: an `apt-get` with its own sources, state and cache.

use crate::process::run;
use crate::suite::Suite;
use anyhow::{Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The downloads of one suite are about 65 MB.
const TIMEOUT: Duration = Duration::from_secs(420);
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Another mirror than Debian's own.
const MIRROR_VARIABLE: &str = "QEVM_DEBIAN_MIRROR";
const MIRROR: &str = "http://deb.debian.org/debian";

/// What is downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Built packages, with everything they depend on.
    Binary,
    /// Source packages.
    Source,
}

/// A private apt for one suite.
#[derive(Debug)]
pub struct Apt {
    state: PathBuf,
    kind: Kind,
}

impl Apt {
    /// Makes its state in the folder `state` and fetches the suite's signed index.
    ///
    /// # Errors
    /// Debian's keyring is missing, or `apt-get update` fails.
    pub fn new(state: &Path, suite: Suite, kind: Kind) -> Result<Apt> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install Debian's package debian-archive-keyring");
        }
        for folder in ["etc/apt.conf.d", "etc/preferences.d", "lists/partial", "archives/partial", "sources"] {
            fs::create_dir_all(state.join(folder))?;
        }
        fs::write(state.join("status"), "")?;
        let mirror = std::env::var(MIRROR_VARIABLE).unwrap_or_else(|_| MIRROR.into());
        let line = match kind {
            Kind::Binary => format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n"),
            Kind::Source => format!("deb-src [signed-by={KEYRING}] {mirror} {suite} main\n"),
        };
        fs::write(state.join("etc/sources.list"), line)?;
        fs::write(state.join("apt.conf"), configuration(state))?;
        let apt = Apt { state: state.to_path_buf(), kind };
        run(apt.command().arg("update"), TIMEOUT)?;
        Ok(apt)
    }

    /// Downloads the named packages and gives all files that came.
    ///
    /// # Errors
    /// A package is unknown, its dependencies cannot be resolved, or the download fails.
    pub fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let mut command = self.command();
        let folder = match self.kind {
            Kind::Binary => {
                command.args(["install", "--download-only", "--yes"]);
                "archives"
            }
            Kind::Source => {
                command.args(["source", "--download-only"]).current_dir(self.state.join("sources"));
                "sources"
            }
        };
        run(command.args(packages), TIMEOUT)?;
        let mut files = Vec::new();
        for entry in fs::read_dir(self.state.join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb" || e == "xz") {
                files.push(path);
            }
        }
        Ok(files)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.env("APT_CONFIG", self.state.join("apt.conf")).env("DEBIAN_FRONTEND", "noninteractive");
        command.env("LC_ALL", "C");
        command
    }
}

/// Nothing of the host is seen: the list of installed packages is empty, so that dependencies come along.
fn configuration(state: &Path) -> String {
    let state = state.display();
    format!(
        "Dir \"{state}/\";\nDir::Etc \"{state}/etc/\";\nDir::Etc::Parts \"apt.conf.d\";\nDir::State \"{state}/\";\n\
         Dir::State::status \"{state}/status\";\nDir::State::lists \"lists/\";\nDir::Cache \"{state}/\";\n\
         Dir::Cache::archives \"archives/\";\nDir::Log \"{state}/\";\nAPT::Architecture \"amd64\";\n\
         APT::Architectures {{ \"amd64\"; }};\nAPT::Install-Recommends \"false\";\nAPT::Sandbox::User \"root\";\n\
         APT::Get::AllowUnauthenticated \"false\";\nAcquire::Languages \"none\";\n\
         Acquire::Check-Valid-Until \"false\";\nAcquire::Retries \"3\";\nAcquire::http::Timeout \"30\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\nDebug::NoLocking \"true\";\n"
    )
}
