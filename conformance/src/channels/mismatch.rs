//! Both ends are set up legally, but not alike. The side that is qevm says so in time, and no guest is lost.

use super::qevm_to_qemu::{Target, send_arguments};
use super::receiver::Receiver;
use super::setup::{Setup, Transport};
use super::source::{Saved, Source};
use crate::patience::PATIENCE;
use crate::subject::Subject;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::time::Instant;

/// Seconds that qevm is told to wait.
const TOLD: u64 = 6;
/// Bitmap synchronisations after which an idle guest would have switched over long ago.
const CONVERGED: u64 = 20;

/// QEMU migrates a running guest into a `qevm receive` that was told `options`. It must end with an error that contains
/// `word`, and the guest must run on at the source.
///
/// # Errors
/// It accepts, hangs or is unclear; or the source's guest does not run afterwards.
pub fn at_receiver(
    source: &mut Source,
    subject: &Subject,
    setup: &Setup,
    options: &[&str],
    word: &str,
) -> Result<String> {
    if let Err(refusal) = setup.apply(&mut source.qemu, &source.flavor.profile())? {
        bail!("QEMU refuses the set-up: {refusal}");
    }
    let folder = source.folder()?;
    let mut options: Vec<String> = options.iter().map(ToString::to_string).collect();
    options.extend(["--timeout".into(), TOLD.to_string()]);
    let mut receiver = Receiver::start(subject, &folder, setup.transport, &options)?;
    let started = Instant::now();
    source.begin(&receiver.uri)?;
    let received = receiver.finish(PATIENCE)?;
    let seconds = started.elapsed().as_secs_f64();
    let error = &received.report["error"];
    let message = error["message"].as_str().unwrap_or(received.said.trim());
    // Channels that were turned away are named before.
    let mut lines = received.said.lines().rev();
    let last = lines.next().unwrap_or_default();
    let others = lines.all(|line| line.starts_with("qevm: dropped "));
    if received.code != Some(1) || !last.contains(word) || !others {
        bail!("qevm receive ends with {:?} and says {:?} without {word:?}", received.code, received.said);
    }
    let ended = |s: &Value| matches!(s["status"].as_str(), Some("failed" | "completed" | "cancelled"));
    let state = source.qemu.wait_migration(PATIENCE, ended).context("after qevm receive has ended")?;
    let status = source.qemu.execute("query-status", Value::Null)?;
    if state["status"] != "failed" || status["running"] != true {
        bail!("the source is {status} and its migration {} after {message:?}", state["status"]);
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(format!("after {seconds:.1} s: {message}; the guest runs on"))
}

/// QEMU migrates a running guest with `switchover-ack` into a `qevm receive` that acknowledges otherwise than QEMU
/// expects. The guest must stay at the source until the operator cancels, and run on; `qevm receive` must then end with
/// an error.
///
/// # Errors
/// The source switches over, or a side hangs after the cancellation.
pub fn no_switchover(source: &mut Source, subject: &Subject, setup: &Setup, options: &[&str]) -> Result<String> {
    if let Err(refusal) = setup.apply(&mut source.qemu, &source.flavor.profile())? {
        bail!("QEMU refuses the set-up: {refusal}");
    }
    let folder = source.folder()?;
    let options: Vec<String> = options.iter().map(ToString::to_string).collect();
    let mut receiver = Receiver::start(subject, &folder, setup.transport, &options)?;
    source.begin(&receiver.uri)?;
    let converged = |s: &Value| s["ram"]["dirty-sync-count"].as_u64().unwrap_or(0) > CONVERGED;
    let state = source.qemu.wait_migration(PATIENCE, |s| s["status"] == "completed" || converged(s))?;
    if state["status"] != "active" {
        bail!("the migration is {}", state["status"]);
    }
    source.qemu.execute("migrate_cancel", Value::Null)?;
    source.qemu.wait_migration(PATIENCE, |s| matches!(s["status"].as_str(), Some("cancelled" | "failed")))?;
    let received = receiver.finish(PATIENCE)?;
    let status = source.qemu.execute("query-status", Value::Null)?;
    if received.code != Some(1) || status["running"] != true {
        bail!("the source is {status}, qevm receive ends with {:?}: {}", received.code, received.said);
    }
    std::fs::remove_dir_all(&folder)?;
    let why = state["error-desc"].as_str().map_or(String::new(), |why| format!(" ({why})"));
    Ok(format!("no switchover after {} synchronisations{why}; the guest runs on", state["ram"]["dirty-sync-count"]))
}

/// `qevm send` plays a guest in one set-up into a QEMU with another. It must end with an error by itself.
///
/// # Errors
/// It claims success, hangs, or says nothing.
pub fn at_target(
    source: &mut Source,
    subject: &Subject,
    sent: &Setup,
    expected: &Setup,
    options: &[&str],
) -> Result<String> {
    let input = source.saved(Saved::Plain)?;
    let folder = source.folder()?;
    let mut target = Target::start(source, expected, &folder)?;
    let uri = target.listen(Transport::Unix, &folder)?;
    let started = Instant::now();
    let mut arguments = send_arguments(source, sent, &input, &uri, TOLD);
    arguments.extend(options.iter().map(Into::into));
    let finished = subject.run(&arguments)?;
    let seconds = started.elapsed().as_secs_f64();
    let said = finished.stderr.trim();
    let told: Value = serde_json::from_str(finished.stdout.trim()).unwrap_or_default();
    if finished.code != Some(1) || said.lines().count() != 1 || told["ok"] != false {
        bail!("qevm send ends with {}: {said:?} {:?}", finished.status, finished.stdout);
    }
    std::fs::remove_dir_all(&folder)?;
    let message = said.split_once(": ").map_or(said, |(_, rest)| rest);
    Ok(format!("after {seconds:.1} s: {message}"))
}
