//! Guests that go from a QEMU to an example of `qevm-migration`, `toy_vmm` or `async_vmm`, and back while they run.
//!
//! What QEMU says of its guest is the truth: RAM by `pmemsave`, the watchdog by the file that QEMU saves.

use crate::launch::Qemu;
use crate::matrix::REQUIRE_QEMU;
use crate::outcome::{Outcome, Report, Row};
use crate::patience::PATIENCE;
use crate::roots::{Root, Suite};
use anyhow::{Context as _, Result, bail, ensure};
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::Driver;
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The hidden subcommands of `qevm-conformance` that are `toy_vmm` and `async_vmm`.
pub const BUILT_IN: [&str; 2] = ["toy-vmm", "async-vmm"];

const MIB: usize = 1 << 20;
/// Guest RAM, and the part of it that is not zero when QEMU starts.
const RAM: usize = 64 * MIB;
const PATTERN: usize = 16 * MIB;
/// Where microvm shows firmware instead of RAM.
const FIRMWARE: std::ops::Range<usize> = 0xe_0000..0x10_0000;
/// By how much the toy feeds the watchdog, ns.
const FED: i64 = 1_000_000_000;
/// The idstr of QEMU's device `ib700`; its state is the timer's eight bytes.
const WATCHDOG: &str = "ib700_wdt";
/// Trips that a guest without a processor may make.
const ATTEMPTS: u32 = 5;
const POLL: Duration = Duration::from_millis(5);

/// QEMU's end of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// `-M none`: RAM alone.
    None,
    /// `-M microvm,rtc=on -device ib700`: RAM and a device that the toy has, too.
    Microvm,
}

/// A way of migrating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One connection that the source alone writes to.
    Plain,
    /// Capability `return-path`.
    ReturnPath,
    /// Capability `multifd`, with two page channels.
    Multifd,
    /// Capabilities `return-path` and `postcopy-ram`: the guest goes before its memory both times.
    Postcopy,
}

/// An example of a monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Example {
    /// `toy_vmm`: the engine with its threads.
    Toy,
    /// `async_vmm`: the cores, driven by tokio. It has RAM and one connection with a return path.
    Async,
}

/// A guest that goes from a QEMU to the toy and to another QEMU of the same release.
#[derive(Debug, Clone)]
pub struct Trip {
    /// The QEMU.
    pub suite: Suite,
    /// Its machine.
    pub machine: Machine,
    /// How it is migrated, both times.
    pub way: Way,
    /// Where it goes.
    pub example: Example,
}

/// What was seen of one.
#[derive(Debug, Clone, Serialize)]
pub struct Seen {
    passes: u64,
    /// The watchdog's timer as the last QEMU had it, ns.
    watchdog: Option<i64>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RAM equal both ways, {} passes back", self.passes)?;
        self.watchdog.map_or(Ok(()), |at| write!(f, ", watchdog at {at} ns"))
    }
}

impl Trip {
    /// For reports.
    pub fn name(&self) -> String {
        let example = if self.example == Example::Async { " async" } else { "" };
        format!("{} {:?} {:?}{example}", self.suite.series(), self.machine, self.way).to_lowercase()
    }
}

/// Every release, machine and way.
pub fn all() -> Vec<Trip> {
    let mut all = Vec::new();
    for suite in [Suite::Bookworm, Suite::Trixie, Suite::Sid] {
        for machine in [Machine::Microvm, Machine::None] {
            let example = Example::Toy;
            all.extend([Way::Plain, Way::ReturnPath, Way::Multifd].map(|way| Trip { suite, machine, way, example }));
        }
        let machine = Machine::None;
        let example = Example::Async;
        all.extend([Way::ReturnPath, Way::Postcopy].map(|way| Trip { suite, machine, way, example }));
    }
    all
}

/// Every release in every way with a device, and each release in one way without; 11.1 with `async_vmm`, too.
pub fn quick() -> Vec<Trip> {
    let alone = [(Suite::Bookworm, Way::Plain), (Suite::Trixie, Way::Multifd), (Suite::Sid, Way::ReturnPath)];
    let mut trips = all();
    trips.retain(|trip| match trip.example {
        Example::Toy => trip.machine == Machine::Microvm || alone.contains(&(trip.suite, trip.way)),
        Example::Async => trip.suite == Suite::Sid,
    });
    trips
}

/// Plays trips one after the other, and calls `each` with every row as it ends. `judge` is the program
/// `qevm-conformance`.
pub fn run(trips: &[Trip], judge: &Path, mut each: impl FnMut(&Row<Seen>)) -> Report<Seen> {
    let mut rows = Vec::new();
    for trip in trips {
        let started = Instant::now();
        let outcome = match Root::install(trip.suite) {
            Ok(root) => trip.play(&root, judge).into(),
            Err(why) => Outcome::unavailable(REQUIRE_QEMU, &format!("{why:#}")),
        };
        let row = Row { name: trip.name(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    Report { rows }
}

impl Trip {
    /// Plays the trip until the guest came back after three passes or more. One that got no processor to write with
    /// proves nothing.
    fn play(&self, root: &Root, judge: &Path) -> Result<Seen> {
        let mut seen = self.go(root, judge)?;
        for _ in 1..ATTEMPTS {
            if seen.passes >= 3 {
                break;
            }
            seen = self.go(root, judge)?;
        }
        ensure!(seen.passes >= 3, "the guest came back after {} passes, each of {ATTEMPTS} times", seen.passes);
        Ok(seen)
    }

    fn go(&self, root: &Root, judge: &Path) -> Result<Seen> {
        let scratch = tempfile::Builder::new().prefix("qevm-toy-").tempdir()?;
        let folder = scratch.path();
        let uri = |name: &str| format!("unix:{}", folder.join(name).display());
        fs::write(folder.join("pattern"), pattern())?;
        let load = format!("loader,file={},addr={PATTERN},force-raw=on", folder.join("pattern").display());
        let mut source = self.start(root, folder, "source", &["-device", &load])?;
        let before = match self.machine {
            Machine::Microvm => Some(arm(&mut source, folder)?),
            Machine::None => None,
        };
        source.execute("stop", Value::Null)?;
        let sent = memory(&mut source, folder, "source.ram")?;
        ensure!(sent[PATTERN..][..PATTERN] == pattern(), "QEMU has not loaded the pattern");

        let mut target = self.start(root, folder, "target", &["-S", "-incoming", "defer"])?;
        self.set_up(&mut target)?;
        target.set_capabilities(&["events"])?;
        target.execute("migrate-incoming", json!({ "uri": uri("to.sock") }))?;
        let toy = self.toy(judge, folder, uri)?;
        self.set_up(&mut source)?;
        if self.way == Way::Postcopy {
            // Slow enough for the guest to go before its memory.
            source.set_parameters(&json!({ "max-bandwidth": 4 * MIB }))?;
        }
        source.execute("migrate", json!({ "uri": uri("from.sock") }))?;
        if self.way == Way::Postcopy {
            source.wait_migration(PATIENCE, |state| state["status"] == "active").with_context(|| toy.said())?;
            source.execute("migrate-start-postcopy", Value::Null)?;
        }
        source.wait_migration(PATIENCE, completed).with_context(|| toy.said())?;
        let said = toy.finish()?;
        target.wait_migration(PATIENCE, completed).with_context(|| said.clone())?;

        let (arrived, left) = (fs::read(folder.join("arrived.ram"))?, fs::read(folder.join("left.ram"))?);
        self.compare("on the way to the toy", &sent, &arrived)?;
        ensure!(arrived != left, "the toy's guest has not written");
        self.compare("on the way back", &left, &memory(&mut target, folder, "target.ram")?)?;
        let number = |after: &str| -> Result<i64> {
            let found = said.split_once(after).map(|(_, rest)| rest.trim_start());
            let digits = found.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit() && c != '-').next());
            digits.and_then(|digits| digits.parse().ok()).with_context(|| format!("no '{after}' in: {said}"))
        };
        let passes = u64::try_from(number("left: passes")?)?;
        if self.way == Way::Postcopy {
            let (came, first) = (number("after the guest came")?, number("touched with the first")?);
            ensure!(came > 2000, "only {came} pages came after the guest: {said}");
            // Some were on their way when they were asked for.
            ensure!(first < came / 2, "who waited had to wait for {first} pages of {came}: {said}");
            let later = number(&format!("left: passes {passes},"))?;
            ensure!(later > 0, "no page went after the guest: {said}");
            let mut told = Vec::new();
            while told.last().is_none_or(|last| last != "completed") {
                let event = target.wait_event("MIGRATION", PATIENCE)?;
                told.push(event.data["status"].as_str().unwrap_or_default().to_owned());
            }
            ensure!(told.iter().any(|status| status == "postcopy-active"), "QEMU's statuses were {told:?}");
        }
        let mut watchdog = None;
        if let Some(before) = before {
            let here = number("watchdog")?;
            ensure!(here == before, "QEMU's watchdog was at {before} and is at {here} in the toy");
            let after = saved_watchdog(&mut target, folder, "after.stream")?;
            ensure!(after == before + FED, "the toy left its watchdog at {}, QEMU has it at {after}", before + FED);
            watchdog = Some(after);
        }
        source.quit();
        target.quit();
        Ok(Seen { passes, watchdog })
    }

    fn start(&self, root: &Root, folder: &Path, name: &str, more: &[&str]) -> Result<Qemu> {
        let machine: &[&str] = match self.machine {
            Machine::None => &["-M", "none,accel=tcg"],
            Machine::Microvm => &["-M", "microvm,accel=tcg,rtc=on", "-device", "ib700"],
        };
        let memory = ["-m".to_owned(), format!("{}M", RAM / MIB)];
        let arguments = machine.iter().chain(more).map(|argument| argument.to_string()).chain(memory);
        Qemu::start(root, name, &arguments.collect::<Vec<_>>(), folder)
    }

    fn set_up(&self, qemu: &mut Qemu) -> Result<()> {
        qemu.set_capabilities(self.capabilities())?;
        if self.way == Way::Multifd {
            qemu.set_parameters(&json!({ "multifd-channels": 2 }))?;
        }
        Ok(())
    }

    fn capabilities(&self) -> &'static [&'static str] {
        match self.way {
            Way::Plain => &[],
            Way::ReturnPath => &["return-path"],
            Way::Multifd => &["multifd"],
            Way::Postcopy => &["return-path", "postcopy-ram"],
        }
    }

    /// Starts the toy and waits until it listens.
    fn toy(&self, judge: &Path, folder: &Path, uri: impl Fn(&str) -> String) -> Result<Toy> {
        let machine = format!("{:?}", self.machine).to_lowercase();
        let mut command = Command::new(judge);
        command.args([BUILT_IN[self.example as usize], &machine, &(RAM / MIB).to_string(), self.suite.series()]);
        command.args([uri("from.sock"), uri("to.sock")]).args(self.capabilities()).current_dir(folder);
        let output = folder.join("toy.txt");
        let file = File::create(&output)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut toy = Toy { child: command.spawn().context("starting toy_vmm")?, output };
        let deadline = Instant::now() + PATIENCE;
        while !listens(&folder.join("from.sock"))? {
            if let Some(status) = toy.child.try_wait()? {
                bail!("toy_vmm has ended ({status}): {}", toy.said());
            }
            ensure!(Instant::now() < deadline, "toy_vmm does not listen: {}", toy.said());
            thread::sleep(POLL);
        }
        Ok(toy)
    }

    /// Both are the same, but for what microvm shows over RAM.
    fn compare(&self, way: &str, from: &[u8], to: &[u8]) -> Result<()> {
        ensure!(from.len() == RAM && to.len() == RAM, "{way}: {} and {} bytes of RAM", from.len(), to.len());
        let covered = |at: usize| self.machine == Machine::Microvm && FIRMWARE.contains(&at);
        let differs = |at: &usize| from[*at..][..4096] != to[*at..][..4096] && !covered(*at);
        match (0..RAM).step_by(4096).filter(differs).collect::<Vec<_>>() {
            none if none.is_empty() => Ok(()),
            pages => bail!("{way} {} pages of RAM changed, the first at {:#x}", pages.len(), pages[0]),
        }
    }
}

/// A running toy.
struct Toy {
    child: Child,
    output: PathBuf,
}

impl Toy {
    /// What it has printed.
    fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// Waits for its end.
    fn finish(mut self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(self.said()),
                Some(status) => bail!("toy_vmm has failed ({status}): {}", self.said()),
                None => ensure!(Instant::now() < deadline, "toy_vmm does not end: {}", self.said()),
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a process waits for connections at a UNIX socket. Its file is there before that.
fn listens(path: &Path) -> Result<bool> {
    /// `__SO_ACCEPTCON`.
    const ACCEPTS: u32 = 1 << 16;
    let sockets = fs::read_to_string("/proc/net/unix")?;
    // Address, references, protocol, flags, type, state, inode, path.
    let of_path = |line: &&str| line.split_whitespace().nth(7).is_some_and(|found| Path::new(found) == path);
    let flags = sockets.lines().find(of_path).and_then(|line| line.split_whitespace().nth(3));
    Ok(flags.and_then(|flags| u32::from_str_radix(flags, 16).ok()).is_some_and(|flags| flags & ACCEPTS != 0))
}

fn completed(state: &Value) -> bool {
    state["status"] == "completed"
}

/// Every page different, but for one of four, which is zero.
fn pattern() -> Vec<u8> {
    let page = |number: usize| {
        (0..4096).map(move |at| if number % 4 == 3 { 0 } else { (number * 7 + at * 13) as u8 ^ (number >> 8) as u8 })
    };
    (0..PATTERN / 4096).flat_map(page).collect()
}

/// RAM as the guest sees it.
fn memory(qemu: &mut Qemu, folder: &Path, name: &str) -> Result<Vec<u8>> {
    let file = folder.join(name);
    qemu.execute("pmemsave", json!({ "val": 0, "size": RAM, "filename": file }))?;
    Ok(fs::read(file)?)
}

/// Starts the watchdog as a guest does, and gives the time at which it will bark, which does not change until then.
fn arm(qemu: &mut Qemu, folder: &Path) -> Result<i64> {
    qemu.execute("watchdog-set-action", json!({ "action": "none" }))?;
    // Port 0x443 starts it; 0 means 30 s.
    qemu.human("o /b 0x443 0")?;
    qemu.execute("stop", Value::Null)?;
    let armed = saved_watchdog(qemu, folder, "before.stream")?;
    ensure!(armed > 0, "the watchdog has not started: {armed}");
    // QEMU does not migrate a guest again that has gone to a file and has not run since.
    qemu.execute("cont", Value::Null)?;
    Ok(armed)
}

/// Saves a guest to a file and reads the watchdog in it.
fn saved_watchdog(qemu: &mut Qemu, folder: &Path, name: &str) -> Result<i64> {
    let file = folder.join(name);
    // One that reads is all that a file needs.
    qemu.execute("migrate-set-capabilities", off(&["return-path", "multifd"]))?;
    qemu.execute("migrate", json!({ "uri": format!("exec:cat > {}", file.display()) }))?;
    qemu.wait_migration(PATIENCE, completed)?;
    let mut stream = Driver::new(File::open(&file)?, Decoder::new(DecoderOptions::default()));
    let mut inside = false;
    while let Some(event) = stream.next()? {
        match event {
            Event::Section { header, .. } => inside = header.idstr == *WATCHDOG,
            Event::Body(body) if inside => {
                let bytes = <[u8; 8]>::try_from(body).with_context(|| format!("{} bytes of state", body.len()))?;
                return Ok(i64::from_be_bytes(bytes));
            }
            _ => {}
        }
    }
    bail!("QEMU's file has no section '{WATCHDOG}'")
}

fn off(names: &[&str]) -> Value {
    let list: Vec<Value> = names.iter().map(|name| json!({ "capability": name, "state": false })).collect();
    json!({ "capabilities": list })
}
