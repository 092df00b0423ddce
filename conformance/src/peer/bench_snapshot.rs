//! What a background snapshot costs the guest that runs on: reference-vmm and QEMU by turns, in one run.
//!
//! The guest rewrites a part of its memory at a steady rate and reports every five milliseconds, by its own clock. Of
//! each snapshot it is looked at how long it was paused, how long it said nothing, and how much of its rate it kept.
//! Numbers mean something only on a machine that does nothing else.

use super::endpoint::Endpoint;
use super::monitor::Monitor;
use super::snapshot::runs_on;
use super::{Env, Journey, Link, Load, Stop};
use crate::bench::figures::Summary;
use crate::patience::PATIENCE;
use crate::processor_time;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::Progress;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// MiB that the guest rewrites; a quarter of that it only checks.
    pub mib: u32,
    /// MiB that it rewrites in a second.
    pub rate: u32,
    /// MiB that are written to the file in a second.
    pub bandwidth: u32,
    /// How often each is measured.
    pub repetitions: u64,
    /// The release of QEMU.
    pub suite: Suite,
}

/// One snapshot.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// From the event STOP to RESUME, ms.
    pause: f64,
    /// The longest time without a line of the guest's, ms.
    gap: f64,
    /// Part of its rate that the guest kept.
    kept: f64,
    seconds: f64,
    /// Of the monitor without its vCPUs, seconds.
    cpu: f64,
}

/// The name of a figure, and what it is of a snapshot.
type Column = (&'static str, fn(&Sample) -> f64);

const COLUMNS: [Column; 5] = [
    ("pause_ms", |s| s.pause),
    ("longest_gap_ms", |s| s.gap),
    ("rate_kept", |s| s.kept),
    ("seconds", |s| s.seconds),
    ("cpu_s", |s| s.cpu),
];

/// Takes snapshots by turns, tells each and each median, and gives all medians.
///
/// # Errors
/// A monitor does not start, a snapshot fails, or the guest finds a page that is not as it has left it.
pub fn snapshot(options: &Options, program: &Monitor, mut tell: impl FnMut(&str)) -> Result<Value> {
    let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
    let roots = BTreeMap::from([(options.suite, Root::install(options.suite)?)]);
    let env = Env { roots: &roots, program, scratch: scratch.path(), more: &[] };
    let stops = [Stop::Qemu(options.suite, Accel::Kvm), Stop::Reference];
    let mut samples: [Vec<Sample>; 2] = Default::default();
    for repetition in 0..options.repetitions {
        // A machine may be faster at its beginning.
        for turn in [repetition % 2, (repetition + 1) % 2].map(|turn| turn as usize) {
            let sample = take(options, stops[turn], &env).with_context(|| stops[turn].to_string())?;
            let figures = COLUMNS.map(|(name, of)| format!("{name} {:.3}", of(&sample)));
            tell(&format!("{:<5} {}", stops[turn].to_string(), figures.join(", ")));
            samples[turn].push(sample);
        }
    }
    let [qemu, reference] = &samples;
    let mut columns = serde_json::Map::new();
    for (name, of) in COLUMNS {
        let figures = |samples: &[Sample]| Summary::of(samples.iter().map(of)).context("no samples");
        let times = Summary::of_ratios(reference.iter().map(of), qemu.iter().map(of)).context("no samples")?;
        let (qemu, reference) = (figures(qemu)?, figures(reference)?);
        let ratio = times.ratio();
        tell(&format!("{name:<16} QEMU {:9.3}, reference-vmm {:9.3}, times {ratio}", qemu.median, reference.median));
        columns.insert(name.into(), json!({ "qemu": qemu, "reference_vmm": reference, "times_qemu": times }));
    }
    Ok(
        json!({ "qemu": options.suite.series(), "mib": options.mib, "rate": options.rate, "repetitions": options.repetitions, "results": columns }),
    )
}

fn take(options: &Options, stop: Stop, env: &Env<'_>) -> Result<Sample> {
    let Options { mib, rate, .. } = options;
    let load = Load {
        memory: mib + mib.div_ceil(4) + 64,
        payload: format!("dirty={mib}M rate={rate}M hold={}M zero=2M verify=65536 report=5", mib.div_ceil(4)),
        ..Load::default()
    };
    let journey = Journey {
        name: "snapshot".into(),
        stops: vec![stop],
        link: Link::File,
        capabilities: Vec::new(),
        parameters: Default::default(),
        postcopy: None,
        tls: None,
        load,
        quick: false,
    };
    let path = env.scratch.join("snapshot");
    let mut here = journey.boot(env, &mut |_| ())?;
    here.monitor().set_capabilities(&["background-snapshot"])?;
    here.monitor().set_parameters(&json!({ "max-bandwidth": u64::from(options.bandwidth) << 20 }))?;
    // A second as it runs without.
    let booted = lines(&here)?.len();
    let from = here.progress()?.context("the guest says nothing")?.ms;
    here.wait_progress("run for a second", PATIENCE, |progress| progress.ms >= from + 1000)?;
    here.monitor().forget_events();
    let cpu = processor_time::without_vcpus(here.monitor().pid())?;
    let before = lines(&here)?.len();
    let begun = Instant::now();
    let uri = here.writes_file(&path);
    here.monitor().execute("migrate", json!({ "uri": uri }))?;
    here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = processor_time::without_vcpus(here.monitor().pid())? - cpu;
    let after = lines(&here)?.len();
    let stopped = here.monitor().wait_event("STOP", PATIENCE)?.time.context("STOP has no timestamp")?;
    let resumed = here.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
    runs_on(&mut here, 1)?;
    let lines = lines(&here)?;
    ensure!(booted < before && before < after && after < lines.len(), "the guest says too little");
    let speed = |lines: &[Progress]| {
        let (first, last) = (lines.first().context("no lines")?, lines.last().context("no lines")?);
        Ok::<_, anyhow::Error>((last.written - first.written) as f64 / (last.ms - first.ms).max(1) as f64)
    };
    let during = &lines[before - 1..=after];
    let gap = during.windows(2).map(|pair| pair[1].ms.saturating_sub(pair[0].ms)).max().unwrap_or(0);
    here.end()?;
    std::fs::remove_file(&path)?;
    Ok(Sample {
        pause: resumed.saturating_sub(stopped).as_micros() as f64 / 1e3,
        gap: gap as f64,
        kept: speed(during)? / speed(&lines[booted - 1..before])?,
        seconds,
        cpu: cpu.as_secs_f64(),
    })
}

/// The progress lines that are whole.
fn lines(endpoint: &Endpoint) -> Result<Vec<Progress>> {
    let text = endpoint.text()?;
    let text = String::from_utf8_lossy(&text);
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    Ok(whole.lines().filter_map(Progress::parse).collect())
}
