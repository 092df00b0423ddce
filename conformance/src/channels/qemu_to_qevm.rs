//! QEMU is the source; `qevm receive`, or `qevm verify` of the file that QEMU wrote, is the destination.

use super::receiver::Receiver;
use super::setup::{Setup, Transport};
use super::shape;
use super::source::Source;
use crate::patience::PATIENCE;
use crate::record::{Files, Recording};
use crate::subject::Subject;
use crate::{exec, judge};
use anyhow::{Context, Result, bail};
use qevm_wire::Profile;
use qevm_wire::profile::SwitchoverAckFlow;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What `qevm receive` is told beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Nothing: it recognises what comes.
    Nothing,
    /// The number of channels and the compression.
    Channels,
}

/// Migrates the source's guest and judges what arrived. What does not hold is an error; the text tells what arrived.
///
/// # Errors
/// QEMU refuses or fails, or what qevm says is not what QEMU says.
pub fn play(source: &mut Source, subject: &Subject, setup: &Setup, told: Told) -> Result<String> {
    let profile = source.flavor.profile();
    if let Err(verdict) = setup.verdict(profile.qemu) {
        bail!("QEMU is said to refuse this: {}", verdict.reason);
    }
    if let Err(refusal) = setup.apply(&mut source.qemu, &profile)? {
        bail!("QEMU refuses the set-up: {refusal}");
    }
    let folder = source.folder()?;
    let (files, state) = match setup.transport.is_socket() {
        true => into_receiver(source, subject, setup, told, &folder)?,
        false => into_file(source, setup, &folder)?,
    };
    let recording = recording(source, setup, files, state);
    let summary = judged(&recording, &folder, subject, setup, source)?;
    std::fs::remove_dir_all(&folder)?;
    Ok(summary)
}

fn into_receiver(
    source: &mut Source,
    subject: &Subject,
    setup: &Setup,
    told: Told,
    folder: &Path,
) -> Result<(Files, Value)> {
    let mut receiver =
        Receiver::start(subject, folder, setup.transport, &options(setup, told, &source.flavor.profile()))?;
    let uri = receiver.uri.clone();
    let state = source.migrate(&uri);
    let received = match (receiver.finish(PATIENCE), &state) {
        (Err(e), Err(theirs)) => bail!("{theirs:#}; {e:#}"),
        (received, _) => received?,
    };
    if received.code != Some(0) {
        let code = received.code;
        return Err(state.err().unwrap_or_else(|| anyhow::anyhow!("the source completed")))
            .context(format!("qevm receive ends with {code:?}: {}", received.said.trim()));
    }
    Ok((files(&received.report, folder)?, state?))
}

/// The options of `qevm receive` for a set-up.
pub(super) fn options(setup: &Setup, told: Told, profile: &Profile) -> Vec<String> {
    let mut options: Vec<String> = ["--timeout", "30"].map(String::from).to_vec();
    if told == Told::Channels {
        let channels = if setup.has("multifd") { setup.channels } else { 0 };
        options.extend(["--multifd-channels".into(), channels.to_string()]);
        options.extend(["--multifd-compression".into(), setup.compression.into()]);
    }
    // A source that counts its devices' requests waits for no ack: it has no such device.
    if setup.has("switchover-ack") && profile.switchover_ack == Some(SwitchoverAckFlow::Legacy) {
        options.push("--switchover-ack".into());
    }
    options
}

/// The files that `qevm receive` says it saved.
pub(super) fn files(report: &Value, folder: &Path) -> Result<Files> {
    let listed: Vec<String> = serde_json::from_value(report["files"].clone()).context("qevm receive lists no files")?;
    let name = |path: &String| PathBuf::from(path).file_name().map(|n| n.to_string_lossy().into_owned());
    let mut files = Files::default();
    for name in listed.iter().filter_map(name) {
        if !folder.join(&name).exists() {
            bail!("qevm receive lists {name}, which is not there");
        }
        match name.rsplit_once('.') {
            Some((_, "return-path")) => files.return_path = Some(name),
            Some((_, last)) if last.starts_with("channel-") => files.channels.push(name),
            _ => files.main = name,
        }
    }
    Ok(files)
}

fn into_file(source: &mut Source, setup: &Setup, folder: &Path) -> Result<(Files, Value)> {
    let path = folder.join("main.qevm");
    let uri = match setup.transport {
        Transport::Exec => exec::uri(&path),
        _ => format!("file:{}", path.display()),
    };
    let state = source.migrate(&uri)?;
    exec::finish(&path)?;
    Ok((Files { main: "main.qevm".into(), ..Files::default() }, state))
}

/// What happened, as the judge of recordings takes it.
pub(super) fn recording(source: &Source, setup: &Setup, files: Files, migration: Value) -> Recording {
    Recording {
        name: setup.name(),
        qemu_version: source.root.version().into(),
        machine: source.flavor.machine.into(),
        accel: "tcg".into(),
        arguments: source.flavor.arguments(source.scratch()),
        capabilities: setup.capabilities.iter().map(ToString::to_string).collect(),
        parameters: json!({}),
        files,
        migration,
        ram: source.ram.clone(),
    }
}

fn judged(recording: &Recording, folder: &Path, subject: &Subject, setup: &Setup, source: &Source) -> Result<String> {
    let mut judgement = judge::judge(recording, folder, subject)?;
    let files = &recording.files;
    let channels: Vec<PathBuf> = files.channels.iter().map(|name| folder.join(name)).collect();
    let profile = source.flavor.profile();
    let shape = shape::differences(&folder.join(&files.main), &channels, setup, &profile)?;
    judgement.problems.extend(shape.into_iter().map(|what| format!("not what was set up: {what}")));
    if setup.has("return-path") && files.return_path.is_none() {
        judgement.problems.push("the return path was not used".into());
    }
    if !judgement.problems.is_empty() {
        bail!("{}", judgement.problems.join("; "));
    }
    let (bytes, blocks) = (judgement.bytes, judgement.blocks);
    Ok(format!("{bytes} bytes, {blocks} RAM blocks, {} bytes by pmemsave", judgement.pmemsave_bytes))
}
