//! Plays a [`Scenario`] with real QEMU and keeps the stream together with what QEMU says the guest's RAM was.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::launch::Qemu;
use crate::oracle::{self, Block};
use crate::payload;
use crate::process::run;
use crate::roots::Root;
use crate::scenario::{Accel, Guest, Route, Scenario};
use crate::tape::{Channel, Tape};

/// How long firmware runs before it is stopped: SeaBIOS is through with its set-up long before.
const FIRMWARE_TIME: Duration = Duration::from_millis(1000);
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(90);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const SNAPSHOT: &str = "qevm-snapshot";
/// Where the RAM pattern is loaded: above all firmware tables, inside the smallest guest.
const PATTERN_AT: u32 = 0xc0_0000;
const PATTERN_PAGES: usize = 256;
const DISK_BYTES: usize = 1 << 20;
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
pub fn record(scenario: &Scenario, root: &Root, folder: &Path) -> Result<Recording> {
    record_into(scenario, root, folder).with_context(|| format!("recording {}", scenario.name))
}

fn record_into(scenario: &Scenario, root: &Root, folder: &Path) -> Result<Recording> {
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
    let_guest_run(scenario, &mut source)?;
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

    let mut run = Run { scenario, root, scratch, folder, arguments: &arguments };
    let (files, migration) = run.migrate(&mut source)?;
    check_purpose(scenario, &migration)?;
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

/// One migration under way.
struct Run<'a> {
    scenario: &'a Scenario,
    root: &'a Root,
    scratch: &'a Path,
    folder: &'a Path,
    arguments: &'a [String],
}

impl Run<'_> {
    fn migrate(&mut self, source: &mut Qemu) -> Result<(Files, Value)> {
        match self.scenario.route {
            Route::Exec => self.to_file(source, |path| format!("exec:cat > {path}"), 0),
            Route::File { offset } => self.to_file(source, |path| format!("file:{path},offset={offset}"), offset),
            Route::Unix => self.to_dead_end(source, Tape::unix(self.scratch, "main", None)?),
            Route::Tcp => self.to_dead_end(source, Tape::tcp(self.scratch, "main")?),
            Route::Peer => self.to_peer(source),
            Route::Postcopy | Route::PostcopyRecovery => self.postcopy(source),
            Route::Savevm => self.savevm(source),
        }
    }

    fn to_file(&self, source: &mut Qemu, uri: impl Fn(&str) -> String, offset: u64) -> Result<(Files, Value)> {
        let path = self.folder.join("main.qevm");
        self.start(source, &uri(&path.display().to_string()))?;
        let state = self.complete(source)?;
        // `exec:` closes the pipe before `cat` has written everything.
        settle(&path)?;
        Ok((Files { main: "main.qevm".into(), offset, ..Files::default() }, state))
    }

    fn to_dead_end(&self, source: &mut Qemu, tape: Tape) -> Result<(Files, Value)> {
        self.start(source, tape.uri())?;
        let state = self.complete(source)?;
        Ok((self.keep(tape.finish(DRAIN_TIMEOUT)?, Files::default(), false)?, state))
    }

    fn to_peer(&self, source: &mut Qemu) -> Result<(Files, Value)> {
        // Loaded, but not continued: its RAM must then be the source's.
        let (mut target, tape) = self.target(&["-S"])?;
        self.start(source, tape.uri())?;
        let state = self.complete(source)?;
        target.wait_migration(MIGRATION_TIMEOUT, |s| s["status"] == "completed")?;
        let files = self.keep(tape.finish(DRAIN_TIMEOUT)?, Files::default(), false)?;
        let theirs = oracle::ram_blocks(&mut target, self.scratch)?;
        for ours in oracle::ram_blocks(source, self.scratch)? {
            let loaded = theirs.iter().find(|b| b.name == ours.name);
            if loaded.is_none_or(|b| b.sha256 != ours.sha256) {
                bail!("QEMU itself did not carry RAM block {} over: this recording proves nothing", ours.name);
            }
        }
        target.quit();
        Ok((files, state))
    }

    fn postcopy(&self, source: &mut Qemu) -> Result<(Files, Value)> {
        let recovery = self.scenario.route == Route::PostcopyRecovery;
        let (mut target, tape) = self.target(&[])?;
        self.start(source, tape.uri())?;
        let rounds = self.scenario.rounds.max(1);
        source.wait_migration(MIGRATION_TIMEOUT, |s| sync_count(s) >= rounds)?;
        source.execute("migrate-start-postcopy", Value::Null)?;
        source.wait_migration(MIGRATION_TIMEOUT, |s| {
            matches!(s["status"].as_str(), Some("postcopy-active" | "completed"))
        })?;
        if !recovery {
            let state = source.wait_migration(MIGRATION_TIMEOUT, |s| s["status"] == "completed")?;
            target.wait_migration(MIGRATION_TIMEOUT, |s| s["status"] == "completed")?;
            return Ok((self.keep(tape.finish(DRAIN_TIMEOUT)?, Files::default(), false)?, state));
        }
        let here = tape.forwarded();
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while tape.forwarded() < here + 128 * 1024 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        tape.cut();
        let paused = |s: &Value| s["status"] == "postcopy-paused";
        source.wait_migration(MIGRATION_TIMEOUT, paused)?;
        target.wait_migration(MIGRATION_TIMEOUT, paused)?;
        let files = self.keep(tape.finish(DRAIN_TIMEOUT)?, Files::default(), false)?;

        let again = self.scratch.join("again.sock");
        target.execute("migrate-recover", json!({ "uri": format!("unix:{}", again.display()) }))?;
        let tape = Tape::unix(self.scratch, "recovery", Some(&again))?;
        source.set_parameters(&json!({ "max-postcopy-bandwidth": 0 }))?;
        source.execute("migrate", json!({ "uri": tape.uri(), "resume": true }))?;
        let state = source.wait_migration(MIGRATION_TIMEOUT, |s| s["status"] == "completed")?;
        target.wait_migration(MIGRATION_TIMEOUT, |s| s["status"] == "completed")?;
        Ok((self.keep(tape.finish(DRAIN_TIMEOUT)?, files, true)?, state))
    }

    fn savevm(&self, source: &mut Qemu) -> Result<(Files, Value)> {
        let said = source.human(&format!("savevm {SNAPSHOT}"))?;
        if !said.trim().is_empty() {
            bail!("savevm: {}", said.trim());
        }
        let state = source.migration()?;
        fs::copy(self.scratch.join("disk.qcow2"), self.folder.join("snapshot.qcow2"))?;
        Ok((Files { main: "snapshot.qcow2".into(), ..Files::default() }, state))
    }

    /// A second QEMU that listens, and a proxy in front of it.
    fn target(&self, extra: &[&str]) -> Result<(Qemu, Tape)> {
        let mut arguments = self.arguments.to_vec();
        arguments.extend(extra.iter().map(ToString::to_string));
        arguments.extend(["-incoming".into(), "defer".into()]);
        let mut target = Qemu::start(self.root, "target", &arguments, self.scratch)?;
        target.set_capabilities(&self.scenario.capabilities)?;
        let mut parameters = self.scenario.parameters.clone();
        parameters.retain(|name, _| name.starts_with("multifd") || name.starts_with("xbzrle"));
        target.set_parameters(&Value::Object(parameters))?;
        let socket = self.scratch.join("target.sock");
        target.execute("migrate-incoming", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        let tape = Tape::unix(self.scratch, "main", Some(&socket))?;
        Ok((target, tape))
    }

    fn start(&self, source: &mut Qemu, uri: &str) -> Result<()> {
        let mut arguments = self.scenario.migrate.clone();
        arguments.insert("uri".into(), uri.into());
        source.execute("migrate", Value::Object(arguments)).map(|_| ())
    }

    /// Waits for the end of a precopy migration, letting it converge only after the rounds that the scenario wants.
    fn complete(&self, source: &mut Qemu) -> Result<Value> {
        let rounds = self.scenario.rounds;
        if rounds > 0 {
            source.wait_migration(MIGRATION_TIMEOUT, |s| sync_count(s) >= rounds || s["status"] == "completed")?;
            source.set_parameters(&json!({ "downtime-limit": 60_000, "max-bandwidth": 0 }))?;
        }
        let state = source.wait_migration(MIGRATION_TIMEOUT, |s| s["status"] == "completed")?;
        if sync_count(&state) < rounds {
            bail!("{} bitmap synchronisations instead of at least {rounds}", sync_count(&state));
        }
        Ok(state)
    }

    /// Moves the recorded channels into the folder under their names.
    fn keep(&self, channels: Vec<Channel>, mut files: Files, recovery: bool) -> Result<Files> {
        let prefix = if recovery { "recovery-" } else { "" };
        let mut main = None;
        for (n, channel) in channels.iter().enumerate() {
            let start = first_bytes(&channel.forward)?;
            // After a recovery the main channel has no magic, and is the first to arrive.
            if main.is_none() && (start == *b"QEVM" || recovery) {
                main = Some(n);
            }
        }
        let main = main.context("no recorded channel starts with the magic QEVM")?;
        let mut others = Vec::new();
        for (n, channel) in channels.iter().enumerate() {
            if n == main {
                let (name, back) = (format!("{prefix}main.qevm"), format!("{prefix}return-path.bin"));
                keep_file(&channel.forward, &self.folder.join(&name))?;
                let answered = fs::metadata(&channel.back)?.len() > 0;
                if answered {
                    keep_file(&channel.back, &self.folder.join(&back))?;
                }
                let back = answered.then_some(back);
                match recovery {
                    true => (files.recovery, files.recovery_return_path) = (Some(name), back),
                    false => (files.main, files.return_path) = (name, back),
                }
            } else {
                let name = format!("{prefix}channel-{}.bin", others.len() + 1);
                keep_file(&channel.forward, &self.folder.join(&name))?;
                others.push(name);
            }
        }
        match recovery {
            true => files.recovery_channels = others,
            false => files.channels = others,
        }
        Ok(files)
    }
}

/// A recording without the records that it is for would prove nothing.
fn check_purpose(scenario: &Scenario, migration: &Value) -> Result<()> {
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
    Ok(())
}

/// Bitmap synchronisations so far, over all rounds.
fn sync_count(state: &Value) -> u64 {
    state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

/// The scratch folder may be on another file system than the corpus.
fn keep_file(from: &Path, to: &Path) -> Result<()> {
    if fs::rename(from, to).is_err() {
        fs::copy(from, to).with_context(|| format!("keeping {}", to.display()))?;
    }
    Ok(())
}

fn first_bytes(path: &Path) -> Result<[u8; 4]> {
    let bytes = fs::read(path)?;
    let mut start = [0; 4];
    let n = bytes.len().min(4);
    start[..n].copy_from_slice(&bytes[..n]);
    Ok(start)
}

/// Waits until a file that another process writes no longer grows.
fn settle(path: &Path) -> Result<()> {
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    let mut last = (u64::MAX, Instant::now());
    while Instant::now() < deadline {
        let size = fs::metadata(path).map(|m| m.len()).unwrap_or(0);
        if size != last.0 {
            last = (size, Instant::now());
        } else if last.1.elapsed() > Duration::from_millis(100) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("{} is still growing", path.display())
}

/// The files that arguments may name: a raw disk, a qcow2 disk, and contents for RAM.
fn make_inputs(root: &Root, scratch: &Path) -> Result<()> {
    let disk = payload::pattern(DISK_BYTES / 4096);
    fs::write(scratch.join("disk.raw"), &disk)?;
    fs::write(scratch.join("ram.bin"), payload::pattern(PATTERN_PAGES))?;
    let qcow2: PathBuf = scratch.join("disk.qcow2");
    run(
        root.qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(qcow2).arg((8 << 20).to_string()),
        Duration::from_secs(30),
    )
    .map(|_| ())
}

fn arguments(scenario: &Scenario, scratch: &Path) -> Result<Vec<String>> {
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
        Guest::Firmware | Guest::FirmwareLive => {}
    }
    if !matches!(scenario.guest, Guest::Idle) {
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

fn let_guest_run(scenario: &Scenario, source: &mut Qemu) -> Result<()> {
    match scenario.guest {
        Guest::Idle => {}
        Guest::Dirtying(_) => thread::sleep(FIRMWARE_TIME / 3),
        Guest::FirmwareLive => thread::sleep(FIRMWARE_TIME),
        Guest::Firmware => {
            thread::sleep(FIRMWARE_TIME);
            source.execute("stop", Value::Null)?;
        }
    }
    Ok(())
}
