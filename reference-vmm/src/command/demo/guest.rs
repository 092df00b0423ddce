//! One of the two monitor processes, and what its guest prints.

use anyhow::{Context, bail, ensure};
use reference_vmm::payload::{FW_CFG_NAME, Progress};
use reference_vmm::qmp::Client;
use serde_json::Value;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A `reference-vmm run` of this very program, killed when this is dropped.
pub(super) struct Guest {
    name: &'static str,
    process: Child,
    qmp: Client,
    console: PathBuf,
    log: PathBuf,
}

impl Guest {
    #[expect(clippy::too_many_arguments, reason = "they are those of a command line")]
    pub(super) fn start(
        name: &'static str,
        directory: &Path,
        memory: u64,
        cpus: usize,
        accel: &str,
        payload: &str,
        incoming: Option<&str>,
        patience: Duration,
    ) -> anyhow::Result<Guest> {
        let file = |suffix: &str| directory.join(format!("{name}.{suffix}"));
        let (console, socket, log) = (file("console"), file("qmp"), file("log"));
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        command.arg("run").args([
            "--memory",
            &format!("{}K", memory >> 10),
            "--smp",
            &cpus.to_string(),
            "--accel",
            accel,
        ]);
        command.arg("--serial").arg(format!("file:{}", console.display()));
        command.arg("--fw-cfg").arg(format!("name={FW_CFG_NAME},string={payload}"));
        command.arg("--qmp").arg(format!("unix:{}", socket.display()));
        if let Some(incoming) = incoming {
            command.args(["--incoming", incoming]);
        }
        end_with_parent(&mut command);
        let errors = File::create(&log).context("cannot write a log")?;
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn()?;
        let deadline = Instant::now() + patience;
        while !socket.exists() {
            if process.try_wait()?.is_some() || Instant::now() > deadline {
                let _ = process.kill();
                bail!("the {name} does not start: {}", std::fs::read_to_string(&log).unwrap_or_default().trim());
            }
            std::thread::sleep(super::POLL);
        }
        match Client::connect(&socket, patience) {
            Ok(qmp) => Ok(Guest { name, process, qmp, console, log }),
            Err(error) => {
                let _ = process.kill();
                Err(error.into())
            }
        }
    }

    /// Runs a QMP command. If the process is gone, its last words are the error.
    pub(super) fn qmp(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.qmp.execute(command, arguments).with_context(|| {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            format!("at the {}: {}", self.name, log.trim())
        })
    }

    /// Where the incoming migration is waited for.
    pub(super) fn incoming_uri(&mut self) -> anyhow::Result<String> {
        let migration = self.qmp("query-migrate", Value::Object(Default::default()))?;
        let address = &migration["socket-address"][0];
        match (address["path"].as_str(), address["host"].as_str(), address["port"].as_str()) {
            (Some(path), ..) => Ok(format!("unix:{path}")),
            (_, Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
            _ => bail!("the {} does not say where it listens: {migration}", self.name),
        }
    }

    /// What the guest has printed here.
    pub(super) fn text(&self) -> anyhow::Result<Vec<u8>> {
        std::fs::read(&self.console).with_context(|| format!("cannot read the console of the {}", self.name))
    }

    fn progress(&self) -> anyhow::Result<Vec<Progress>> {
        Ok(String::from_utf8_lossy(&self.text()?).lines().filter_map(Progress::parse).collect())
    }

    /// Waits until the guest has completed `passes` passes since its start.
    pub(super) fn wait_for_passes(&mut self, passes: u64, patience: Duration) -> anyhow::Result<Progress> {
        self.wait("complete its passes", patience, |progress| progress.pass >= passes)
    }

    /// Waits until the guest has completed `passes` more passes than `before`, and has checked all its other pages.
    pub(super) fn wait_for_healthy_passes(
        &mut self,
        before: &Progress,
        passes: u64,
        cpus: usize,
        patience: Duration,
    ) -> anyhow::Result<Progress> {
        let arrived = self.wait("print something", patience, |_| true)?;
        // The pass and the round under way may have begun before the migration.
        let rounds = arrived.rounds + cpus as u64;
        let pass = before.pass.max(arrived.pass) + passes;
        let after = self.wait("complete further passes", patience, |p| p.pass >= pass && p.rounds > rounds)?;
        ensure!(after.stale == 0, "the guest found {} stale pages", after.stale);
        ensure!(after.tsc_back == 0, "the guest's clock ran backwards {} times", after.tsc_back);
        Ok(after)
    }

    fn wait(&mut self, what: &str, patience: Duration, wanted: impl Fn(&Progress) -> bool) -> anyhow::Result<Progress> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(progress) = self.progress()?.into_iter().find(|progress| wanted(progress)) {
                return Ok(progress);
            }
            if self.process.try_wait()?.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("the guest at the {} did not {what}; {}", self.name, log.trim());
            }
            std::thread::sleep(super::POLL);
        }
    }

    /// Ends the process and gives everything that the guest printed here.
    pub(super) fn quit(mut self) -> anyhow::Result<Vec<u8>> {
        self.qmp("quit", Value::Object(Default::default()))?;
        let status = self.process.wait().context("cannot wait for a monitor to end")?;
        ensure!(status.success(), "the {} ended with {status}", self.name);
        self.text()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process is not to outlive this one, however this one ends.
fn end_with_parent(command: &mut Command) {
    let set_signal = || Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?);
    // SAFETY: between fork and exec the closure makes one system call, which is safe there, and allocates nothing.
    unsafe { command.pre_exec(set_signal) };
}
