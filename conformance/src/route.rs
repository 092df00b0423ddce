//! The ways on which a migration leaves its source, and what each leaves behind.

use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::process::run;
use crate::record::Files;
use crate::recorder::{Channel, Recorder};
use crate::roots::Root;
use crate::scenario::{Route, Scenario};
use crate::subject::Subject;
use crate::{exec, oracle};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const SNAPSHOT: &str = "qevm-snapshot";

/// One migration under way.
pub(crate) struct Run<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) root: &'a Root,
    pub(crate) subject: &'a Subject,
    pub(crate) scratch: &'a Path,
    pub(crate) folder: &'a Path,
    pub(crate) arguments: &'a [String],
}

impl Run<'_> {
    /// Migrates `source` on the scenario's route and gives the files and its last `query-migrate`.
    pub(crate) fn migrate(&self, source: &mut Qemu) -> Result<(Files, Value)> {
        match self.scenario.route {
            Route::Exec => self.to_file(source, exec::uri, 0),
            Route::File { offset } => {
                self.to_file(source, |path| format!("file:{},offset={offset}", path.display()), offset)
            }
            Route::Unix => self.to_dead_end(source, Recorder::unix(self.scratch, "main", None)?),
            Route::Tcp => self.to_dead_end(source, Recorder::tcp(self.scratch, "main")?),
            Route::ReceiveUnix => self.to_qevm(source, &format!("unix:{}", self.scratch.join("qevm.sock").display())),
            Route::ReceiveTcp => {
                // The port is free again when the listener is dropped, and nothing else knows its number.
                let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
                self.to_qevm(source, &format!("tcp:127.0.0.1:{port}"))
            }
            Route::Peer => self.to_peer(source),
            Route::Postcopy | Route::PostcopyRecovery => self.postcopy(source),
            Route::Savevm => self.savevm(source),
        }
    }

    fn to_file(&self, source: &mut Qemu, uri: impl Fn(&Path) -> String, offset: u64) -> Result<(Files, Value)> {
        let path = self.folder.join("main.qevm");
        self.start(source, &uri(&path))?;
        let state = self.complete(source)?;
        exec::finish(&path)?;
        Ok((Files { main: "main.qevm".into(), offset, ..Files::default() }, state))
    }

    fn to_dead_end(&self, source: &mut Qemu, recorder: Recorder) -> Result<(Files, Value)> {
        self.start(source, recorder.uri())?;
        let state = self.complete(source)?;
        Ok((self.keep(recorder.finish(PATIENCE)?, Files::default(), false)?, state))
    }

    /// `qevm receive` as the destination. What it prints must be what `--json` promises: one object at the end.
    fn to_qevm(&self, source: &mut Qemu, address: &str) -> Result<(Files, Value)> {
        let out = self.folder.join("main.qevm");
        let mut command = self.subject.command();
        command.args(["receive", address, "--json", "--out"]).arg(&out);
        thread::scope(|scope| {
            let receiving = scope.spawn(|| run(&mut command, PATIENCE));
            // When qevm ends before the migration does, what it said is the better error.
            let state = self
                .start_when_listening(source, address, || receiving.is_finished())
                .and_then(|()| self.complete(source));
            let said = match receiving.join() {
                Ok(said) => said?,
                Err(_) => bail!("the thread that waits for qevm receive panicked"),
            };
            let last: Value = serde_json::from_str(said.lines().last().unwrap_or_default())
                .with_context(|| format!("qevm receive --json ends with {:?}", said.lines().last()))?;
            if last["ok"] != true {
                bail!("qevm receive: {last}");
            }
            Ok((Files { main: "main.qevm".into(), ..Files::default() }, state?))
        })
    }

    /// QEMU connects once and gives up, and a connection made to find out whether QEMU listens would be taken for
    /// the migration: so the migration is tried until it gets through.
    fn start_when_listening(&self, source: &mut Qemu, address: &str, gone: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let refused = match self.start(source, address) {
                Ok(()) => match source.wait_migration(PATIENCE, |s| {
                    matches!(s["status"].as_str(), Some("active" | "device" | "completed"))
                }) {
                    Ok(_) => return Ok(()),
                    Err(e) => e,
                },
                Err(e) => e,
            };
            if gone() || Instant::now() > deadline {
                return Err(refused.context(format!("nothing listens on {address}")));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn to_peer(&self, source: &mut Qemu) -> Result<(Files, Value)> {
        // Loaded, but not continued: its RAM must then be the source's.
        let (mut target, recorder) = self.target(&["-S"])?;
        self.start(source, recorder.uri())?;
        let state = self.complete(source)?;
        target.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
        let files = self.keep(recorder.finish(PATIENCE)?, Files::default(), false)?;
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
        let (mut target, recorder) = self.target(&[])?;
        self.start(source, recorder.uri())?;
        let rounds = self.scenario.rounds.max(1);
        source.wait_migration(PATIENCE, |s| sync_count(s) >= rounds)?;
        source.execute("migrate-start-postcopy", Value::Null)?;
        source.wait_migration(PATIENCE, |s| matches!(s["status"].as_str(), Some("postcopy-active" | "completed")))?;
        if !recovery {
            let state = source.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
            target.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
            return Ok((self.keep(recorder.finish(PATIENCE)?, Files::default(), false)?, state));
        }
        let here = recorder.forwarded();
        let deadline = Instant::now() + PATIENCE;
        while recorder.forwarded() < here + 128 * 1024 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        recorder.cut();
        let paused = |s: &Value| s["status"] == "postcopy-paused";
        source.wait_migration(PATIENCE, paused)?;
        target.wait_migration(PATIENCE, paused)?;
        let files = self.keep(recorder.finish(PATIENCE)?, Files::default(), false)?;

        let again = self.scratch.join("again.sock");
        target.execute("migrate-recover", json!({ "uri": format!("unix:{}", again.display()) }))?;
        let recorder = Recorder::unix(self.scratch, "recovery", Some(&again))?;
        source.set_parameters(&json!({ "max-postcopy-bandwidth": 0 }))?;
        source.execute("migrate", json!({ "uri": recorder.uri(), "resume": true }))?;
        let state = source.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
        target.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
        Ok((self.keep(recorder.finish(PATIENCE)?, files, true)?, state))
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
    fn target(&self, extra: &[&str]) -> Result<(Qemu, Recorder)> {
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
        let recorder = Recorder::unix(self.scratch, "main", Some(&socket))?;
        Ok((target, recorder))
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
            source.wait_migration(PATIENCE, |s| sync_count(s) >= rounds || s["status"] == "completed")?;
            source.set_parameters(&json!({ "downtime-limit": 60_000, "max-bandwidth": 0 }))?;
        }
        let state = source.wait_migration(PATIENCE, |s| s["status"] == "completed")?;
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

/// The first four bytes; zeroes for what a shorter file lacks.
fn first_bytes(path: &Path) -> Result<[u8; 4]> {
    let mut start = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut start)?;
    start.resize(4, 0);
    Ok([start[0], start[1], start[2], start[3]])
}
