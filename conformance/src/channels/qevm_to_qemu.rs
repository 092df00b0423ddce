//! `qevm send`, or a file that `qevm convert` wrote, is the source; QEMU is the destination.

use super::setup::{Setup, Transport};
use super::source::{Flush, Saved, Source, differing};
use crate::launch::Qemu;
use crate::oracle;
use crate::patience::PATIENCE;
use crate::process::Finished;
use crate::subject::Subject;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Long enough for a guest that cannot go on to crash QEMU or to stop.
const RUNNING_TIME: Duration = Duration::from_millis(100);

/// Gives the guest, saved in form `from`, to a new QEMU and judges what it loaded.
///
/// # Errors
/// QEMU or qevm refuses or fails, or the destination's RAM or status is wrong.
pub fn play(source: &mut Source, subject: &Subject, setup: &Setup, from: Saved) -> Result<String> {
    let profile = source.flavor.profile();
    if let Err(verdict) = setup.verdict(profile.qemu) {
        bail!("QEMU is said to refuse this: {}", verdict.reason);
    }
    let input = source.saved(from)?;
    let folder = source.folder()?;
    let mut target = Target::start(source, setup, &folder)?;
    let sent = match setup.transport.is_socket() {
        true => {
            let uri = target.listen(setup.transport, &folder)?;
            let finished = subject.run(&send_arguments(source, setup, &input, &uri, 30))?;
            let said: Value =
                finished.stdout.lines().last().and_then(|l| serde_json::from_str(l).ok()).unwrap_or_default();
            if finished.code != Some(0) || said["confirmed"] != true {
                bail!("qevm send ends with {}: {} {}", finished.status, finished.stderr.trim(), finished.stdout.trim());
            }
            said["bytes"].as_u64().unwrap_or(0)
        }
        false => {
            let path = folder.join("converted.qevm");
            let finished = convert(subject, setup, &input, &path)?;
            if finished.code != Some(0) {
                bail!("qevm convert ends with {}: {}", finished.status, finished.stderr.trim());
            }
            let uri = match setup.transport {
                Transport::Exec => format!("exec:cat {}", path.display()),
                _ => format!("file:{}", path.display()),
            };
            target.qemu.execute("migrate-incoming", json!({ "uri": uri }))?;
            std::fs::metadata(&path)?.len()
        }
    };
    target.loaded(source, &folder)?;
    target.qemu.quit();
    std::fs::remove_dir_all(&folder)?;
    Ok(format!("{sent} bytes, {} RAM blocks", source.ram.iter().filter(|b| b.sha256.is_some()).count()))
}

/// A destination QEMU that is set up and does not listen yet.
pub(super) struct Target {
    pub(super) qemu: Qemu,
}

impl Target {
    /// Starts one for a set-up that QEMU takes.
    pub(super) fn start(source: &Source, setup: &Setup, folder: &Path) -> Result<Target> {
        let mut arguments = source.flavor.arguments(source.scratch());
        arguments.extend(["-S", "-incoming", "defer"].map(String::from));
        let mut qemu = Qemu::start(&source.root, "target", &arguments, folder)?;
        if let Err(refusal) = setup.apply(&mut qemu, &source.flavor.profile())? {
            bail!("the destination refuses the set-up: {refusal}");
        }
        Ok(Target { qemu })
    }

    /// Makes it listen and gives its address.
    pub(super) fn listen(&mut self, transport: Transport, folder: &Path) -> Result<String> {
        if transport == Transport::Unix {
            let uri = format!("unix:{}", folder.join("t").display());
            self.qemu.execute("migrate-incoming", json!({ "uri": uri }))?;
            return Ok(uri);
        }
        self.qemu.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let state = self.qemu.migration()?;
        let port = state["socket-address"][0]["port"].as_str().context("the destination tells no port")?;
        Ok(format!("tcp:127.0.0.1:{port}"))
    }

    /// The guest has arrived: status and RAM are right, and it goes on.
    fn loaded(&mut self, source: &Source, folder: &Path) -> Result<()> {
        self.qemu.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
        let status = self.qemu.execute("query-status", Value::Null)?;
        if status["running"] != false || status["status"] != "paused" {
            bail!("the destination is {status} instead of paused");
        }
        let loaded = oracle::ram_blocks(&mut self.qemu, folder)?;
        if source.ram.iter().all(|b| b.sha256.is_none()) {
            bail!("no RAM block can be compared");
        }
        let wrong = differing(&source.ram, &loaded);
        if !wrong.is_empty() {
            bail!("RAM differs at the destination: {}", wrong.join(", "));
        }
        self.qemu.execute("cont", Value::Null)?;
        thread::sleep(RUNNING_TIME);
        let status = self.qemu.execute("query-status", Value::Null).context("after continuing the guest")?;
        if status["running"] != true {
            bail!("the guest does not go on: {status}");
        }
        Ok(())
    }
}

/// The arguments of `qevm send` for a set-up.
pub(super) fn send_arguments(
    source: &Source,
    setup: &Setup,
    input: &[OsString],
    uri: &str,
    timeout: u64,
) -> Vec<OsString> {
    let mut all: Vec<String> = ["send", "--json", "--timeout"].map(String::from).to_vec();
    all.push(timeout.to_string());
    all.extend(["--to".into(), source.flavor.suite.series().into()]);
    all.extend(form_arguments(setup));
    if setup.has("multifd") && source.flavor.flush == Flush::EachSection {
        all.extend(["--multifd-flush-after-each-section", "on"].map(String::from));
    }
    let mut all: Vec<OsString> = all.into_iter().map(OsString::from).collect();
    all.extend(input.iter().cloned());
    all.push(uri.into());
    all
}

/// What `qevm send` is told of the form.
pub(super) fn form_arguments(setup: &Setup) -> Vec<String> {
    let mut all = Vec::new();
    if setup.has("multifd") {
        all.extend(["--multifd-channels".into(), setup.channels.to_string()]);
        all.extend(["--multifd-compression".into(), setup.compression.into()]);
    }
    if let Some((_, level)) = setup.level {
        all.extend(["--multifd-level".into(), level.to_string()]);
    }
    if let Some(mode) = setup.zero_page {
        all.extend(["--zero-page-detection".into(), mode.into()]);
    }
    all
}

fn convert(subject: &Subject, setup: &Setup, input: &[OsString], path: &Path) -> Result<Finished> {
    let format = if setup.has("mapped-ram") { "mapped-ram" } else { "plain" };
    let mut arguments: Vec<OsString> = ["convert", "--format", format, "--out"].map(OsString::from).to_vec();
    arguments.push(path.into());
    arguments.extend(input.iter().cloned());
    subject.run(&arguments)
}
