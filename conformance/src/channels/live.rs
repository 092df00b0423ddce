//! A guest that dirties its memory under KVM goes QEMU → `qevm receive` → `qevm send` → QEMU. It checks itself: a page
//! with an older content than the guest left there is stale.

use super::qemu_to_qevm::{Told, files, options};
use super::receiver::Receiver;
use super::setup::Setup;
use super::{credentials, shape};
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::peer::secured::Version;
use crate::record::Recording;
use crate::roots::Root;
use crate::subject::Subject;
use crate::{judge, oracle};
use anyhow::{Context, Result, bail};
use reference_vmm::payload::{FW_CFG_NAME, IMAGE, Progress};
use serde_json::{Value, json};
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Bitmap synchronisations that a row needs: with two, a page dirtied again after being sent may go unnoticed.
const ROUNDS: u64 = 4;
/// How often a row is played while its rounds are too few, each time at half the bandwidth. The dirty pages of a guest
/// that gets little of the processor may fit into the shortest downtime there is (1 ms; with 0, QEMU 7.2 and 10.0 stop
/// the guest after two rounds).
const ATTEMPTS: usize = 3;
/// What the payload does: it rewrites 16 MiB without rest and re-reads 8 MiB of contents and 8 MiB of zeroes.
const PAYLOAD: &str = "dirty=16M hold=8M zero=8M verify=16384 report=100";
const MEMORY: &str = "64";

/// A live row.
#[derive(Debug, Clone)]
pub struct Live {
    /// How the guest leaves its source.
    pub leaves: Setup,
    /// How it arrives at its destination.
    pub arrives: Setup,
    /// `multifd-flush-after-each-section` is on at both ends.
    pub each_section: bool,
    /// Over TLS, of this version alone, with certificates at both ends.
    pub tls: Option<Version>,
    /// The first `max-bandwidth`, until there were enough rounds, bytes per second: below what the guest dirties,
    /// compressed.
    pub bandwidth: u64,
}

/// Plays it between two QEMUs.
///
/// # Errors
/// Anything goes wrong on the way, there were too few rounds, RAM differs, or the guest finds a stale page.
pub fn play(from: &Root, to: &Root, subject: &Subject, live: &Live) -> Result<String> {
    let bandwidths = iter::successors(Some(live.bandwidth), |last| Some(last / 2)).take(ATTEMPTS);
    for (repeats, bandwidth) in bandwidths.enumerate() {
        if let Some(outcome) = play_once(from, to, subject, live, bandwidth)? {
            return Ok(if repeats == 0 {
                outcome
            } else {
                format!("{outcome}; {repeats} times too few rounds before")
            });
        }
    }
    bail!("leaving: fewer than {ROUNDS} bitmap synchronisations, {ATTEMPTS} times")
}

/// Plays it at this `max-bandwidth`: nothing if there were too few rounds.
fn play_once(from: &Root, to: &Root, subject: &Subject, live: &Live, bandwidth: u64) -> Result<Option<String>> {
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let folder = scratch.path();
    fs::write(folder.join("payload.bin"), IMAGE)?;
    if let Some(version) = live.tls {
        credentials::issue(version, None, folder)?;
    }
    let Some((recording, last, rounds)) = leave(from, subject, live, bandwidth, folder).context("leaving")? else {
        return Ok(None);
    };
    let judgement = judge::judge(&recording, folder, subject)?;
    if !judgement.problems.is_empty() {
        bail!("{}", judgement.problems.join("; "));
    }
    let progress = arrive(to, subject, live, folder, &recording, last).context("arriving")?;
    Ok(Some(format!(
        "{rounds} synchronisations, {} bytes, {} RAM blocks; passes {} to {}, {} background rounds, {} stale pages",
        judgement.bytes, judgement.blocks, last.pass, progress.pass, progress.rounds, progress.stale
    )))
}

fn leave(
    root: &Root,
    subject: &Subject,
    live: &Live,
    bandwidth: u64,
    folder: &Path,
) -> Result<Option<(Recording, Progress, u64)>> {
    let profile = profile(root, live);
    let serial = folder.join("source.serial");
    let mut source = Qemu::start(root, "source", &arguments(live.each_section, folder, &serial, &[]), folder)?;
    seen(&serial, PATIENCE, |p| p.pass > 2)?;
    if let Err(refusal) = live.leaves.apply(&mut source, &profile)? {
        bail!("QEMU refuses the set-up: {refusal}");
    }
    source.set_parameters(&json!({ "downtime-limit": 1, "max-bandwidth": bandwidth }))?;
    let mut told = options(&live.leaves, Told::Channels, &profile);
    if let Some(version) = live.tls {
        credentials::arm(&mut source, "client", version, folder)?;
        told.extend(credentials::receiving(folder, credentials::SOURCE));
    }
    let mut receiver = Receiver::start(subject, folder, live.leaves.transport, &told)?;
    source.execute("migrate", json!({ "uri": receiver.uri }))?;
    source.wait_migration(PATIENCE, |s| syncs(s) >= ROUNDS || s["status"] == "completed")?;
    source.set_parameters(&json!({ "downtime-limit": 60_000, "max-bandwidth": 0 }))?;
    let state = source.wait_migration(PATIENCE, |s| s["status"] == "completed");
    let received = receiver.finish(PATIENCE)?;
    if received.code != Some(0) {
        bail!("qevm receive ends with {:?}: {} ({state:?})", received.code, received.said.trim());
    }
    let migration = state?;
    if syncs(&migration) < ROUNDS {
        return Ok(None);
    }
    let ram = oracle::ram_blocks(&mut source, folder)?;
    let last = lines(&serial)?.last().copied().context("the payload says nothing")?;
    source.quit();
    let files = files(&received.report, folder)?;
    let channels: Vec<PathBuf> = files.channels.iter().map(|name| folder.join(name)).collect();
    let shape = shape::differences(&folder.join(&files.main), &channels, &live.leaves, &profile)?;
    if !shape.is_empty() {
        bail!("not what was set up: {}", shape.join("; "));
    }
    let rounds = syncs(&migration);
    let recording = Recording {
        name: live.leaves.name(),
        qemu_version: root.version().into(),
        machine: "microvm".into(),
        accel: "kvm".into(),
        arguments: Vec::new(),
        capabilities: live.leaves.capabilities.iter().map(ToString::to_string).collect(),
        parameters: json!({}),
        files,
        migration,
        ram,
    };
    Ok(Some((recording, last, rounds)))
}

/// The guest goes on at a destination: it must pass over its hot pages and all others again, and find none stale.
fn arrive(
    root: &Root,
    subject: &Subject,
    live: &Live,
    folder: &Path,
    recording: &Recording,
    last: Progress,
) -> Result<Progress> {
    let serial = folder.join("target.serial");
    let incoming = ["-incoming", "defer"];
    let mut target = Qemu::start(root, "target", &arguments(live.each_section, folder, &serial, &incoming), folder)?;
    if let Err(refusal) = live.arrives.apply(&mut target, &profile(root, live))? {
        bail!("the destination refuses the set-up: {refusal}");
    }
    let uri = format!("unix:{}", folder.join("t").display());
    if let Some(version) = live.tls {
        credentials::arm(&mut target, "server", version, folder)?;
    }
    target.execute("migrate-incoming", json!({ "uri": uri }))?;
    let mut arguments: Vec<std::ffi::OsString> =
        ["send", "--json", "--to", root.suite().series()].map(Into::into).to_vec();
    arguments.extend(super::qevm_to_qemu::form_arguments(&live.arrives).into_iter().map(Into::into));
    if live.tls.is_some() {
        arguments.extend(credentials::sending(folder).into_iter().map(Into::into));
    }
    if live.each_section && live.arrives.has("multifd") {
        arguments.extend(["--multifd-flush-after-each-section".into(), "on".into()]);
    }
    arguments.extend(judge::input_arguments(recording, folder).into_iter().filter(|a| {
        // The return path says nothing about the guest.
        !a.to_string_lossy().contains("return-path")
    }));
    arguments.push(uri.into());
    let finished = subject.run(&arguments)?;
    if finished.code != Some(0) {
        bail!("qevm send ends with {}: {}", finished.status, finished.stderr.trim());
    }
    target.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
    let first = seen(&serial, PATIENCE, |_| true)?;
    let progress =
        seen(&serial, PATIENCE, |p| p.stale > 0 || p.pass >= first.pass + 3 && p.rounds >= first.rounds + 2)?;
    let status = target.execute("query-status", Value::Null)?;
    target.quit();
    if progress.stale > 0 || progress.pass <= last.pass || progress.tsc_back > 0 {
        let said = fs::read_to_string(&serial).unwrap_or_default();
        let stale: Vec<&str> = said.lines().filter(|l| l.contains("stale-page")).take(3).collect();
        bail!("{progress:?} after {last:?} at the source: {stale:?}");
    }
    if status["running"] != true {
        bail!("the destination is {status}");
    }
    Ok(progress)
}

fn profile(root: &Root, live: &Live) -> qevm_wire::Profile {
    let release = root.suite().series().parse().expect("a suite's series is a version");
    let mut profile = qevm_wire::Profile::new(release, "microvm");
    profile.multifd_flush_after_each_section |= live.each_section;
    profile
}

pub(super) fn arguments(each_section: bool, folder: &Path, serial: &Path, more: &[&str]) -> Vec<String> {
    let mut all: Vec<String> = ["-M", "microvm,accel=kvm", "-m", MEMORY, "-bios"].map(String::from).to_vec();
    all.push(folder.join("payload.bin").display().to_string());
    all.extend(["-fw_cfg".into(), format!("name={FW_CFG_NAME},string={PAYLOAD}")]);
    all.extend(["-chardev".into(), format!("file,id=qevm-serial,path={}", serial.display())]);
    all.extend(["-serial".into(), "chardev:qevm-serial".into()]);
    if each_section {
        all.extend(["-global".into(), "migration.multifd-flush-after-each-section=on".into()]);
    }
    all.extend(more.iter().map(ToString::to_string));
    all
}

fn syncs(state: &Value) -> u64 {
    state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

fn lines(serial: &Path) -> Result<Vec<Progress>> {
    let said = fs::read(serial).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    Ok(said.lines().filter_map(Progress::parse).collect())
}

/// Waits for a progress line.
pub(super) fn seen(serial: &Path, limit: Duration, wanted: impl Fn(&Progress) -> bool) -> Result<Progress> {
    let deadline = Instant::now() + limit;
    loop {
        let lines = lines(serial)?;
        if let Some(progress) = lines.iter().find(|p| wanted(p)) {
            return Ok(*progress);
        }
        if Instant::now() > deadline {
            bail!("the payload does not get on: {:?}", lines.last());
        }
        thread::sleep(Duration::from_millis(20));
    }
}
