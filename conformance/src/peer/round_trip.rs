//! A stopped guest that goes into reference-vmm and comes out again: the second stream says what the first one said,
//! and takes the guest home.

use super::env::{Env, account};
use super::{Account, Journey, Monitor, VirtioLoad, virtio_load};
use crate::exec;
use crate::patience::PATIENCE;
use crate::process::run_any;
use crate::subject::BUILT_IN;
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

/// Bytes of a request in flight in a section.
const REQUEST: u64 = 49168;

/// What may differ: KVM lets both run while the machine is stopped. The phase of the local APIC's timer is in three
/// fields.
const RUNS_ON: [(&str, &str); 4] = [
    ("apic instance ", " initial_count_load_time"),
    ("apic instance ", " next_time"),
    ("apic instance ", " timer_expiry"),
    ("cpu instance ", " env.tsc"),
];

/// A stopped guest of a real QEMU, loaded and sent on.
#[derive(Debug, Clone)]
pub struct RoundTrip {
    /// Of three stops: a QEMU, reference-vmm, and a QEMU again.
    pub journey: Journey,
}

impl RoundTrip {
    /// Plays it.
    ///
    /// # Errors
    /// The streams differ in more than what runs on, or the guest does not go on at home.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let [first, second, door] = ["first.qevm", "second.qevm", "door"].map(|name| env.scratch.join(name));
        let frames = virtio_load::FrameCounter::listen(&self.journey.load.virtio, env.scratch)?;
        let fails = self.journey.load.virtio.contains(&VirtioLoad::FailingDisk);
        let mut here = if fails {
            let mut here = self.journey.start(env, 0, false)?;
            here.wait_status("io-error")?;
            here
        } else {
            let mut here = self.journey.boot(env, &mut |_| ())?;
            here.monitor().execute("stop", Value::Null)?;
            here
        };
        exec::save(here.monitor(), &first)?;

        let mut there = self.journey.start(env, 1, true)?;
        there.meets(here.stop())?;
        there.monitor().execute("migrate-incoming", json!({ "uri": format!("unix:{}", door.display()) }))?;
        let mut stream = UnixStream::connect(&door)?;
        io::copy(&mut File::open(&first)?, &mut stream).context("the guest was not taken in")?;
        stream.flush()?;
        stream.shutdown(Shutdown::Write)?;
        there.wait_status("paused")?;

        there.monitor().execute("migrate", json!({ "uri": format!("exec:cat > {}", second.display()) }))?;
        there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        compare(env, &first, &second, fails)?;
        if fails {
            let bytes = section_size(env.program, &second, "/virtio-blk")?;
            ensure!(bytes >= REQUEST, "no request was under way: the disk's section has {bytes} bytes");
        }

        let mut home = self.journey.start(env, 2, true)?;
        home.monitor().execute("migrate-incoming", json!({ "uri": format!("exec:cat {}", second.display()) }))?;
        home.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        home.monitor().execute("cont", Value::Null)?;
        self.journey.settle(&mut home)?;
        ensure!(there.text()?.is_empty(), "a stopped guest has run");
        let (left, nothing, back) = (here.end()?, there.end()?, home.end()?);
        virtio_load::judge(&self.journey.load.virtio, &[left.clone(), back.clone()], env.scratch, &frames)?;
        let texts = [left, nothing, back];
        Ok(account(Vec::new(), &Transcript::read(&texts.each_ref().map(Vec::as_slice))?))
    }
}

/// A guest that was stopped by an error of its disk is paused here.
fn compare(env: &Env<'_>, first: &Path, second: &Path, failed: bool) -> Result<()> {
    let differences = differences(env.program, first, second)?;
    for difference in &differences {
        let place = difference["place"].as_str().unwrap_or_default();
        if failed && place.starts_with("globalstate instance 0 ") {
            continue;
        }
        if !RUNS_ON.iter().any(|(section, field)| place.starts_with(section) && place.ends_with(field)) {
            bail!("{difference} (of {} differences)", differences.len());
        }
    }
    Ok(())
}

/// Bytes of a section, as `qevm inspect` tells them.
fn section_size(program: &Monitor, stream: &Path, name: &str) -> Result<u64> {
    let mut qevm = Command::new(program.judge());
    let said = run_any(qevm.args([BUILT_IN, "inspect", "--json"]).arg(stream), PATIENCE)?;
    let report: Value = serde_json::from_str(said.stdout.lines().next_back().unwrap_or_default())
        .with_context(|| format!("qevm inspect: {}", said.stderr))?;
    let sections = report["sections"].as_array().context("qevm inspect does not list the sections")?;
    let section = sections.iter().find(|section| section["idstr"].as_str().is_some_and(|idstr| idstr.ends_with(name)));
    section.and_then(|section| section["size"].as_u64()).with_context(|| format!("there is no section {name}"))
}

/// What `qevm diff` finds.
pub(super) fn differences(program: &Monitor, first: &Path, second: &Path) -> Result<Vec<Value>> {
    let mut qevm = Command::new(program.judge());
    let said = run_any(qevm.args([BUILT_IN, "diff", "--json"]).args([first, second]), PATIENCE)?;
    let report: Value = serde_json::from_str(said.stdout.lines().next_back().unwrap_or_default())
        .with_context(|| format!("qevm diff: {}", said.stderr))?;
    report["differences"].as_array().cloned().context("qevm diff does not list the differences")
}
