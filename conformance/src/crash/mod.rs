//! Cores of guests that run Debian's Linux, opened by the program that they are for: `crash`, with the symbols of the
//! guest's kernel.
//!
//! A booted guest is stopped; its QEMU writes its own dumps of it and a stream, and `qevm extract` makes an ELF core
//! and kdump-compressed dumps of the stream. The cores have to be the same byte by byte, and `crash` has to print the
//! same of all of them, and what it prints has to name the guest's kernel and processes, and the functions on their
//! stacks. `makedumpfile` has to find the kernel's log in ours, if the guest tells of its kernel by the device
//! `vmcoreinfo`, and to make smaller dumps of them.

mod session;
mod tools;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use session::Session;
use tools::Tools;

use crate::cores;
use crate::exec;
use crate::launch::Qemu;
use crate::linux::READY;
use crate::matrix::REQUIRE_QEMU;
use crate::outcome::{Outcome, Report, Row};
use crate::patience::{LONG_PATIENCE, PATIENCE};
use crate::roots::{Root, Suite};
use crate::subject::Subject;

/// Makes it a failure that `crash` or the kernel cannot be had.
pub const REQUIRE_CRASH: &str = "QEVM_REQUIRE_CRASH";
const POLL: Duration = Duration::from_millis(100);
/// How long the guest runs on after its boot, so that its processes do what they are for.
const WORK: Duration = Duration::from_secs(2);

/// On a busy machine the kernel would take the timer of an emulated one for broken.
const APPEND: &str = "console=ttyS0 no_timer_check";

/// How QEMU writes the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    MappedRam,
}

/// A guest, and how its stream is written.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    suite: Suite,
    machine: &'static str,
    /// It has the device `vmcoreinfo`.
    noted: bool,
    form: Form,
}

/// What `crash` showed of all dumps of a guest.
#[derive(Debug, Clone, Serialize)]
pub struct Seen {
    /// The kernel's release.
    pub release: String,
    /// Notes of an ELF core that are the same as QEMU's, byte by byte.
    pub notes: usize,
    /// MiB of its memory that are.
    pub mib: u64,
    /// Dumps of which it printed the same.
    pub dumps: usize,
    /// Lines for each.
    pub lines: usize,
    /// Processes, threads of the kernel among them.
    pub tasks: usize,
    /// Functions on their stacks.
    pub frames: usize,
    /// Lines of the kernel's log that `makedumpfile` finds; 0 where no device tells it of the kernel.
    pub log: usize,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seen { release, notes, mib, dumps, lines, tasks, frames, log } = self;
        write!(
            f,
            "{release}: {notes} notes and {mib} MiB as QEMU's; {lines} lines of crash the same of {dumps} dumps: "
        )?;
        write!(f, "{tasks} tasks, {frames} frames")?;
        match log {
            0 => Ok(()),
            log => write!(f, "; {log} lines of log by makedumpfile"),
        }
    }
}

/// All guests.
pub fn all() -> Vec<Guest> {
    let mut guests = Vec::new();
    for suite in [Suite::Bookworm, Suite::Trixie, Suite::Sid] {
        guests.push(Guest { suite, machine: "q35", noted: true, form: Form::Plain });
        // 7.2 does not have it.
        if suite != Suite::Bookworm {
            guests.push(Guest { suite, machine: "pc", noted: false, form: Form::MappedRam });
        }
    }
    guests
}

impl Guest {
    /// What reports call it.
    pub fn name(&self) -> String {
        let form = match self.form {
            Form::Plain => "plain",
            Form::MappedRam => "mapped-ram",
        };
        let device = if self.noted { "with vmcoreinfo" } else { "without vmcoreinfo" };
        format!("{} {} {device}, {form}", self.suite.series(), self.machine)
    }

    fn play(&self, root: &Root, tools: &Tools, subject: &Subject) -> Result<Seen> {
        let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
        let dumps = self.dump(root, tools, subject, scratch.path())?;
        let [theirs, _, ours, others @ ..] = &dumps[..] else { bail!("there are {} dumps", dumps.len()) };
        let (notes, bytes) = cores::same_elf(theirs, ours)?;
        let log = self.noted.then(|| read_by_makedumpfile(tools, ours, others)).transpose()?;
        let mut judge: Option<(&Path, Session)> = None;
        for dump in &dumps {
            let session = tools.crash(dump, scratch.path())?;
            match &judge {
                None => judge = Some((dump, session)),
                Some((first, judge)) => judge
                    .same(&session)
                    .map_err(|error| error.context(format!("{} against {}", file_name(dump), file_name(first))))?,
            }
        }
        let Some((_, judge)) = judge else { bail!("there is no dump") };
        if let Some(log) = &log {
            judge.has_log(log)?;
        }
        let shown = judge.shown()?;
        let release = &tools.release;
        ensure!(shown.release == *release, "the guest's kernel is {}, and not {release}", shown.release);
        let (tasks, frames) = (shown.tasks, shown.frames);
        let (dumps, lines) = (dumps.len(), judge.lines());
        let log = log.map_or(0, |log| log.lines().count());
        Ok(Seen { release: shown.release, notes, mib: bytes >> 20, dumps, lines, tasks, frames, log })
    }

    /// QEMU's own dumps of the booted guest, and then those of its stream.
    fn dump(&self, root: &Root, tools: &Tools, subject: &Subject, scratch: &Path) -> Result<Vec<PathBuf>> {
        let place = |name: &str| scratch.join(name);
        let (stream, console) = (place("stream"), place("console"));
        let mut dumps = Vec::new();
        {
            let mut qemu = Qemu::start(root, "source", &self.arguments(tools, &console), scratch)?;
            let deadline = Instant::now() + LONG_PATIENCE;
            loop {
                let said = fs::read(&console).unwrap_or_default();
                let said = String::from_utf8_lossy(&said);
                if said.contains(READY) {
                    break;
                }
                let panic = said.lines().find(|line| line.contains("Kernel panic"));
                ensure!(
                    panic.is_none() && Instant::now() < deadline,
                    "the guest does not boot: {panic:?} {}",
                    qemu.said()
                );
                thread::sleep(POLL);
            }
            thread::sleep(WORK);
            qemu.execute("stop", Value::Null)?;
            for (name, format) in [("theirs.elf", "elf"), ("theirs.kdump", "kdump-zlib")] {
                let file = format!("file:{}", place(name).display());
                qemu.execute("dump-guest-memory", json!({ "paging": false, "protocol": file, "format": format }))?;
                dumps.push(place(name));
            }
            match self.form {
                Form::Plain => exec::save(&mut qemu, &stream)?,
                Form::MappedRam => {
                    qemu.set_capabilities(&["mapped-ram"])?;
                    qemu.execute("migrate", json!({ "uri": format!("file:{}", stream.display()) }))?;
                    qemu.wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
                }
            }
            qemu.quit();
        }
        let ways: [(&str, &[&str]); 3] = [
            ("ours.elf", &["--elf"]),
            ("ours.zlib", &["--kdump-compression", "zlib", "--kdump"]),
            ("ours.zstd", &["--kdump-compression", "zstd", "--kdump"]),
        ];
        for (name, options) in ways {
            let (path, stream) = (place(name), stream.display().to_string());
            let output = path.display().to_string();
            let ran = subject.run(&[&["extract"], options, &[&output, &stream]].concat())?;
            ensure!(
                ran.success,
                "qevm extract {} ends with {}: {}",
                options.join(" "),
                ran.status,
                ran.stderr.trim_end()
            );
            dumps.push(path);
        }
        Ok(dumps)
    }

    fn arguments(&self, tools: &Tools, console: &Path) -> Vec<String> {
        let machine = format!("{},accel=tcg", self.machine);
        let (kernel, initramfs) = (tools.kernel.display().to_string(), tools.initramfs.display().to_string());
        let serial = format!("file:{}", console.display());
        let words = [
            ("-M", machine.as_str()),
            ("-m", "256"),
            ("-smp", "2"),
            ("-kernel", &kernel),
            ("-initrd", &initramfs),
            ("-append", APPEND),
            ("-serial", &serial),
        ];
        let device = self.noted.then_some(("-device", "vmcoreinfo"));
        let words = words.into_iter().chain(device);
        words.flat_map(|(option, value)| [option.to_owned(), value.to_owned()]).collect()
    }
}

/// The log of the kernel, which `makedumpfile` finds in all our dumps, and in what it makes of them.
fn read_by_makedumpfile(tools: &Tools, core: &Path, others: &[PathBuf]) -> Result<String> {
    let log = tools.log(core).context("the ELF core")?;
    for dump in [core].into_iter().chain(others.iter().map(PathBuf::as_path)) {
        let smaller = tools::beside(dump, "smaller");
        tools.filter(dump, &smaller).with_context(|| format!("filtering {}", file_name(dump)))?;
        let (whole, part) = (fs::metadata(core)?.len(), fs::metadata(&smaller)?.len());
        ensure!(part < whole, "what is left of {} has {part} bytes, and the core {whole}", file_name(dump));
        for dump in [dump, &smaller] {
            ensure!(tools.log(dump)? == log, "the log in {} is another one", file_name(dump));
        }
    }
    Ok(log)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Plays guests one after the other, telling `each` about every row as it ends.
pub fn run(guests: &[Guest], subject: &Subject, mut each: impl FnMut(&Row<Seen>)) -> Report<Seen> {
    let tools = Tools::install().map_err(|why| format!("crash and its guest cannot be had: {why:#}"));
    let mut roots: BTreeMap<Suite, Result<Root, String>> = BTreeMap::new();
    let mut rows = Vec::new();
    for guest in guests {
        let started = Instant::now();
        let root = roots.entry(guest.suite);
        let root = root.or_insert_with(|| Root::install(guest.suite).map_err(|why| format!("{why:#}")));
        let outcome = match (&tools, root) {
            (Err(why), _) => Outcome::unavailable(REQUIRE_CRASH, why),
            (_, Err(why)) => Outcome::unavailable(REQUIRE_QEMU, why),
            (Ok(tools), Ok(root)) => guest.play(root, tools, subject).into(),
        };
        let row = Row { name: guest.name(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    Report { rows }
}
