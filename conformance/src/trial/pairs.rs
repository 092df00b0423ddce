//! Hundreds of pairs of set-ups: what `qevm check` foretells, and what the destination, a real QEMU, does.
//!
//! Every line of `pairs.txt` is a device with properties that can be set in another way. On the newest release the
//! plain set-up goes to each variant and back; and it goes up and down between releases as it is, on a machine type
//! that both have. Nothing is expected beforehand: the destination is the judge.
//!
//! In lines that start with `ran` the source has booted Linux, whose drivers have accepted features and set up queues;
//! the destination's own stream, which `qevm check` is given, is that of a machine that was never started.

use super::question::TrialEnv;
use super::side::{Fate, Side, load, side, write, write_ran};
use crate::linux::{Linux, READY};
use crate::roots::{Root, Suite};
use crate::subject::Subject;
use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

const TABLE: &str = include_str!("pairs.txt");
/// Releases that the plain set-ups go between, and the version of the machine type that both have.
const RELEASES: [(Suite, Suite, &str); 4] = [
    (Suite::Bookworm, Suite::Sid, "7.2"),
    (Suite::Sid, Suite::Bookworm, "7.2"),
    (Suite::Trixie, Suite::Sid, "10.0"),
    (Suite::Sid, Suite::Trixie, "10.0"),
];
/// The part of all pairs that may be undecidable, per cent.
const UNDECIDABLE: usize = 5;

/// A source and a destination.
#[derive(Debug, Clone)]
pub struct Pair {
    source: SetUp,
    destination: SetUp,
    /// Linux has booted at the source.
    ran: bool,
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [(from, source), (to, destination)] = [&self.source, &self.destination];
        if self.ran {
            f.write_str("ran ")?;
        }
        if source == destination {
            return write!(f, "{} to {}: {source}", from.series(), to.series());
        }
        write!(f, "{}: {source} TO {destination}", from.series())
    }
}

/// What `qevm check` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Foretold {
    /// 0
    Loads,
    /// 1
    Refused,
    /// 3
    Undecidable,
}

/// What has become of a pair.
#[derive(Debug)]
pub enum Judged {
    /// A release does not have the device or the property.
    NotThere,
    /// The destination's verdict, what it said, and what was foretold for which reason.
    Judged {
        /// It loads.
        loads: bool,
        /// What the destination said.
        said: String,
        /// What qevm said beforehand.
        foretold: Foretold,
        /// The findings that it is based on.
        findings: String,
    },
}

impl Judged {
    /// Foretold otherwise than it has come.
    pub fn is_wrong(&self) -> bool {
        match self {
            Judged::Judged { loads: true, foretold, .. } => *foretold == Foretold::Refused,
            Judged::Judged { loads: false, foretold, .. } => *foretold == Foretold::Loads,
            Judged::NotThere => false,
        }
    }
}

/// All pairs of the table.
pub fn all() -> Vec<Pair> {
    let lines = TABLE.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(of_line).collect()
}

fn of_line(line: &str) -> Vec<Pair> {
    let mut fields = line.split('|').map(str::trim);
    let (machine, arguments) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
    let (ran, machine) = machine.strip_prefix("ran ").map_or((false, machine), |machine| (true, machine));
    let plain = arguments.replace("{}", "");
    let mut pairs = Vec::new();
    for variant in fields.filter(|variant| !variant.is_empty()) {
        // A further option stands apart.
        let variant = if variant.starts_with('-') { format!(" {variant}") } else { variant.to_owned() };
        let [from, to] =
            [&plain, &arguments.replace("{}", &variant)].map(|all| (Suite::Sid, format!("{machine} {all}")));
        pairs.push(Pair { source: from.clone(), destination: to.clone(), ran });
        pairs.push(Pair { source: to, destination: from, ran });
    }
    if ran {
        // A boot takes long under TCG.
        return pairs;
    }
    for (from, to, version) in RELEASES {
        let (name, options) = machine.split_once(',').map_or((machine, String::new()), |(n, o)| (n, format!(",{o}")));
        let versioned = match name {
            "q35" => format!("pc-q35-{version}{options}"),
            "pc" => format!("pc-i440fx-{version}{options}"),
            // It has no versions.
            other => format!("{other}{options}"),
        };
        let set_up = format!("{versioned} {plain}");
        pairs.push(Pair { source: (from, set_up.clone()), destination: (to, set_up), ran });
    }
    pairs
}

/// Asks for every pair, several at a time, telling `each` as it ends.
///
/// # Errors
/// A root is missing, or qevm itself fails.
pub fn run(pairs: &[Pair], subject: &Subject, each: impl Fn(&Pair, &Judged) + Sync) -> Result<Vec<Judged>> {
    let mut roots = BTreeMap::new();
    for suite in [Suite::Bookworm, Suite::Trixie, Suite::Sid] {
        roots.insert(suite, Root::install(suite)?);
    }
    let linux = pairs.iter().any(|pair| pair.ran).then(Linux::install).transpose()?;
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let desk = Desk {
        roots: &roots,
        subject,
        folder: scratch.path(),
        written: Mutex::default(),
        linux,
        count: AtomicUsize::new(0),
    };
    let (next, judged) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        let work = || -> Result<()> {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(pair) = pairs.get(n) else { return Ok(()) };
                let found = desk.judge(n, pair).with_context(|| pair.to_string())?;
                each(pair, &found);
                judged.lock().push((n, found));
            }
        };
        let workers: Vec<_> =
            (0..thread::available_parallelism().map_or(2, Into::into)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a worker has panicked")))
    })?;
    let mut judged = judged.into_inner();
    judged.sort_by_key(|(n, _)| *n);
    Ok(judged.into_iter().map(|(_, found)| found).collect())
}

/// A release, and the machine with arguments.
type SetUp = (Suite, String);
/// Where the stream of a set-up is, once it was written, if it can be.
type Stream = Arc<OnceLock<Option<PathBuf>>>;

/// What all pairs are judged with. Each set-up writes its stream once.
struct Desk<'d> {
    roots: &'d BTreeMap<Suite, Root>,
    subject: &'d Subject,
    folder: &'d Path,
    /// By the set-up and whether it has run.
    written: Mutex<BTreeMap<(SetUp, bool), Stream>>,
    /// The guest of pairs that have run, if there are any.
    linux: Option<Linux>,
    count: AtomicUsize,
}

impl Desk<'_> {
    fn judge(&self, n: usize, pair: &Pair) -> Result<Judged> {
        let [Some(stream), Some(local)] = [self.stream(&pair.source, pair.ran), self.stream(&pair.destination, false)]
        else {
            return Ok(Judged::NotThere);
        };
        let folder = self.folder.join(format!("p{n}"));
        std::fs::create_dir(&folder)?;
        let env = TrialEnv { roots: self.roots, subject: self.subject, scratch: &folder };
        let (fate, said) = load(&env, &of(&self.placed(&pair.destination, "null")), &stream)?;
        std::fs::remove_dir_all(&folder)?;

        let [stream, local] = [stream, local].map(|path| path.display().to_string());
        let ran =
            self.subject.run(&["check", "--json", "--capability=postcopy-ram=off", "--against", &local, &stream])?;
        let last = ran.stdout.lines().last().unwrap_or_default();
        let found: Value =
            serde_json::from_str(last).with_context(|| format!("qevm check: {}", ran.stderr.trim_end()))?;
        let foretold = match ran.code {
            Some(0) => Foretold::Loads,
            Some(1) => Foretold::Refused,
            Some(3) => Foretold::Undecidable,
            _ => bail!("qevm check ends with {}: {}", ran.status, ran.stderr.trim_end()),
        };
        let findings = found["findings"].as_array().into_iter().flatten().filter(|f| f["outcome"] != "loads");
        let findings = findings.map(Value::to_string).collect::<Vec<_>>().join("; ");
        Ok(Judged::Judged { loads: fate == Fate::Loads, said, foretold, findings })
    }

    /// The set-up with the names of the guest's files, and what its serial port is.
    fn placed(&self, (suite, arguments): &SetUp, serial: &str) -> SetUp {
        let files = self.linux.as_ref().map_or(String::new(), |Linux { kernel, initramfs, .. }| {
            let (kernel, initramfs) = (kernel.display(), initramfs.display());
            format!("-kernel {kernel} -initrd {initramfs} -append console=ttyS0 -serial {serial}")
        });
        (*suite, arguments.replace("{linux}", &files))
    }

    /// The stream of a set-up that was never started, or that has `ran`, or nothing where the release does not have it.
    fn stream(&self, set_up: &SetUp, ran: bool) -> Option<PathBuf> {
        let cell = {
            let mut written = self.written.lock();
            written.entry((set_up.clone(), ran)).or_default().clone()
        };
        let path = cell.get_or_init(|| {
            let folder = self.folder.join(format!("s{}", self.count.fetch_add(1, Ordering::Relaxed)));
            let env = TrialEnv { roots: self.roots, subject: self.subject, scratch: &folder };
            let file = folder.join("stream.qevm");
            std::fs::create_dir(&folder).ok()?;
            let serial = folder.join("serial.txt");
            let written = match ran {
                true => {
                    let set_up = self.placed(set_up, &format!("file:{}", serial.display()));
                    write_ran(&env, &of(&set_up), (&serial, READY), &file)
                }
                false => write(&env, &of(&self.placed(set_up, "null")), "source", &file),
            };
            written.is_ok().then_some(file)
        });
        path.clone()
    }
}

fn of(set_up: &SetUp) -> Side<'_> {
    side(set_up.0, &set_up.1)
}

/// How often what was foretold came to what.
#[derive(Debug, Default)]
pub struct Confusion {
    /// By what was foretold: how many the destination loaded, and how many it refused.
    pub counts: BTreeMap<Foretold, (usize, usize)>,
    /// Pairs that a release cannot be set up for.
    pub not_there: usize,
}

impl Confusion {
    /// Counts.
    pub fn of(judged: &[Judged]) -> Confusion {
        let mut confusion = Confusion::default();
        for found in judged {
            match found {
                Judged::NotThere => confusion.not_there += 1,
                Judged::Judged { loads, foretold, .. } => {
                    let (loaded, refused) = confusion.counts.entry(*foretold).or_default();
                    *if *loads { loaded } else { refused } += 1;
                }
            }
        }
        confusion
    }

    fn count(&self, foretold: Foretold) -> (usize, usize) {
        self.counts.get(&foretold).copied().unwrap_or_default()
    }

    /// Nothing was foretold wrongly, and little was undecidable.
    pub fn holds(&self) -> bool {
        let (loads, refused, open) =
            (self.count(Foretold::Loads), self.count(Foretold::Refused), self.count(Foretold::Undecidable));
        let all = loads.0 + loads.1 + refused.0 + refused.1 + open.0 + open.1;
        loads.1 == 0 && refused.0 == 0 && (open.0 + open.1) * 100 <= all * UNDECIDABLE
    }

    /// As one JSON object.
    pub fn to_json(&self) -> Value {
        let cell = |foretold| {
            let (loaded, refused) = self.count(foretold);
            json!({ "loaded": loaded, "refused": refused })
        };
        json!({
            "loads": cell(Foretold::Loads), "refused": cell(Foretold::Refused),
            "undecidable": cell(Foretold::Undecidable), "not_there": self.not_there,
        })
    }
}

impl fmt::Display for Confusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<24} {:>9} {:>9}", "qevm check says", "loaded", "refused")?;
        for (name, foretold) in
            [("loads", Foretold::Loads), ("refused", Foretold::Refused), ("not decidable", Foretold::Undecidable)]
        {
            let (loaded, refused) = self.count(foretold);
            writeln!(f, "{name:<24} {loaded:>9} {refused:>9}")?;
        }
        write!(f, "not to be set up: {}", self.not_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_to_each_variant_and_back_and_between_releases() {
        let pairs = of_line("q35,smm=off | -device x{} -y | ,a=1 | -global b.c=2");
        let lines: Vec<String> = pairs.iter().map(Pair::to_string).collect();
        let plain = "q35,smm=off -device x -y";
        assert_eq!(lines[0], format!("11.1: {plain} TO q35,smm=off -device x,a=1 -y"));
        assert_eq!(lines[3], format!("11.1: q35,smm=off -device x -global b.c=2 -y TO {plain}"));
        assert_eq!(lines[4], "7.2 to 11.1: pc-q35-7.2,smm=off -device x -y");
        assert_eq!(lines.len(), 4 + RELEASES.len());
    }

    #[test]
    fn a_wrong_word_fails_the_whole() {
        let found = |loads, foretold| Judged::Judged { loads, said: String::new(), foretold, findings: String::new() };
        let right = || vec![found(true, Foretold::Loads), found(false, Foretold::Refused), Judged::NotThere];
        assert!(Confusion::of(&right()).holds());
        for wrong in [found(false, Foretold::Loads), found(true, Foretold::Refused)] {
            assert!(wrong.is_wrong());
            let all: Vec<Judged> = right().into_iter().chain([wrong]).collect();
            assert!(!Confusion::of(&all).holds());
        }
        let open: Vec<Judged> = right().into_iter().chain([found(true, Foretold::Undecidable)]).collect();
        assert!(!Confusion::of(&open).holds(), "a third is more than a twentieth");
    }

    #[test]
    fn the_table_has_as_many_pairs_as_promised() {
        assert!(all().len() >= 700, "{}", all().len());
    }
}
