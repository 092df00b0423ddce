//! Saving a machine, and loading it again.

use super::physical::{self, Marked};
use super::table::Exceptions;
use super::{Machine, expected};
use crate::launch::Qemu;
use crate::record::{Files, Recording};
use crate::reload::{self, Form};
use crate::roots::Root;
use crate::subject::Subject;
use crate::{exec, oracle};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How long firmware runs, so that registers and devices are not those of a reset.
const FIRMWARE_TIME: Duration = Duration::from_millis(700);
/// What is said of a QEMU that has died.
const DEAD: &str = "closed its monitor";
const MAIN: &str = "main.qevm";

/// A machine that was saved.
pub(super) struct Captured {
    pub(super) recording: Recording,
    pub(super) marked: Marked,
}

/// Starts a machine, marks its memory and saves it into `folder`.
///
/// # Errors
/// QEMU does not start, does not show its memory or does not save the guest.
pub(super) fn capture(machine: &Machine, root: &Root, folder: &Path, scratch: &Path) -> Result<Captured> {
    let mut arguments = arguments(machine);
    arguments.push("-S".into());
    let mut source = Qemu::start(root, "source", &arguments, scratch)?;
    if machine.runs {
        source.execute("cont", json!({}))?;
        thread::sleep(FIRMWARE_TIME);
        source.execute("stop", json!({}))?;
    }
    let marked = physical::mark(&mut source, machine.is_x86())?;
    let ram = oracle::ram_blocks(&mut source, scratch)?;
    let main = folder.join(MAIN);
    if main.exists() {
        std::fs::remove_file(&main)?;
    }
    exec::save(&mut source, &main)?;
    let migration = source.migration()?;
    source.quit();
    let recording = Recording {
        name: machine.name(),
        qemu_version: root.version().into(),
        machine: machine.arguments.get(1).copied().unwrap_or_default().into(),
        accel: "tcg".into(),
        arguments,
        capabilities: Vec::new(),
        parameters: Value::Null,
        files: Files { main: MAIN.into(), ..Default::default() },
        migration,
        ram,
    };
    Ok(Captured { recording, marked })
}

/// Converts the stream to each form that its QEMU loads, from that back to a plain stream, and loads both: how often
/// that went well, and what is listed as going wrong.
///
/// # Errors
/// QEMU does not load what qevm wrote, or not to the same RAM, and that is not listed as happening with its own stream;
/// or it is listed, and does not happen.
pub(super) fn load_again(
    machine: &Machine,
    root: &Root,
    recording: &Recording,
    folder: &Path,
    subject: &Subject,
) -> Result<(usize, Option<String>)> {
    let stream = folder.join(&recording.files.main);
    let load = |form: Form, stream: &Path| {
        let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
        let given = (stream, 0);
        reload::load_with(root, arguments(machine), form, given, &recording.ram, machine.runs, scratch.path())
    };
    let Exceptions { load: fails, dies, changes, .. } = machine.exceptions;
    // What happens with the stream as QEMU wrote it.
    let changes = changes.map(|block| vec![format!("{block} differs")]);
    let exception = match (dies, fails, &changes) {
        (Some(why), ..) => Some(format!("QEMU may die when it loads its own stream: {why}")),
        (None, None, None) => None,
        (None, Some(_), _) => expected("QEMU does not load its own stream", fails, &load(Form::Plain, &stream))?,
        (None, None, Some(changes)) => {
            let own = load(Form::Plain, &stream)?;
            ensure!(own == *changes, "loading QEMU's own stream: {own:?}, but listed is {changes:?}");
            Some(format!("loading QEMU's own stream, too: {}", changes.join("; ")))
        }
    };
    let mut from = stream;
    let mut loads = 0;
    for form in Form::of(machine.suite).iter().rev() {
        let to = folder.join(format!("{}.qevm", form.name()));
        convert(subject, *form, &from, &to)?;
        let loaded = load(*form, &to);
        if dies.is_some() && loaded.as_ref().is_err_and(|error| format!("{error:#}").contains(DEAD)) {
            from = to;
            continue;
        }
        if expected("QEMU does not load it", fails, &loaded)?.is_none() {
            let problems = loaded.with_context(|| format!("QEMU does not load the {} form", form.name()))?;
            let listed = changes.clone().unwrap_or_default();
            ensure!(problems == listed, "{} form: {}", form.name(), problems.join("; "));
            loads += 1;
        }
        from = to;
    }
    Ok((loads, exception))
}

fn arguments(machine: &Machine) -> Vec<String> {
    machine.arguments.iter().copied().chain(["-serial", "null"]).map(String::from).collect()
}

fn convert(subject: &Subject, form: Form, from: &Path, to: &Path) -> Result<()> {
    let mut arguments: Vec<OsString> = ["convert", "--force", "--format", form.name()].map(Into::into).to_vec();
    arguments.extend(["--out".into(), to.into(), from.into()]);
    let finished = subject.run(&arguments)?;
    let said = finished.stderr.lines().last().unwrap_or("nothing on standard error");
    ensure!(finished.success, "convert to {} ends with {}: {said}", form.name(), finished.status);
    Ok(())
}
