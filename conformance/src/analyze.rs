//! QEMU's own `analyze-migration.py` as an oracle for field values: the script of Debian's source package, run as a
//! program.

use crate::apt::{Apt, Kind};
use crate::patience::PATIENCE;
use crate::process::{run, run_any};
use crate::roots::{Suite, cache_dir};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "analyze-migration.py";
/// The suite whose source package the script is taken from; it reads the streams of every release here.
const SUITE: Suite = Suite::Trixie;

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
        run(Command::new("python3").arg("--version"), PATIENCE).context("analyze-migration.py needs python3")?;
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
            run(tar.args(["--wildcards", "--strip-components=2", &format!("*/scripts/{NAME}")]), PATIENCE)?;
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
    /// error is the exception by which the script gives up a stream that it cannot read.
    ///
    /// # Errors
    /// The script cannot be run, or prints something other than JSON.
    pub fn read(&self, stream: &Path) -> Result<Result<Value, String>> {
        let finished = run_any(&mut self.command(stream), PATIENCE)?;
        if !finished.success {
            return Ok(Err(cause(&finished.stderr).chars().take(200).collect()));
        }
        match serde_json::from_str(&finished.stdout) {
            Ok(value) => Ok(Ok(value)),
            Err(e) => bail!("{NAME} printed no JSON about {}: {e}", stream.display()),
        }
    }
}

/// The first exception that Python reports; those after it were raised while it was handled.
fn cause(report: &str) -> &str {
    let exception = |line: &&str| !line.starts_with([' ', '\t']) && !line.starts_with("Traceback ");
    report.lines().find(exception).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_the_first_exception() {
        let report = "Traceback (most recent call last):\n  File \"a\", line 1\n    read()\n\
                      Exception: Unknown section type: 5\n\n\
                      During handling of the above exception, another exception occurred:\n\n\
                      Traceback (most recent call last):\n  File \"a\", line 2\nException: dump\n";
        assert_eq!(cause(report), "Exception: Unknown section type: 5");
        assert_eq!(cause(""), "");
    }
}
