//! Real QEMU loads what qevm writes of a stream that COLO's checkpoints follow: the guest is that of the last one, in
//! its registers as in its memory, and goes on from there.

use super::question::{Trial, TrialEnv};
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::roots::Suite;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

/// Of QEMU 11.1.3: a stream, and eight checkpoints after it (`inspect/tests/streams/README.md`). The guest counts in
/// EAX, stores the count, and does nothing else.
const STREAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../inspect/tests/streams/11.1-colo.zst");
/// EAX in the eighth, at byte 200,849 of the stream.
const COUNTED: u64 = 0x1f36_7d60;
/// Where the guest stores the count.
const STORED: u64 = 0x7000;
/// Length of the firmware, which comes with the stream.
const FIRMWARE: usize = 64 << 10;

pub(super) fn trials() -> Vec<Trial> {
    let trial = |form: &'static str, capabilities: &'static [&'static str]| {
        Trial::new(format!("checkpoint to {form}/microvm/11.1"), &[Suite::Sid], false, move |env| {
            play(env, form, capabilities)
        })
    };
    vec![trial("plain", &[]), trial("mapped-ram", &["mapped-ram"])]
}

fn play(env: &TrialEnv<'_>, form: &str, capabilities: &[&str]) -> Result<String> {
    let [checkpoints, written, firmware] =
        ["checkpoints.qevm", "written.qevm", "nothing.bin"].map(|name| env.scratch.join(name));
    // What is compressed can be read only once, and checkpoints are read twice.
    let stream = File::open(STREAM).context(STREAM)?;
    fs::write(&checkpoints, zstd::decode_all(stream)?)?;
    fs::write(&firmware, vec![0; FIRMWARE])?;
    let convert = ["convert".as_ref(), "--format".as_ref(), form.as_ref(), "--out".as_ref(), written.as_os_str()];
    let converted = env.subject.run(&convert.into_iter().chain([checkpoints.as_os_str()]).collect::<Vec<_>>())?;
    ensure!(converted.success, "qevm convert: {}", converted.stderr.trim_end());

    let firmware = firmware.display().to_string();
    let arguments = ["-M", "microvm,accel=tcg", "-m", "16", "-bios", &firmware, "-S", "-incoming", "defer"];
    let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
    let mut qemu = Qemu::start(env.root(Suite::Sid)?, "target", &arguments, env.scratch)?;
    qemu.set_capabilities(capabilities)?;
    let uri = match capabilities {
        [] => format!("exec:cat {}", written.display()),
        _ => format!("file:{}", written.display()),
    };
    qemu.execute("migrate-incoming", json!({ "uri": uri }))?;
    qemu.wait_migration(PATIENCE, |state| state["status"] == "completed")?;

    let registers = qemu.human("info registers")?;
    let counted = number(&registers, "EAX=").context("QEMU shows no EAX")?;
    let found = stored(&mut qemu)?;
    ensure!((counted, found) == (COUNTED, COUNTED), "EAX {counted:#x}, in memory {found:#x}, not {COUNTED:#x}");
    qemu.execute("cont", Value::Null)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = stored(&mut qemu)?;
        match now {
            COUNTED if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            COUNTED => bail!("the guest does not go on"),
            _ if now > COUNTED => return Ok(format!("EAX and memory {COUNTED:#x}, then {now:#x}")),
            _ => bail!("the guest counts anew: {now:#x}"),
        }
    }
}

/// What the guest has stored.
fn stored(qemu: &mut Qemu) -> Result<u64> {
    let said = qemu.human(&format!("xp /1wx {STORED:#x}"))?;
    number(&said, ": 0x").with_context(|| format!("QEMU shows no word at {STORED:#x}: {said}"))
}

/// The hexadecimal number after `name`.
fn number(text: &str, name: &str) -> Option<u64> {
    let (_, rest) = text.split_once(name)?;
    let digits = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
    u64::from_str_radix(digits, 16).ok()
}
