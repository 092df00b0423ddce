//! How long a guest waits for a page that is still at the source: QEMU to QEMU and reference-vmm to reference-vmm by
//! turns, in one run.
//!
//! The guest goes before its memory, whose pages it then reads in a random order as fast as it can; it measures each
//! read itself. What took longer than any page that is here takes was a remote fault. With background traffic the rest
//! of the memory comes as fast as it goes meanwhile; without, only what the guest waits for, until it has waited often
//! enough, or for ten seconds. Numbers mean something only on a machine that does nothing else.

use super::endpoint::Endpoint;
use super::monitor::Monitor;
use super::{Departure, Env, Journey, Link, Load, Stop};
use crate::bench::figures::Summary;
use crate::patience::PATIENCE;
use crate::processor_time;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::Reads;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant, SystemTime};

/// What a page that is here never takes, and one that comes over a socket always does.
const REMOTE: Duration = Duration::from_micros(16);
/// `max-postcopy-bandwidth` without background traffic, bytes per second: a page or two a window. (0 is no limit.)
const TRICKLE: u64 = 64 << 10;
/// How long, at most, they are waited for. (A QEMU without preempt channel answers requests within that limit of
/// bandwidth, too.)
const LONG_ENOUGH: Duration = Duration::from_secs(10);
/// `max-bandwidth` before the guest goes, bytes per second, so that nearly nothing comes before it.
const BEFORE: u64 = 1 << 20;
/// Goals, as multiples of QEMU.
const GOALS: [(&str, f64); 2] = [("mean us", 0.5), ("p99 us", 0.5)];

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Guest memory that is read, MiB.
    pub mib: u32,
    /// How often each is measured.
    pub repetitions: u64,
    /// Remote faults that are waited for without background traffic.
    pub faults: u64,
    /// Over a UNIX socket, not TCP.
    pub unix: bool,
    /// The release of QEMU.
    pub suite: Suite,
}

/// One way to go.
#[derive(Debug, Clone, Copy)]
struct Way {
    background: bool,
    preempt: bool,
}

impl Way {
    const ALL: [Way; 4] = [
        Way { background: false, preempt: false },
        Way { background: false, preempt: true },
        Way { background: true, preempt: false },
        Way { background: true, preempt: true },
    ];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.background { "background" } else { "no background" })?;
        f.write_str(if self.preempt { ", preempt" } else { "" })
    }
}

/// One migration.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Of remote faults, by the guest's clock, µs.
    mean: f64,
    p99: f64,
    worst: f64,
    faults: f64,
    /// Requests that the source has got.
    requests: f64,
    /// From the event RESUME until the source has completed, ms.
    last_page: f64,
    /// Of both monitors without their vCPUs, ms: until completion, or, without background traffic, until the guest has
    /// waited often enough.
    source_cpu: f64,
    destination_cpu: f64,
}

/// The name of a figure, and what it is of a migration. Those of memory in the background alone are none without it.
type Column = (&'static str, fn(&Sample) -> f64, bool);

const COLUMNS: [Column; 8] = [
    ("mean us", |s| s.mean, false),
    ("p99 us", |s| s.p99, false),
    ("worst us", |s| s.worst, false),
    ("faults", |s| s.faults, false),
    ("requests", |s| s.requests, false),
    ("last page ms", |s| s.last_page, true),
    ("source CPU ms", |s| s.source_cpu, false),
    ("destination CPU ms", |s| s.destination_cpu, false),
];

/// Migrates by turns, tells each and each median, and gives all medians, and whether all goals are met.
///
/// # Errors
/// A monitor does not start, a migration fails, or the guest finds a page that is not as it has left it.
pub fn postcopy(options: &Options, program: &Monitor, mut tell: impl FnMut(&str)) -> Result<Value> {
    let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
    let roots = BTreeMap::from([(options.suite, Root::install(options.suite)?)]);
    let env = Env { roots: &roots, program, scratch: scratch.path(), more: &[] };
    let stops = [Stop::Qemu(options.suite, Accel::Kvm), Stop::Reference];
    let mut samples: BTreeMap<(usize, usize), Vec<Sample>> = BTreeMap::new();
    for repetition in 0..options.repetitions as usize {
        for (n, way) in Way::ALL.into_iter().enumerate() {
            // A machine may be faster at its beginning.
            for turn in [repetition % 2, (repetition + 1) % 2] {
                let stop = stops[turn];
                let sample = go(options, stop, way, &env).with_context(|| format!("{stop}, {way}"))?;
                let figures = COLUMNS.map(|(name, of, _)| format!("{name} {:.1}", of(&sample)));
                tell(&format!("{:<5} {way}: {}", stop.to_string(), figures.join(", ")));
                samples.entry((n, turn)).or_default().push(sample);
            }
        }
    }
    let (mut rows, mut goals_met) = (Vec::new(), true);
    for (n, way) in Way::ALL.into_iter().enumerate() {
        let mut row = json!({ "background": way.background, "preempt": way.preempt });
        for (name, of, needs_background) in COLUMNS {
            if needs_background && !way.background {
                continue;
            }
            let values = |turn| samples.get(&(n, turn)).into_iter().flatten().map(of);
            let figures = |turn| Summary::of(values(turn)).context("no samples");
            let (qemu, reference) = (figures(0)?, figures(1)?);
            let times = Summary::of_ratios(values(1), values(0)).context("no samples")?;
            let mut line = format!(
                "{:<24} {name:<18} QEMU {qemu}, reference-vmm {reference}, times {}",
                way.to_string(),
                times.ratio()
            );
            if let Some((_, most)) = GOALS.iter().find(|(goal, _)| *goal == name) {
                let met = times.median <= *most;
                goals_met &= met;
                line += &format!("  goal {most}: {}", if met { "met" } else { "MISSED" });
            }
            tell(&line);
            row[name] = json!({ "qemu": qemu, "reference_vmm": reference, "times_qemu": times });
        }
        rows.push(row);
    }
    Ok(json!({
        "qemu": options.suite.series(), "mib": options.mib, "repetitions": options.repetitions, "goals_met": goals_met, "results": rows,
    }))
}

fn go(options: &Options, stop: Stop, way: Way, env: &Env<'_>) -> Result<Sample> {
    let Options { mib, faults, unix, .. } = *options;
    let bandwidth = if way.background { 0 } else { TRICKLE };
    let journey = Journey {
        name: "postcopy".into(),
        stops: vec![stop; 2],
        link: if unix { Link::Unix } else { Link::Tcp },
        capabilities: if way.preempt { vec!["postcopy-ram", "postcopy-preempt"] } else { vec!["postcopy-ram"] },
        parameters: [("max-postcopy-bandwidth".into(), bandwidth.into())].into_iter().collect(),
        postcopy: Some(Departure::AtOnce),
        tls: None,
        load: Load {
            memory: mib + 64,
            payload: format!("dirty=1M rate=1M hold={mib}M zero=0 verify=0 timer=0 report=100 reader=1"),
            max_bandwidth: BEFORE,
            ..Load::default()
        },
        quick: false,
    };
    let mut here = journey.start(env, 0, false)?;
    here.wait_progress("complete a pass", PATIENCE, |progress| progress.pass >= 1)?;
    let mut there = journey.start(env, 1, true)?;
    journey.prepare(&mut here, &mut there)?;
    let pids = [here.monitor().pid(), there.monitor().pid()];
    let before = times(pids)?;
    journey.leave(&mut here, &mut there, env.scratch, 1)?;
    Departure::AtOnce.start(&mut here)?;
    let mut measured = None;
    if !way.background {
        let begin = Instant::now();
        let enough = |text: &str| {
            let waited = |reads: &Reads| reads.slower(REMOTE).count();
            let reads = last_reads(text).filter(|reads| waited(reads) > 0);
            reads.filter(|reads| waited(reads) >= faults || begin.elapsed() > LONG_ENOUGH)
        };
        let reads = there.wait_text("wait for memory often enough", PATIENCE, enough)?;
        measured = Some((reads, times(pids)?));
        here.monitor().set_parameters(&json!({ "max-postcopy-bandwidth": 0 }))?;
    }
    let done = here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed");
    let ended = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    // What the destination says about a failure is worth more than the source's broken pipe.
    let done = done.map_err(|error| there.monitor().last_words().map_or(error, |said| anyhow::anyhow!(said)))?;
    let stopped = here.monitor().wait_event("STOP", PATIENCE)?.time.context("STOP has no timestamp")?;
    let resumed = there.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
    let (reads, after) = match measured {
        Some(measured) => measured,
        None => {
            let after = times(pids)?;
            // What is read from now on is all here.
            let lines = reads_of(&there)?.len();
            let next = |text: &str| reads_in(text).nth(lines);
            (there.wait_text("say how long it has waited", PATIENCE, next)?, after)
        }
    };
    let arrived = there.progress()?.context("the guest says nothing")?;
    let settled = there.wait_progress("complete a pass", PATIENCE, |progress| progress.pass >= arrived.pass + 2)?;
    ensure!(settled.stale == 0, "the guest found {} stale pages", settled.stale);
    // It may be paused in the middle of a read.
    let pause = resumed.saturating_sub(stopped);
    let at_home = reads_of(&here)?.pop().context("the guest has read nothing before it went")?;
    let reads = reads.since(&at_home).slower(REMOTE).without_one(pause);
    for endpoint in [here, there] {
        endpoint.end()?;
    }
    let micros = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e6).context("no remote fault");
    let cpu = [0, 1].map(|end| (after[end] - before[end]).as_secs_f64() * 1e3);
    Ok(Sample {
        mean: micros(reads.mean())?,
        p99: micros(reads.quantile(0.99))?,
        worst: micros(reads.quantile(1.0))?,
        faults: reads.count() as f64,
        requests: done["ram"]["postcopy-requests"].as_u64().context("no postcopy-requests")? as f64,
        last_page: ended.saturating_sub(resumed).as_secs_f64() * 1e3,
        source_cpu: cpu[0],
        destination_cpu: cpu[1],
    })
}

fn times(pids: [u32; 2]) -> Result<[Duration; 2]> {
    Ok([processor_time::without_vcpus(pids[0])?, processor_time::without_vcpus(pids[1])?])
}

fn reads_in(text: &str) -> impl Iterator<Item = Reads> {
    text.lines().filter_map(Reads::parse)
}

fn last_reads(text: &str) -> Option<Reads> {
    reads_in(text).last()
}

/// What whole lines of the guest's say.
fn reads_of(endpoint: &Endpoint) -> Result<Vec<Reads>> {
    let text = endpoint.text()?;
    let text = String::from_utf8_lossy(&text);
    Ok(reads_in(text.rsplit_once('\n').map_or("", |(whole, _)| whole)).collect())
}
