//! Plays a [`Scenario`] with real QEMU and keeps the stream together with what QEMU says the guest's RAM was.

use crate::launch::Qemu;
use crate::linux::{self, Linux};
use crate::oracle::{self, Block};
use crate::patience::{LONG_PATIENCE, PATIENCE};
use crate::payload::{self, Dirtying};
use crate::process::run;
use crate::roots::Root;
use crate::route::Run;
use crate::scenario::{Accel, Guest, Route, Scenario};
use crate::subject::Subject;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long firmware runs before it is stopped: SeaBIOS is through with its set-up long before.
const FIRMWARE_TIME: Duration = Duration::from_millis(1000);
/// Where the RAM pattern is loaded: above all firmware tables, inside the smallest guest.
const PATTERN_AT: u32 = 0xc0_0000;
const PATTERN_PAGES: usize = 256;
const DISK_BYTES: usize = 1 << 20;
const CONSOLE: &str = "console.txt";
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable";
/// An emulated microvm has no timer to calibrate the TSC by; TCG's runs at 1 GHz.
const MICROVM_CLOCK: &str = " tsc_early_khz=1000000";
/// The name of a recording's description in its folder.
pub const MANIFEST: &str = "recording.json";

/// A recorded migration: what was done, the files it left, and the truth about RAM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recording {
    /// The scenario's name.
    pub name: String,
    /// QEMU's exact version.
    pub qemu_version: String,
    /// The machine type asked for.
    pub machine: String,
    /// `tcg` or `kvm`.
    pub accel: String,
    /// All arguments of the source; `{dir}` stands for the scratch folder.
    pub arguments: Vec<String>,
    /// Capabilities that were on.
    pub capabilities: Vec<String>,
    /// Migration parameters that were set.
    pub parameters: Value,
    /// The files, relative to the recording's folder.
    pub files: Files,
    /// The source's last `query-migrate`.
    pub migration: Value,
    /// The source's RAM, stopped.
    pub ram: Vec<Block>,
}

/// The files of a recording.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Files {
    /// The main channel, or the image that holds the snapshot.
    pub main: String,
    /// Where the stream starts in `main`, bytes.
    pub offset: u64,
    /// Multifd and preempt channels, in the order of their arrival.
    pub channels: Vec<String>,
    /// What the destination answered on the main channel.
    pub return_path: Option<String>,
    /// The main channel after a postcopy recovery.
    pub recovery: Option<String>,
    /// The other channels after a postcopy recovery.
    pub recovery_channels: Vec<String>,
    /// The return path after a postcopy recovery.
    pub recovery_return_path: Option<String>,
}

impl Recording {
    /// Reads the description that [`record`] left in `folder`.
    ///
    /// # Errors
    /// There is none, or it is of another shape.
    pub fn open(folder: &Path) -> Result<Recording> {
        let path = folder.join(MANIFEST);
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not a recording's description", path.display()))
    }
}

/// Plays `scenario` with the QEMU of `root` and leaves stream and description in `folder`, which is made empty first.
///
/// # Errors
/// QEMU refuses something, the migration fails, a deadline passes, or the scenario did not reach what it is for (enough
/// rounds, postcopy, a recovery).
pub fn record(scenario: &Scenario, root: &Root, subject: &Subject, folder: &Path) -> Result<Recording> {
    record_into(scenario, root, subject, folder).with_context(|| format!("recording {}", scenario.name))
}

fn record_into(scenario: &Scenario, root: &Root, subject: &Subject, folder: &Path) -> Result<Recording> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    // Sockets live here too, and their paths must be short.
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let scratch = scratch.path();
    make_inputs(root, scratch)?;
    let arguments = arguments(scenario, scratch)?;
    let mut source = Qemu::start(root, "source", &arguments, scratch)?;
    let_guest_run(scenario, &mut source, scratch)?;
    for (command, given) in &scenario.prepare {
        source.execute(command, fill_value(given, scratch))?;
    }
    let before = match scenario.capabilities.contains(&"background-snapshot") {
        true => Some(oracle::ram_blocks(&mut source, scratch)?),
        false => None,
    };
    source.set_capabilities(&scenario.capabilities)?;
    if scenario.rounds > 0 {
        source.set_parameters(&json!({ "downtime-limit": 1 }))?;
    }
    source.set_parameters(&Value::Object(scenario.parameters.clone()))?;

    let run = Run { scenario, root, subject, scratch, folder, arguments: &arguments };
    let (files, migration) = run.migrate(&mut source)?;
    check_purpose(scenario, &migration, &files, folder)?;
    let ram = match before {
        Some(ram) => ram,
        None => oracle::ram_blocks(&mut source, scratch)?,
    };
    source.quit();
    let recording = Recording {
        name: scenario.name.clone(),
        qemu_version: root.version().into(),
        machine: scenario.machine.clone(),
        accel: if scenario.accel == Accel::Kvm { "kvm".into() } else { "tcg".into() },
        arguments: arguments.iter().map(|a| a.replace(&*scratch.display().to_string(), "{dir}")).collect(),
        capabilities: scenario.capabilities.iter().map(ToString::to_string).collect(),
        parameters: Value::Object(scenario.parameters.clone()),
        files,
        migration,
        ram,
    };
    fs::write(folder.join(MANIFEST), serde_json::to_vec_pretty(&recording)?)?;
    Ok(recording)
}

/// A recording without the records that it is for would prove nothing.
fn check_purpose(scenario: &Scenario, migration: &Value, files: &Files, folder: &Path) -> Result<()> {
    let compared = [
        ("xbzrle", &migration["xbzrle-cache"]["pages"], "XBZRLE pages"),
        ("compress", &migration["compression"]["pages"], "compressed pages"),
        ("postcopy-ram", &migration["ram"]["postcopy-requests"], "page requests"),
    ];
    for (capability, counter, what) in compared {
        if scenario.capabilities.contains(&capability) && counter.as_u64().unwrap_or(0) == 0 {
            bail!("QEMU reports no {what}");
        }
    }
    if scenario.route == Route::Postcopy && scenario.capabilities.contains(&"postcopy-preempt") {
        // The preempt channel is the last to be opened; it may legally carry nothing.
        let preempt = files.channels.last().context("no preempt channel was opened")?;
        if fs::metadata(folder.join(preempt))?.len() == 0 {
            bail!("nothing went over the preempt channel");
        }
    }
    Ok(())
}

/// The files that arguments may name: a raw disk, a qcow2 disk, and contents for RAM.
pub(crate) fn make_inputs(root: &Root, scratch: &Path) -> Result<()> {
    let disk = payload::pattern(DISK_BYTES / 4096);
    fs::write(scratch.join("disk.raw"), &disk)?;
    fs::write(scratch.join("ram.bin"), payload::pattern(PATTERN_PAGES))?;
    let qcow2: PathBuf = scratch.join("disk.qcow2");
    run(root.qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(qcow2).arg((8 << 20).to_string()), PATIENCE)
        .map(|_| ())
}

/// QEMU's arguments for a scenario whose inputs are in `scratch`.
pub(crate) fn arguments(scenario: &Scenario, scratch: &Path) -> Result<Vec<String>> {
    let accel = if scenario.accel == Accel::Kvm { "kvm" } else { "tcg" };
    let mut all = vec!["-M".into(), format!("{},accel={accel}", scenario.machine)];
    all.extend(["-m".into(), scenario.memory.to_string()]);
    match scenario.guest {
        Guest::Idle => {}
        Guest::Dirtying(dirtying) => {
            let path = scratch.join("payload.bin");
            fs::write(&path, payload::firmware(dirtying))?;
            all.extend(["-bios".into(), path.display().to_string()]);
        }
        Guest::Linux => {
            let linux = Linux::install()?;
            all.extend(["-kernel".into(), linux.kernel.display().to_string()]);
            all.extend(["-initrd".into(), linux.initramfs.display().to_string()]);
            let clock = if scenario.machine.starts_with("microvm") { MICROVM_CLOCK } else { "" };
            all.extend(["-append".into(), format!("{KERNEL_COMMAND_LINE}{clock}")]);
            all.extend(["-chardev".into(), format!("file,id=qevm-console,path={}", scratch.join(CONSOLE).display())]);
            all.extend(["-serial".into(), "chardev:qevm-console".into()]);
        }
        Guest::Firmware | Guest::FirmwareLive => {}
    }
    if !matches!(scenario.guest, Guest::Idle | Guest::Linux) {
        let file = scratch.join("ram.bin");
        all.push("-device".into());
        all.push(format!("loader,file={},addr={PATTERN_AT:#x},force-raw=on", file.display()));
    }
    all.extend(scenario.arguments.iter().map(|a| fill(a, scratch)));
    Ok(all)
}

fn fill(text: &str, scratch: &Path) -> String {
    text.replace("{dir}", &scratch.display().to_string())
}

fn fill_value(value: &Value, scratch: &Path) -> Value {
    match value {
        Value::String(text) => fill(text, scratch).into(),
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), fill_value(v, scratch))).collect(),
        Value::Array(list) => list.iter().map(|v| fill_value(v, scratch)).collect(),
        other => other.clone(),
    }
}

fn let_guest_run(scenario: &Scenario, source: &mut Qemu, scratch: &Path) -> Result<()> {
    match scenario.guest {
        Guest::Idle => {}
        Guest::Dirtying(dirtying) => wait_for_rounds(dirtying, source)?,
        Guest::FirmwareLive => thread::sleep(FIRMWARE_TIME),
        Guest::Linux => {
            wait_for_linux(&scratch.join(CONSOLE))?;
            source.execute("stop", Value::Null)?;
        }
        Guest::Firmware => {
            thread::sleep(FIRMWARE_TIME);
            source.execute("stop", Value::Null)?;
        }
    }
    Ok(())
}

/// Waits until a guest is in its third round over the pages that it dirties: each adds one to the first word of a page.
fn wait_for_rounds(dirtying: Dirtying, source: &mut Qemu) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = source.human(&format!("xp /1wx {:#x}", dirtying.base))?;
        let word = said.rsplit_once("0x").map(|(_, word)| u32::from_str_radix(word.trim(), 16));
        let word = word.with_context(|| format!("xp says {said:?}"))??;
        if word > 2 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the guest has not dirtied its pages three times but {word} times");
        thread::sleep(Duration::from_millis(10));
    }
}

fn wait_for_linux(console: &Path) -> Result<()> {
    let deadline = Instant::now() + LONG_PATIENCE;
    loop {
        let said = fs::read(console).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        if said.contains(linux::READY) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let last: Vec<&str> = said.lines().rev().take(5).collect();
            bail!("Linux is not ready after {} s; last lines, newest first: {last:?}", LONG_PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
}
