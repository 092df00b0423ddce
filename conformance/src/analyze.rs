//! QEMU's own `analyze-migration.py` as an oracle for field values: the script of Debian's source package, run as a
//! program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::apt::{Apt, Kind};
use crate::process::{run, run_any};
use crate::roots::{Suite, cache_dir};

const NAME: &str = "analyze-migration.py";
/// The suite whose source package the script is taken from; it reads the streams of every release here.
const SUITE: Suite = Suite::Trixie;
const TIMEOUT: Duration = Duration::from_secs(120);

/// The script and the Python that runs it.
#[derive(Debug, Clone)]
pub struct Script {
    path: PathBuf,
}

impl Script {
    /// Fetches the script (40 MB of sources, of which one file is kept) unless it is in the cache.
    ///
    /// # Errors
    /// No `python3`, or what `apt-get` and `tar` report.
    pub fn install() -> Result<Script> {
        run(Command::new("python3").arg("--version"), TIMEOUT).context("analyze-migration.py needs python3")?;
        let folder = cache_dir()?.join("analyze-migration");
        let path = folder.join(NAME);
        if !path.exists() {
            fs::create_dir_all(&folder)?;
            let scratch = tempfile::Builder::new().prefix("source-").tempdir_in(&folder)?;
            let apt = Apt::new(scratch.path(), SUITE, Kind::Source)?;
            let archives = apt.download(&["qemu"])?;
            let archive = archives.iter().find(|f| f.to_string_lossy().contains(".orig.tar."));
            let archive = archive.context("the source package has no upstream archive")?;
            let mut tar = Command::new("tar");
            tar.arg("--extract").arg("--file").arg(archive).arg("--directory").arg(scratch.path());
            run(tar.args(["--wildcards", "--strip-components=2", &format!("*/scripts/{NAME}")]), TIMEOUT)?;
            fs::rename(scratch.path().join(NAME), &path)?;
        }
        Ok(Script { path })
    }

    /// The command that reads `stream`.
    pub fn command(&self, stream: &Path) -> Command {
        let mut command = Command::new("python3");
        command.arg(&self.path).arg("--file").arg(stream);
        command
    }

    /// What the script makes of `stream`: an object with one member `idstr (section id)` for each section. The inner
    /// error is the last line that the script prints about a stream that it cannot read.
    ///
    /// # Errors
    /// The script cannot be run, or prints something other than JSON.
    pub fn read(&self, stream: &Path) -> Result<Result<Value, String>> {
        let finished = run_any(&mut self.command(stream), TIMEOUT)?;
        if !finished.success {
            let last = finished.stderr.lines().last().unwrap_or_default();
            return Ok(Err(last.chars().take(200).collect()));
        }
        match serde_json::from_str(&finished.stdout) {
            Ok(value) => Ok(Ok(value)),
            Err(e) => bail!("{NAME} printed no JSON about {}: {e}", stream.display()),
        }
    }
}
