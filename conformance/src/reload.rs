//! Real QEMU loads what qevm writes: a recording converted by `qevm convert` must bring up the same guest.

use crate::judge::input_arguments;
use crate::launch::Qemu;
use crate::oracle;
use crate::patience::PATIENCE;
use crate::record::{self, Recording};
use crate::roots::{Root, Suite};
use crate::scenario::{Guest, Scenario};
use crate::subject::Subject;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Long enough for a guest that cannot go on to crash QEMU or to stop.
const RUNNING_TIME: Duration = Duration::from_millis(300);
/// With these the stream does not hold all that the guest needs, or needs a destination set up in another way.
const NOT_ALONE: [&str; 2] = ["x-ignore-shared", "dirty-bitmaps"];

/// A form in which qevm writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Every page on the main channel.
    Plain,
    /// Every page at its own place; QEMU loads it since 9.0.
    MappedRam,
}

impl Form {
    /// The forms that the QEMU of `suite` loads.
    pub fn of(suite: Suite) -> &'static [Form] {
        match suite {
            Suite::Bullseye | Suite::Bookworm => &[Form::Plain],
            Suite::Trixie | Suite::Sid => &[Form::Plain, Form::MappedRam],
        }
    }

    /// As `qevm convert` calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Form::Plain => "plain",
            Form::MappedRam => "mapped-ram",
        }
    }
}

/// Whether the recordings of a scenario can be loaded on their own.
pub fn applies(scenario: &Scenario) -> bool {
    let alone = !scenario.capabilities.iter().any(|c| NOT_ALONE.contains(c));
    alone && scenario.reload && scenario.migrate.is_empty()
}

/// How a QEMU took what it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// The same guest came up.
    Same,
    /// The same happens with the stream that QEMU wrote itself: some devices change their memory when they are loaded,
    /// and some cannot be loaded at all.
    NoBetterThanItsOwn(Vec<String>),
    /// Something is wrong with what qevm wrote.
    Wrong(Vec<String>),
}

/// Converts the recording into `form` and loads it with the QEMU that made it.
///
/// # Errors
/// qevm or QEMU cannot be started.
pub fn reload(
    scenario: &Scenario,
    form: Form,
    root: &Root,
    recording: &Recording,
    folder: &Path,
    subject: &Subject,
) -> Result<Taken> {
    let out = folder.join("converted.qevm");
    let mut arguments: Vec<OsString> =
        ["convert", "--force", "--format", form.name(), "--out"].map(Into::into).to_vec();
    arguments.push(out.clone().into());
    arguments.extend(input_arguments(recording, folder));
    let finished = subject.run(&arguments)?;
    if !finished.success {
        let said = finished.stderr.lines().last().unwrap_or("nothing on standard error");
        return Ok(Taken::Wrong(vec![format!("convert to {} ends with {}: {said}", form.name(), finished.status)]));
    }
    let problems = match load(scenario, form, root, recording, &out, 0) {
        Ok(problems) if problems.is_empty() => return Ok(Taken::Same),
        Ok(problems) => problems,
        Err(e) => vec![format!("QEMU does not load it: {e:#}")],
    };
    let own = own_stream(scenario, root, recording, folder);
    let told = |problems: Vec<String>| problems.into_iter().map(|p| format!("{} form: {p}", form.name())).collect();
    Ok(match own {
        Some(Ok(own)) if own == problems => Taken::NoBetterThanItsOwn(told(problems)),
        // What a QEMU that cannot go on says last depends on the moment.
        Some(Err(_)) => Taken::NoBetterThanItsOwn(told(problems)),
        _ => Taken::Wrong(told(problems)),
    })
}

/// What happens with the stream as QEMU wrote it, where it is one that QEMU can be given again.
fn own_stream(scenario: &Scenario, root: &Root, recording: &Recording, folder: &Path) -> Option<Result<Vec<String>>> {
    let files = &recording.files;
    let alone = files.channels.is_empty() && files.recovery.is_none() && recording.capabilities.is_empty();
    let stream = files.main.ends_with(".qevm");
    let main = folder.join(&files.main);
    (alone && stream).then(|| load(scenario, Form::Plain, root, recording, &main, files.offset))
}

/// Loads `stream` from byte `offset` on, and gives what is wrong then.
fn load(
    scenario: &Scenario,
    form: Form,
    root: &Root,
    recording: &Recording,
    stream: &Path,
    offset: u64,
) -> Result<Vec<String>> {
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let scratch = scratch.path();
    record::make_inputs(root, scratch)?;
    let arguments = record::arguments(scenario, scratch)?;
    let goes_on = !matches!(scenario.guest, Guest::Idle);
    load_with(root, arguments, form, (stream, offset), &recording.ram, goes_on, scratch)
}

/// Loads a stream from a byte on with a QEMU that is started with `arguments`, and gives what is wrong then: RAM that
/// is not as in `truth`, or a guest that should go on and does not.
///
/// # Errors
/// QEMU does not start, or does not load it.
pub(crate) fn load_with(
    root: &Root,
    mut arguments: Vec<String>,
    form: Form,
    (stream, offset): (&Path, u64),
    truth: &[oracle::Block],
    goes_on: bool,
    scratch: &Path,
) -> Result<Vec<String>> {
    arguments.extend(["-S", "-incoming", "defer"].map(String::from));
    let mut target = Qemu::start(root, "target", &arguments, scratch)?;
    let uri = match form {
        Form::Plain => format!("exec:tail -c +{} {}", offset + 1, stream.display()),
        Form::MappedRam => {
            target.set_capabilities(&["mapped-ram"])?;
            format!("file:{}", stream.display())
        }
    };
    target.execute("migrate-incoming", json!({ "uri": uri }))?;
    target.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
    let loaded = oracle::ram_blocks(&mut target, scratch)?;
    let mut problems = Vec::new();
    let mut compared = 0;
    for truth in truth.iter().filter(|b| b.sha256.is_some()) {
        let block = loaded.iter().find(|b| b.name == truth.name);
        compared += 1;
        if block.is_none_or(|b| b.sha256 != truth.sha256) {
            problems.push(format!("{} differs", truth.name));
        }
    }
    if compared == 0 && !truth.is_empty() {
        bail!("no RAM block can be compared");
    }
    if goes_on {
        target.execute("cont", Value::Null)?;
        thread::sleep(RUNNING_TIME);
        let status = target.execute("query-status", Value::Null).context("after continuing the guest")?;
        if status["running"] != true {
            problems.push(format!("the guest does not go on: {status}"));
        }
    }
    target.quit();
    Ok(problems)
}
