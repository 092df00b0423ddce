//! One of two QEMUs: it writes what it is, or says whether it loads what the other has written.

use super::question::TrialEnv;
use crate::channels::receiver::Receiver;
use crate::channels::setup::Transport;
use crate::exec;
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::roots::Suite;
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// A guest that boots under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

/// What a destination does with a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The guest arrives.
    Loads,
    /// It is refused.
    Fails,
}
/// One of the two QEMUs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side<'s> {
    pub(crate) suite: Suite,
    /// The machine, the accelerator if it is not TCG, and arguments, separated by blanks.
    pub(crate) arguments: &'s str,
    /// Capabilities, separated by blanks.
    pub(crate) capabilities: &'s str,
}

pub(crate) const fn side(suite: Suite, arguments: &str) -> Side<'_> {
    Side { suite, arguments, capabilities: "" }
}

pub(crate) const fn with<'s>(suite: Suite, arguments: &'s str, capabilities: &'s str) -> Side<'s> {
    Side { suite, arguments, capabilities }
}

/// Lets a QEMU that was never started write its stream.
pub(crate) fn write(env: &TrialEnv<'_>, side: &Side<'_>, name: &str, file: &Path) -> Result<()> {
    let mut qemu = start(env, side, name, &["-S"])?;
    if side.capabilities.contains("postcopy-ram") {
        // With postcopy on, a source waits until its destination says goodbye.
        let folder = env.scratch.join(format!("{name}.received"));
        std::fs::create_dir(&folder)?;
        let options = ["--timeout", "300"].map(String::from);
        let mut receiver = Receiver::start(env.subject, &folder, Transport::Unix, &options)?;
        qemu.execute("migrate", json!({ "uri": receiver.uri }))?;
        qemu.wait_migration(PATIENCE, |state| state["status"] == "completed")?;
        let received = receiver.finish(PATIENCE)?;
        ensure!(received.code == Some(0), "qevm receive ends with {:?}: {}", received.code, received.said);
        std::fs::rename(folder.join("main.qevm"), file)?;
    } else {
        exec::save(&mut qemu, file)?;
    }
    qemu.quit();
    Ok(())
}

/// Lets a QEMU write its stream when its guest has printed `ready` on the serial port that goes to the file `serial`.
pub(crate) fn write_ran(
    env: &TrialEnv<'_>,
    side: &Side<'_>,
    (serial, ready): (&Path, &str),
    file: &Path,
) -> Result<()> {
    let mut qemu = start(env, side, "source", &[])?;
    let deadline = Instant::now() + BOOT;
    while !std::fs::read(serial).is_ok_and(|said| String::from_utf8_lossy(&said).contains(ready)) {
        ensure!(Instant::now() < deadline, "the guest did not boot: {}", qemu.said());
        thread::sleep(Duration::from_millis(100));
    }
    qemu.execute("stop", Value::Null)?;
    exec::save(&mut qemu, file)?;
    qemu.quit();
    Ok(())
}

/// What a real destination does, and what it says to it.
pub(crate) fn load(env: &TrialEnv<'_>, side: &Side<'_>, stream: &Path) -> Result<(Fate, String)> {
    let mut qemu = start(env, side, "judge", &["-S", "-incoming", "defer"])?;
    qemu.execute("migrate-incoming", json!({ "uri": format!("exec:cat {}", stream.display()) }))?;
    match qemu.wait_migration(PATIENCE, |state| state["status"] == "completed") {
        Ok(_) => Ok((Fate::Loads, String::new())),
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(!said.contains("still"), "the destination neither loads nor refuses: {said}");
            Ok((Fate::Fails, said))
        }
    }
}

fn start(env: &TrialEnv<'_>, side: &Side<'_>, name: &str, more: &[&str]) -> Result<Qemu> {
    let zeroes: PathBuf = env.scratch.join("zeroes.bin");
    std::fs::write(&zeroes, [0; 64 << 10])?;
    let (machine, rest) = side.arguments.split_once(' ').unwrap_or((side.arguments, ""));
    let accel = if machine.contains("accel=") { "" } else { ",accel=tcg" };
    let mut arguments = vec!["-M".to_owned(), format!("{machine}{accel}")];
    if !rest.contains("-m ") {
        arguments.extend(["-m".to_owned(), "32".to_owned()]);
    }
    let rest = rest.split_whitespace().map(|word| word.replace("{zeroes}", &zeroes.display().to_string()));
    arguments.extend(rest.chain(more.iter().map(|&word| word.to_owned())));
    let mut qemu = Qemu::start(env.root(side.suite)?, name, &arguments, env.scratch)?;
    qemu.set_capabilities(&side.capabilities.split_whitespace().collect::<Vec<_>>())?;
    Ok(qemu)
}
