//! The command line.

mod channels;
mod common;
mod crash;
mod lab;
mod lifecycle;
mod link;
mod migrate;
mod pairs;
mod postcopy;
mod restore;
mod snapshot;
mod targets;
mod tool;
mod toy;

use anyhow::Result;
use channels::Channels;
use clap::{Args, Parser, Subcommand};
use common::{Choice, Reporting, subject, wanted};
use crash::Crash;
use lab::Lab;
use lifecycle::Lifecycle;
use link::Link;
use migrate::Migrate;
use pairs::Pairs;
use postcopy::Postcopy;
use qevm_conformance::analyze::Script;
use qevm_conformance::matrix::{self, Options};
use qevm_conformance::record::{self, Recording};
use qevm_conformance::report::{Outcome, Report, Row};
use qevm_conformance::roots::{Root, Suite};
use qevm_conformance::scenario::Scenario;
use qevm_conformance::{bench, catalogue, corpus, judge, peer, table, trial};
use restore::Restore;
use snapshot::Snapshot;
use std::path::{Path, PathBuf};
use std::time::Instant;
use targets::Targets;
use tool::Tool;
use toy::Toy;

#[derive(Parser)]
#[command(name = "qevm-conformance", version, about = "Real QEMUs of several releases as the judge of qevm")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Install QEMU of Debian's suites side by side under $QEVM_CACHE (default: ~/.cache/qevm)
    Setup {
        /// Only these suites (default: all)
        #[arg(long, value_enum)]
        suite: Vec<Suite>,
    },
    /// Record scenarios with real QEMU and hold qevm's findings against QEMU's
    Matrix(Matrix),
    /// Show a running guest that visits reference-vmm from a real QEMU and goes home, and what happens on the way.
    ///
    /// The last line on standard output is one JSON object. Its `rounds`, `bytes` and `total_ms` are sums over both
    /// hops, `downtime_ms` is the longer gap between the event STOP at the source and RESUME at the destination; `hops`
    /// has each.
    Demo(Demo),
    /// Pair qevm receive and qevm send with real QEMUs over page channels, in legal, illegal and differing set-ups
    Channels(Channels),
    /// Move running guests between real QEMUs and reference-vmm
    Peer(Peer),
    /// Cut links, kill and reset in the worst moments of a migration: where does the guest run then (needs root)
    Lifecycle(Lifecycle),
    /// Move guests from real QEMUs to toy_vmm, the example of qevm-migration, and back
    Toy(Toy),
    /// Run reference-vmm in an emulated machine whose KVM works as on hardware: dirty log, dirty rings, stale pages
    Lab(Lab),
    /// Ask real QEMUs single questions: do they load what qevm writes, and does qevm foresee what they refuse
    Trial(Trial),
    /// Ask real QEMUs about hundreds of pairs of set-ups, and count how often qevm check foretells what they do
    Pairs(Pairs),
    /// Capture machines of all targets and judge qevm by them: streams, RAM, values, guest-physical memory, conversions
    Targets(Targets),
    /// Compare ELF cores and kdump-compressed dumps of guests of all targets with what their QEMU's dump-guest-memory
    /// writes of them
    Cores {
        /// Only guests whose name contains this (may be given several times)
        #[arg(long)]
        only: Vec<String>,
    },
    /// Open dumps of Debian's Linux in `crash`, with the kernel's symbols: QEMU's own and those that qevm makes of a
    /// stream (about 450 MB of downloads)
    Crash(Crash),
    /// Measure qevm against QEMU's own tools, several times each in turn, on a machine that does nothing else
    Bench {
        #[command(subcommand)]
        what: BenchCommand,
    },
    /// Record scenarios with real QEMU into one folder each, without judging
    Record {
        /// Where the recordings go
        #[arg(long)]
        out: PathBuf,
        /// Only scenarios whose name contains this (may be given several times)
        #[arg(long)]
        only: Vec<String>,
        /// Record again what is already there
        #[arg(long)]
        again: bool,
    },
    /// Compare every field of recordings with what QEMU's own analyze-migration.py reads
    Analyze {
        /// The folder that `record` filled
        corpus: PathBuf,
        /// Only recordings whose name contains this (may be given several times)
        #[arg(long)]
        only: Vec<String>,
    },
    /// Print the catalogue of device layouts that recordings show, for savevm's layouts.txt
    Catalogue {
        /// The folder that `record` filled
        corpus: PathBuf,
        /// Further streams with a description, as RELEASE=FILE
        streams: Vec<String>,
    },
    /// Judge qevm by recordings made earlier
    Judge {
        /// The folder that `record` filled
        corpus: PathBuf,
        /// Only recordings whose name contains this (may be given several times)
        #[arg(long)]
        only: Vec<String>,
        #[command(flatten)]
        reporting: Reporting,
    },
}

#[derive(Args)]
pub(crate) struct Matrix {
    /// The representative subset (the default)
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every scenario
    #[arg(long)]
    full: bool,
    /// Only scenarios whose name contains this (may be given several times; of all, not of the subset alone)
    #[arg(long)]
    only: Vec<String>,
    /// Scenarios in flight at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Keep all recordings in this folder
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Print the scenarios and stop
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    reporting: Reporting,
}

#[derive(Args)]
pub(crate) struct Demo {
    /// Print nothing on standard output but the JSON object
    #[arg(long)]
    json: bool,
    /// Whose QEMU the guest comes from
    #[arg(long, value_enum, default_value_t = Suite::Sid)]
    suite: Suite,
}

impl Demo {
    fn run(self) -> Result<bool> {
        let options = peer::demo::Options { suite: self.suite, quiet: self.json, ..Default::default() };
        let object = peer::demo::run(&options, &peer::Monitor::new(std::env::current_exe()?));
        println!("{object}");
        Ok(object["result"] == "ok")
    }
}

#[derive(Args)]
pub(crate) struct Peer {
    #[command(flatten)]
    choice: Choice,
    /// Keep consoles and logs in this folder
    #[arg(long)]
    keep: Option<PathBuf>,
    /// For a machine that is emulated: guests write less
    #[arg(long)]
    gently: bool,
    #[command(flatten)]
    reporting: Reporting,
}

impl Peer {
    fn run(self) -> Result<bool> {
        let name = |case: &peer::Case| case.journey().name.clone();
        let Some(mut cases) = self.choice.rows(peer::table::all, peer::table::quick, name, name) else {
            return Ok(true);
        };
        if self.gently {
            cases = cases.into_iter().map(peer::Case::gently).collect();
        }
        let program = peer::Monitor::new(std::env::current_exe()?);
        let report = peer::run(&cases, &program, self.keep, |row| println!("{}", row.line()))?;
        self.reporting.tell("journeys", &report, peer::summary(&report))?;
        Ok(report.holds())
    }
}

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Reading a stream from the page cache: skimming over RAM, with digests, with everything checked, and
    /// analyze-migration.py
    Decode(Decode),
    /// Move a running guest over a limited link, between two QEMUs and between two reference-vmm by turns (needs root).
    ///
    /// The link is a veth pair between two network namespaces with a token bucket (`tc` tbf) at each end. The last line
    /// on standard output is one JSON object, and the status is 1 when reference-vmm misses a goal. Run it in a release
    /// build on an idle machine: figures of a busy one mean nothing.
    Link(Link),
    /// Moving a stopped guest with random memory over page channels: QEMU and reference-vmm in every pairing
    Migrate(Migrate),
    /// Guests that go before their memory and read it at random: how long they wait for a page, between two QEMUs and
    /// between two reference-vmm by turns. The status is 1 when reference-vmm misses a goal
    Postcopy(Postcopy),
    /// Guests that go on from a mapped-ram file: QEMU's full load, reference-vmm's, and memory that stays in the file
    /// until it is touched
    Restore(Restore),
    /// Background snapshots of a guest that rewrites its memory: how long it is paused, and how much slower it is
    /// meanwhile
    Snapshot(Snapshot),
    /// What extract and convert cost beside cp of the same image, and inspect without digests beside one with them. The
    /// status is 1 when a goal is missed
    Tool(Tool),
}

#[derive(Args)]
pub(crate) struct Decode {
    /// Guest RAM, every page of it different and none zero, MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..))]
    mib: u64,
    /// How often each reader runs
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..))]
    repetitions: u64,
    /// Print nothing but one JSON object
    #[arg(long)]
    json: bool,
}

impl Decode {
    fn run(self) -> Result<bool> {
        let options = bench::Options { mib: self.mib, repetitions: self.repetitions, quiet: self.json };
        let report = bench::decode(&options, &subject()?)?;
        println!("{}", report.json());
        Ok(report.holds())
    }
}

#[derive(Args)]
pub(crate) struct Trial {
    /// Only trials whose name contains this (may be given several times)
    #[arg(long)]
    only: Vec<String>,
    /// Print the trials and stop
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    reporting: Reporting,
}

impl Trial {
    fn run(self) -> Result<bool> {
        let mut trials = trial::all();
        trials.retain(|trial| wanted(&trial.name, &self.only));
        if self.list {
            trials.iter().for_each(|trial| println!("{}", trial.name));
            return Ok(true);
        }
        let report = trial::run(&trials, &subject()?, |row| println!("{}", row.line()));
        self.reporting.tell("trials", &report, report.summary())?;
        Ok(report.holds())
    }
}

impl Command {
    /// Runs it; false when qevm was found wanting.
    pub(crate) fn run(self) -> Result<bool> {
        match self {
            Command::Setup { suite } => setup(&suite),
            Command::Matrix(matrix) => matrix.run(),
            Command::Channels(channels) => channels.run(),
            Command::Peer(peer) => peer.run(),
            Command::Lifecycle(lifecycle) => lifecycle.run(),
            Command::Toy(toy) => toy.run(),
            Command::Lab(lab) => lab.run(),
            Command::Demo(demo) => demo.run(),
            Command::Trial(trial) => trial.run(),
            Command::Pairs(pairs) => pairs.run(),
            Command::Targets(targets) => targets.run(),
            Command::Cores { only } => compare_cores(&only),
            Command::Crash(crash) => crash.run(),
            Command::Bench { what: BenchCommand::Decode(decode) } => decode.run(),
            Command::Bench { what: BenchCommand::Link(link) } => link.run(),
            Command::Bench { what: BenchCommand::Migrate(migrate) } => migrate.run(),
            Command::Bench { what: BenchCommand::Postcopy(postcopy) } => postcopy.run(),
            Command::Bench { what: BenchCommand::Restore(restore) } => restore.run(),
            Command::Bench { what: BenchCommand::Snapshot(snapshot) } => snapshot.run(),
            Command::Bench { what: BenchCommand::Tool(tool) } => tool.run(),
            Command::Record { out, only, again } => record_all(&out, &only, again),
            Command::Analyze { corpus, only } => analyze_all(&corpus, &only),
            Command::Catalogue { corpus, streams } => {
                catalogue::gather(&corpus, &streams).map(|text| print!("{text}")).map(|()| true)
            }
            Command::Judge { corpus, only, reporting } => judge_all(&corpus, &only, &reporting),
        }
    }
}

fn setup(suites: &[Suite]) -> Result<bool> {
    for suite in if suites.is_empty() { &Suite::ALL } else { suites } {
        let root = Root::install(*suite)?;
        println!("{suite}: QEMU {} in {}", root.version(), root.dir().display());
        if matrix::kvm().is_ok() {
            root.host_cpu()?;
        }
    }
    Ok(true)
}

impl Matrix {
    fn run(self) -> Result<bool> {
        let mut scenarios = if self.full || !self.only.is_empty() { table::all() } else { table::quick() };
        scenarios.retain(|s| wanted(&s.name, &self.only));
        if self.list {
            for Scenario { name, quick, .. } in &scenarios {
                println!("{name}{}", if *quick { " (quick)" } else { "" });
            }
            return Ok(true);
        }
        let options = Options { jobs: self.jobs, keep: self.keep };
        let report = matrix::run(&scenarios, &subject()?, &options, |row| println!("{}", row.line()))?;
        self.reporting.print(&report)
    }
}

fn record_all(out: &Path, only: &[String], again: bool) -> Result<bool> {
    let (mut failed, subject) = (0, subject()?);
    for scenario in table::all() {
        let folder = out.join(scenario.folder());
        if !wanted(&scenario.name, only) || (!again && folder.join(record::MANIFEST).exists()) {
            continue;
        }
        let root = Root::install(scenario.suite)?;
        let started = Instant::now();
        match record::record(&scenario, &root, &subject, &folder) {
            Ok(_) => println!("recorded {} in {:.1} s", scenario.name, started.elapsed().as_secs_f64()),
            Err(e) => {
                failed += 1;
                println!("FAILED   {}: {e:#}", scenario.name);
            }
        }
    }
    for suite in Suite::ALL {
        let folder = out.join("dump-vmstate");
        if again || !folder.join(format!("{}-microvm.json", suite.series())).exists() {
            corpus::dump_vmstate(&Root::install(suite)?, &folder)?;
        }
    }
    println!("{} recordings in {}, {failed} could not be made", corpus::write_index(out)?, out.display());
    Ok(failed == 0)
}

fn analyze_all(corpus: &Path, only: &[String]) -> Result<bool> {
    let (script, subject) = (Script::install()?, subject()?);
    let (mut equal, mut differing, mut refused, mut fields) = (0, 0, 0, 0);
    for folder in corpus::folders(corpus)? {
        let recording = Recording::open(&folder)?;
        if !wanted(&recording.name, only) {
            continue;
        }
        match judge::judge_fields(&recording, &folder, &subject, &script)? {
            Ok(comparison) => {
                fields += comparison.fields;
                if comparison.different == 0 {
                    equal += 1;
                } else {
                    differing += 1;
                    println!(
                        "DIFFERS {}: {} values: {:?}",
                        recording.name, comparison.different, comparison.differences
                    );
                }
            }
            Err(why) => {
                refused += 1;
                println!("only we {}: {why}", recording.name);
            }
        }
    }
    println!(
        "{} recordings: {fields} values are the same as analyze-migration.py's in {equal}, {differing} differ, \
         {refused} it cannot read",
        equal + differing + refused
    );
    Ok(differing == 0)
}

fn judge_all(corpus: &Path, only: &[String], reporting: &Reporting) -> Result<bool> {
    let (started, subject) = (Instant::now(), subject()?);
    let mut rows = Vec::new();
    for folder in corpus::folders(corpus)? {
        let recording = Recording::open(&folder)?;
        if !wanted(&recording.name, only) {
            continue;
        }
        let started = Instant::now();
        let judgement = judge::judge(&recording, &folder, &subject)?;
        let outcome = match judgement.problems.is_empty() {
            true => Outcome::Holds(judgement),
            false => Outcome::Fails(judgement),
        };
        let row = Row { name: recording.name, outcome, duration: started.elapsed().as_secs_f64() };
        println!("{}", row.line());
        rows.push(row);
    }
    let seconds = started.elapsed().as_secs_f64();
    reporting.print(&Report { rows, versions: Default::default(), seconds })
}

fn compare_cores(only: &[String]) -> Result<bool> {
    let outcomes = qevm_conformance::cores::compare(only)?;
    for outcome in &outcomes {
        match &outcome.result {
            Ok(alike) => println!(
                "same {}: {} notes, {} MiB of memory, {} pages of a dump ({} of firmware in QEMU's alone)",
                outcome.name,
                alike.notes,
                alike.bytes >> 20,
                alike.pages,
                alike.more
            ),
            Err(error) => println!("FAIL {}: {error:#}", outcome.name),
        }
    }
    let failures = outcomes.iter().filter(|outcome| outcome.result.is_err()).count();
    println!("{}", serde_json::json!({ "guests": outcomes.len(), "failures": failures }));
    Ok(failures == 0)
}
