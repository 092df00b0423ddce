//! The migrations themselves.

use crate::device::{self, Made};
use crate::monitor::Running;
use crate::patience::PATIENCE;
use crate::plan::{Change, Happened, Plan, Report, Sample, Side};
use crate::qmp::QmpError;
use crate::record;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const SCRATCH: &str = "/tmp";
/// Between two looks at a migration under way. Each costs the monitors a command.
const POLL: Duration = Duration::from_millis(100);
/// By how much the guest is older than the destination. KVM takes a TSC that is set to within a second of what it is
/// already for an attempt to synchronise processors, and leaves it as it is: the clock of a guest as young as its
/// destination would go back. The guest's TSC stands while it is not running anywhere, and the destination's does not:
/// this is more than a second beyond the longest load.
const OLDER: Duration = Duration::from_secs(4);
/// A guest that runs prints a line within this time.
const BEATS: Duration = Duration::from_secs(30);
/// The counters in a sample.
const SAMPLED: [&str; 5] = ["data_size", "precopy_info", "log_reports", "read_bytes", "written_bytes"];
const ENDS: [&str; 3] = ["completed", "failed", "cancelled"];

/// Does what the plan says. A trip ends with the first migration that is not completed.
///
/// # Errors
/// A device cannot be made, a monitor does not start, or the guest does not get ready: nothing that a migration could
/// be blamed for.
pub fn run(plan: &Plan) -> Result<Vec<Report>> {
    let made = plan.devices.iter().map(Made::new).collect::<Result<Vec<_>>>()?;
    let scratch = Path::new(SCRATCH);
    let mut source = Running::start(plan.stops.first().context("a trip to nowhere")?, 0, scratch)?;
    source.configure(&plan.stops[0])?;
    wait_until_ready(&mut source, plan)?;
    let mut reports = Vec::new();
    for stop in 1..plan.stops.len() {
        thread::sleep(Duration::from_millis(plan.before_ms).max(OLDER));
        let mut destination = Running::start(&plan.stops[stop], stop, scratch)?;
        destination.configure(&plan.stops[stop])?;
        let report = migrate(plan, &made, &mut source, &mut destination, stop + 1 == plan.stops.len())?;
        let arrived = report.status == "completed";
        reports.push(report);
        if !arrived {
            break;
        }
        // The devices cannot go before their users have; the source's goes with the monitor.
        source = destination;
        source.side = Side::Source;
    }
    drop(source);
    Ok(reports)
}

/// One migration. What changes on the way, and what is recorded, is of the `last` one.
fn migrate(plan: &Plan, made: &[Made], source: &mut Running, destination: &mut Running, last: bool) -> Result<Report> {
    let (front, back) = (Path::new(SCRATCH).join("front"), Path::new(SCRATCH).join("incoming"));
    let _ = std::fs::remove_file(&back);
    let uri = |path: &Path| json!({ "uri": format!("unix:{}", path.display()) });
    destination.qmp.execute("migrate-incoming", uri(&back)).context("migrate-incoming")?;
    let to = match plan.record.as_ref().filter(|_| last) {
        Some(folder) => {
            record::start(&front, &back, Path::new(folder))?;
            &front
        }
        None => &back,
    };
    let began = Began { at: Instant::now(), since_epoch: SystemTime::now().duration_since(UNIX_EPOCH)? };
    // What has happened before is not this migration's.
    collect(source, &began, &mut Vec::new());
    let mut events = Vec::new();
    source.qmp.execute("migrate", uri(to)).context("migrate")?;
    let mut samples = Vec::new();
    let watched = if last { Some(&mut samples) } else { None };
    let (status, migration) = watch(plan, made, &began, source, destination, &mut events, watched)?;
    let ended_ms = began.at.elapsed().as_secs_f64() * 1e3;
    // Whether the guest runs is for the judge to say.
    let mut goes_on = false;
    if status == "completed" {
        let beats = |serial: &str| serial.matches(&plan.beat).count() >= 2;
        let _ = await_beats(destination, &beats);
    } else {
        // One line may be on its way.
        let more = source.serial().matches(&plan.beat).count() + 2;
        goes_on = await_beats(source, &|serial: &str| serial.matches(&plan.beat).count() >= more);
    }
    thread::sleep(Duration::from_millis(plan.after_ms));
    let (left, arrived) = (source.ask("query-status"), destination.ask("query-status"));
    let incoming = destination.ask("query-migrate");
    for side in [&mut *source, &mut *destination] {
        collect(side, &began, &mut events);
    }
    events.sort_by(|a, b| a.ms.total_cmp(&b.ms));
    Ok(Report {
        status,
        migration,
        arrived,
        left,
        events,
        counters: counters(made, |_| true),
        states: made.iter().filter_map(|d| Some((d.uuid().to_owned(), d.state()?))).collect(),
        source_serial: source.serial(),
        destination_serial: destination.serial(),
        source_stderr: source.stderr(),
        destination_stderr: destination.stderr(),
        incoming,
        ended_ms,
        goes_on,
        samples,
    })
}

struct Began {
    at: Instant,
    since_epoch: Duration,
}

/// Watches a migration to its end. `last` is for the last one of the trip, whose samples go there.
fn watch(
    plan: &Plan,
    made: &[Made],
    began: &Began,
    source: &mut Running,
    destination: &mut Running,
    events: &mut Vec<Happened>,
    mut last: Option<&mut Vec<Sample>>,
) -> Result<(String, Value)> {
    let changes: &[Change] = if last.is_some() { &plan.changes } else { &[] };
    let mut changes = changes.iter().peekable();
    let mut cancel_at = plan.cancel_after_ms.filter(|_| last.is_some()).map(Duration::from_millis);
    let mut over = false;
    let own = |name: &str, data: Value| {
        let ms = began.at.elapsed().as_secs_f64() * 1e3;
        Happened { side: Side::Source, name: name.into(), data, ms }
    };
    loop {
        let passed = began.at.elapsed();
        while let Some(change) = changes.next_if(|change| passed >= Duration::from_millis(change.after_ms)) {
            device::write(&change.uuid, &change.name, &change.value)?;
            events.push(own("CHANGE", json!({ "device": change.uuid, "name": change.name, "value": change.value })));
        }
        if cancel_at.take_if(|at| passed >= *at).is_some() {
            events.push(own("CANCEL", Value::Null));
            source.ask("migrate_cancel");
        }
        let migration = source.ask("query-migrate");
        let status = migration["status"].as_str().unwrap_or_default().to_owned();
        if let Some(samples) = last.as_mut().filter(|_| plan.samples) {
            samples.push(sample(made, began, source, &migration));
        }
        if ENDS.contains(&status.as_str()) {
            return Ok((if over { "limit".into() } else { status }, migration));
        }
        if source.ended() {
            return Ok(("exited".into(), migration));
        }
        if passed > Duration::from_secs(plan.limit_s) + PATIENCE {
            return Ok(("stuck".into(), migration));
        }
        if passed > Duration::from_secs(plan.limit_s) && !over {
            over = true;
            source.ask("migrate_cancel");
        }
        for side in [&mut *source, &mut *destination] {
            collect(side, began, events);
        }
        thread::sleep(POLL);
    }
}

fn sample(made: &[Made], began: &Began, source: &Running, migration: &Value) -> Sample {
    Sample {
        ms: began.at.elapsed().as_secs_f64() * 1e3,
        syncs: migration["ram"]["dirty-sync-count"].as_u64().unwrap_or_default(),
        cpu_ms: source.cpu_ms(),
        resident_kib: source.resident_kib(),
        counters: counters(made, |name| SAMPLED.contains(&name)),
    }
}

fn counters(made: &[Made], wanted: impl Fn(&str) -> bool) -> BTreeMap<String, BTreeMap<String, i64>> {
    let of = |device: &Made| {
        let mut counters = device.counters()?;
        counters.retain(|name, _| wanted(name));
        Some((device.uuid().to_owned(), counters))
    };
    made.iter().filter_map(of).collect()
}

/// The events that came.
fn collect(monitor: &mut Running, began: &Began, events: &mut Vec<Happened>) {
    loop {
        match monitor.qmp.next_event(Duration::from_millis(1)) {
            Ok(event) => {
                let since = event.time.map_or(0.0, |t| t.as_secs_f64() - began.since_epoch.as_secs_f64());
                events.push(Happened { side: monitor.side, name: event.name, data: event.data, ms: since * 1e3 });
            }
            Err(QmpError::Timeout { .. }) => return,
            // A monitor that is gone says so in the report's other members.
            Err(_) => return,
        }
    }
}

/// Whether the guest prints what is wanted, so soon that it can be said to run.
fn await_beats(monitor: &mut Running, until: &dyn Fn(&str) -> bool) -> bool {
    let deadline = Instant::now() + BEATS;
    while !until(&monitor.serial()) {
        if Instant::now() > deadline || monitor.ended() {
            return false;
        }
        thread::sleep(POLL);
    }
    true
}

fn wait_until_ready(monitor: &mut Running, plan: &Plan) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(plan.ready_s);
    while !monitor.serial().contains(&plan.ready) {
        if Instant::now() > deadline || monitor.ended() {
            let (guest, monitor) = (monitor.serial(), monitor.stderr());
            bail!("the guest does not get ready: it printed {guest:?}, and its monitor {:?}", monitor.trim());
        }
        thread::sleep(POLL);
    }
    Ok(())
}
