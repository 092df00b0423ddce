//! One source QEMU for many rows: its guest does nothing, so that it can migrate again and again with the same RAM.

use super::setup::{Setup, Transport};
use crate::launch::Qemu;
use crate::oracle::{self, Block};
use crate::patience::PATIENCE;
use crate::payload;
use crate::recorder::Recorder;
use crate::roots::{Root, Suite};
use anyhow::{Context, Result, bail};
use qevm_wire::{Profile, QemuVersion};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long the guest runs before it is stopped.
const FIRMWARE_TIME: Duration = Duration::from_millis(100);
/// How long QEMU may need to forget a migration that failed. Not a hang: 7.2 sometimes never does.
const CLEANUP_TIME: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
/// Where the RAM pattern is loaded: above all firmware tables.
const PATTERN_AT: u32 = 0xc0_0000;
const PATTERN_PAGES: usize = 512;

/// How the page channels' synchronisation is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flush {
    /// As the release and the machine type do.
    Default,
    /// `-global migration.multifd-flush-after-each-section=on`.
    EachSection,
}

/// A release with a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flavor {
    /// The suite whose QEMU it is.
    pub suite: Suite,
    /// The value of `-M`.
    pub machine: &'static str,
    /// How page channels synchronise.
    pub flush: Flush,
    /// The guest runs while it migrates.
    pub running: bool,
}

impl Flavor {
    /// A stopped guest, with the machine type's own way to synchronise.
    pub fn new(suite: Suite, machine: &'static str) -> Flavor {
        Flavor { suite, machine, flush: Flush::Default, running: false }
    }

    /// The release.
    pub fn release(self) -> QemuVersion {
        self.suite.series().parse().expect("a suite's series is a version")
    }

    /// What is on the wire.
    pub fn profile(self) -> Profile {
        let mut profile = Profile::new(self.release(), self.machine);
        if self.flush == Flush::EachSection {
            profile.multifd_flush_after_each_section = true;
        }
        profile
    }

    /// The front of a row's name.
    pub fn name(self) -> String {
        let flush = if self.flush == Flush::EachSection { "+flush-each-section" } else { "" };
        let running = if self.running { "+running" } else { "" };
        format!("{}/{}{flush}{running}", self.suite.series(), self.machine)
    }

    /// QEMU's arguments; inputs are in `scratch`.
    pub fn arguments(self, scratch: &Path) -> Vec<String> {
        let (pattern, firmware) = (scratch.join("ram.bin"), scratch.join("halt.bin"));
        let loader = format!("loader,file={},addr={PATTERN_AT:#x},force-raw=on", pattern.display());
        let mut all = vec!["-M".into(), format!("{},accel=tcg", self.machine), "-m".into(), "32".into()];
        all.extend(["-bios".into(), firmware.display().to_string(), "-device".into(), loader]);
        if self.flush == Flush::EachSection {
            all.extend(["-global".into(), "migration.multifd-flush-after-each-section=on".into()]);
        }
        all
    }
}

/// A form in which a guest is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// Every page on the main channel.
    Plain,
    /// Three page channels, zstd.
    Multifd,
    /// A mapped-ram file.
    MappedRam,
}

impl Saved {
    /// Its name in rows.
    pub fn name(self) -> &'static str {
        match self {
            Saved::Plain => "plain",
            Saved::Multifd => "multifd",
            Saved::MappedRam => "mapped-ram",
        }
    }
}

/// A source QEMU with its scratch folder.
#[derive(Debug)]
pub struct Source {
    /// What it is.
    pub flavor: Flavor,
    /// Its installation.
    pub root: Root,
    /// QEMU.
    pub qemu: Qemu,
    /// Its RAM; empty while the guest runs.
    pub ram: Vec<Block>,
    scratch: tempfile::TempDir,
    saved: Vec<(Saved, Vec<OsString>)>,
    next: usize,
}

impl Source {
    /// Starts it and lets the guest run for a moment.
    ///
    /// # Errors
    /// QEMU does not start or answer.
    pub fn start(flavor: Flavor, root: &Root) -> Result<Source> {
        let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
        fs::write(scratch.path().join("ram.bin"), payload::pattern(PATTERN_PAGES))?;
        fs::write(scratch.path().join("halt.bin"), payload::halt())?;
        let mut qemu = Qemu::start(root, "source", &flavor.arguments(scratch.path()), scratch.path())?;
        thread::sleep(FIRMWARE_TIME);
        let mut ram = Vec::new();
        if !flavor.running {
            qemu.execute("stop", Value::Null)?;
            ram = oracle::ram_blocks(&mut qemu, scratch.path())?;
        }
        Ok(Source { flavor, root: root.clone(), qemu, ram, scratch, saved: Vec::new(), next: 0 })
    }

    /// Where inputs and sockets are.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// An empty folder for a row.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn folder(&mut self) -> Result<PathBuf> {
        self.next += 1;
        let folder = self.scratch().join(format!("row-{}", self.next));
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Makes the guest what it was before it migrated: QEMU does not migrate one a second time that it has not
    /// continued. It halts at once, with its RAM as it was.
    ///
    /// # Errors
    /// QEMU does not continue it.
    fn again(&mut self) -> Result<()> {
        if self.qemu.execute("query-status", Value::Null)?["status"] == "postmigrate" {
            self.qemu.execute("cont", Value::Null)?;
            if !self.flavor.running {
                self.qemu.execute("stop", Value::Null)?;
            }
        }
        Ok(())
    }

    /// Starts to migrate to `uri`.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn begin(&mut self, uri: &str) -> Result<()> {
        self.again()?;
        if !self.is_clean()? {
            bail!("the last migration is not cleaned up");
        }
        self.qemu.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Waits until QEMU has cleaned up a migration that failed a moment ago; false if it does not. It refuses the next
    /// one before that, and 7.2 then stays in status `setup` for ever. 7.2 sometimes never cleans up, either, when a
    /// page channel was closed while it was being opened; its guest runs on all the same.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn is_clean(&mut self) -> Result<bool> {
        let deadline = Instant::now() + CLEANUP_TIME;
        loop {
            let instances = self.qemu.execute("query-yank", Value::Null)?;
            if !instances.as_array().is_some_and(|all| all.iter().any(|i| i["type"] == "migration")) {
                return Ok(true);
            }
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(POLL);
        }
    }

    /// Migrates to `uri` and waits for the end.
    ///
    /// # Errors
    /// QEMU refuses or fails.
    pub fn migrate(&mut self, uri: &str) -> Result<Value> {
        self.begin(uri)?;
        self.qemu.wait_migration(PATIENCE, |s| s["status"] == "completed")
    }

    /// The guest in this form, made by QEMU alone, as input arguments of `qevm`.
    ///
    /// # Errors
    /// The migration fails.
    pub fn saved(&mut self, form: Saved) -> Result<Vec<OsString>> {
        if let Some((_, arguments)) = self.saved.iter().find(|(f, _)| *f == form) {
            return Ok(arguments.clone());
        }
        let arguments = self.save(form).with_context(|| format!("saving the guest in {} form", form.name()))?;
        self.saved.push((form, arguments.clone()));
        Ok(arguments)
    }

    fn save(&mut self, form: Saved) -> Result<Vec<OsString>> {
        let setup = match form {
            Saved::Plain => Setup::default(),
            Saved::Multifd => Setup::multifd(3, "zstd"),
            Saved::MappedRam => Setup::with("mapped-ram").over(Transport::File),
        };
        let profile = self.flavor.profile();
        if let Err(refusal) = setup.apply(&mut self.qemu, &profile)? {
            bail!("QEMU refuses: {refusal}");
        }
        let folder = self.folder()?;
        if form == Saved::MappedRam {
            let path = folder.join("saved.qevm");
            self.migrate(&format!("file:{}", path.display()))?;
            return Ok(vec![path.into()]);
        }
        let recorder = Recorder::unix(&folder, "saved", None)?;
        self.migrate(recorder.uri())?;
        let channels = recorder.finish(PATIENCE)?;
        let (mut arguments, mut main) = (Vec::new(), None);
        for channel in channels {
            match fs::read(&channel.forward)?.starts_with(b"QEVM") {
                true => main = Some(channel.forward),
                false => arguments.extend(["--channel".into(), channel.forward.into_os_string()]),
            }
        }
        arguments.push(main.context("no main channel was recorded")?.into_os_string());
        Ok(arguments)
    }

    /// Says what of the guest's RAM is no longer what it was: then nothing was proved.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn moved(&mut self) -> Result<Vec<String>> {
        if self.flavor.running {
            return Ok(Vec::new());
        }
        let scratch = self.scratch.path().to_path_buf();
        let now = oracle::ram_blocks(&mut self.qemu, &scratch)?;
        Ok(differing(&self.ram, &now))
    }

    /// Ends QEMU.
    pub fn quit(self) {
        self.qemu.quit();
    }
}

/// Blocks of `truth` that `found` does not have with the same content.
pub(super) fn differing(truth: &[Block], found: &[Block]) -> Vec<String> {
    let differs = |block: &&Block| {
        block.sha256.is_some() && found.iter().find(|b| b.name == block.name).is_none_or(|b| b.sha256 != block.sha256)
    };
    truth.iter().filter(differs).map(|b| b.name.clone()).collect()
}
