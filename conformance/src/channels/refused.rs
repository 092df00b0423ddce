//! Set-ups that are illegal: QEMU refuses them with a reason before a byte moves, and qevm refuses the same ones.

use super::qevm_to_qemu::form_arguments;
use super::setup::{Setup, Transport, refusal};
use super::source::{Saved, Source};
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::recorder::Recorder;
use crate::subject::Subject;
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::fs;

/// The source QEMU refuses, and qevm says why.
///
/// # Errors
/// One of both takes it, their reasons differ, or bytes moved.
pub fn at_source(source: &mut Source, setup: &Setup) -> Result<String> {
    let profile = source.flavor.profile();
    let ours = setup.verdict(profile.qemu);
    let theirs = match setup.apply(&mut source.qemu, &profile)? {
        Err(reason) => Err(reason),
        Ok(()) => migrate(source, setup)?,
    };
    let (ours, theirs) = match (ours, theirs) {
        (Err(ours), Err(theirs)) => (ours, theirs),
        (Err(ours), Ok(())) => bail!("QEMU takes what qevm says it refuses: {}", ours.reason),
        (Ok(()), Err(theirs)) => bail!("QEMU refuses what qevm says it takes: {theirs}"),
        (Ok(()), Ok(())) => bail!("neither refuses it"),
    };
    if ours.quoted && ours.reason != theirs {
        bail!("QEMU says {theirs:?}, qevm says that QEMU says {:?}", ours.reason);
    }
    Ok(match ours.reason == theirs {
        true => format!("both: {theirs}"),
        false => format!("QEMU: {theirs}; qevm: {}", ours.reason),
    })
}

/// Starts to migrate; the inner error is QEMU's refusal, after which nothing may have been written.
fn migrate(source: &mut Source, setup: &Setup) -> Result<Result<(), String>> {
    let folder = source.folder()?;
    let path = folder.join("main.qevm");
    let recorder = match setup.transport {
        Transport::Unix => Some(Recorder::unix(&folder, "main", None)?),
        Transport::Tcp => Some(Recorder::tcp(&folder, "main")?),
        _ => None,
    };
    let uri = match (&recorder, setup.transport) {
        (Some(recorder), _) => recorder.uri().to_string(),
        (None, Transport::Exec) => format!("exec:cat > {}", path.display()),
        (None, _) => format!("file:{}", path.display()),
    };
    let before = source.qemu.complaints();
    let mut refused = refusal(source.begin(&uri))?;
    if refused.is_ok() {
        let state = source
            .qemu
            .wait_migration(PATIENCE, |s| matches!(s["status"].as_str(), Some("failed" | "completed" | "active")))?;
        if state["status"] == "failed" {
            // 7.2 gives some reasons on its standard error alone.
            let reason = state["error-desc"].as_str().map(String::from);
            refused = Err(reason.unwrap_or_else(|| said_since(&source.qemu, &before)));
        }
    }
    let written = fs::metadata(&path).map_or(0, |m| m.len()) + recorder.as_ref().map_or(0, Recorder::forwarded);
    if refused.is_err() && written > 0 {
        bail!("QEMU refuses it, but {written} bytes were written");
    }
    Ok(refused)
}

/// What QEMU has printed and had not before.
fn said_since(qemu: &Qemu, before: &str) -> String {
    let now = qemu.complaints();
    match now.rsplit("; ").next() {
        Some(last) if now != before => last.to_string(),
        _ => "no reason given".into(),
    }
}

/// A destination QEMU answers to capabilities that are set after it listens as qevm says.
///
/// # Errors
/// Its answer is another one than qevm's.
pub fn late_at_destination(source: &mut Source, capabilities: &'static str) -> Result<String> {
    use qevm_wire::capability::{Capability, Context, check};
    let folder = source.folder()?;
    let mut arguments = source.flavor.arguments(source.scratch());
    arguments.extend(["-S", "-incoming", "defer"].map(String::from));
    let mut target = Qemu::start(&source.root, "target", &arguments, &folder)?;
    let uri = format!("unix:{}", folder.join("t").display());
    target.execute("migrate-incoming", json!({ "uri": uri }))?;
    let names = || capabilities.split_whitespace();
    let list: Vec<Value> = names().map(|name| json!({ "capability": name, "state": true })).collect();
    let theirs = refusal(target.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop))?;
    target.quit();
    let context = Context { incoming_started: true, ..Context::new(source.flavor.release()) };
    let on = names().filter_map(|name| name.parse::<Capability>().ok()).collect();
    match (check(on, &context).map_err(|error| error.to_string()), theirs) {
        (Err(ours), Err(theirs)) if ours == theirs => Ok(format!("both: {theirs}")),
        (Ok(()), Ok(())) => Ok("both take it".into()),
        (ours, theirs) => bail!("QEMU: {theirs:?}; qevm: {ours:?}"),
    }
}

/// `qevm send` refuses, as the destination would, without connecting to it.
///
/// # Errors
/// It does not, or connects.
pub fn by_send(source: &mut Source, subject: &Subject, setup: &Setup) -> Result<String> {
    if setup.verdict(source.flavor.release()).is_ok() {
        bail!("QEMU is not said to refuse this");
    }
    let input = source.saved(Saved::Plain)?;
    let folder = source.folder()?;
    let recorder = Recorder::unix(&folder, "never", None)?;
    let mut arguments = vec!["send".into(), "--to".into(), source.flavor.suite.series().into()];
    arguments.extend(form_arguments(setup).into_iter().map(std::ffi::OsString::from));
    arguments.extend(input);
    arguments.push(recorder.uri().into());
    let finished = subject.run(&arguments)?;
    if finished.code != Some(2) {
        bail!("qevm send ends with {} instead of exit status 2: {}", finished.status, finished.stderr.trim());
    }
    let connections = recorder.finish(PATIENCE)?;
    if !connections.is_empty() {
        bail!("qevm send connected before it refused");
    }
    Ok(format!("qevm: {}", finished.stderr.lines().next().unwrap_or_default()))
}
