//! Records scenarios with real QEMU and judges qevm by them.

use crate::judge::{self, Judgement};
use crate::record;
use crate::reload::{self, Form, Taken};
use crate::report::{Outcome, Report, Row};
use crate::roots::{Root, Suite};
use crate::scenario::{Accel, Route, Scenario};
use crate::subject::Subject;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Set to `1`, a QEMU that cannot be installed is a failure and not a skip.
pub const REQUIRE_QEMU: &str = "QEVM_REQUIRE_QEMU";
/// Set to `1`, a `/dev/kvm` that cannot be opened is a failure and not a skip.
pub const REQUIRE_KVM: &str = "QEVM_REQUIRE_KVM";

/// How a matrix is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Scenarios in flight at a time. Most of one's time is waiting.
    pub jobs: usize,
    /// Where recordings stay; otherwise those that hold are removed.
    pub keep: Option<PathBuf>,
}

/// Runs `scenarios`, telling `each` about every row as it ends.
///
/// # Errors
/// No scratch folder can be made. Everything else is a row of the report.
pub fn run(scenarios: &[Scenario], subject: &Subject, options: &Options, mut each: impl FnMut(&Row)) -> Result<Report> {
    let started = Instant::now();
    let scratch = tempfile::Builder::new().prefix("qevm-matrix-").tempdir()?;
    let folder = options.keep.clone().unwrap_or_else(|| scratch.path().to_path_buf());
    fs::create_dir_all(&folder)?;
    let roots = install(scenarios);
    let kvm = kvm();
    let next = AtomicUsize::new(0);
    let mut rows: Vec<(usize, Row)> = Vec::new();
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..options.jobs.max(1) {
            let (sender, next, roots, kvm, folder) = (sender.clone(), &next, &roots, &kvm, &folder);
            scope.spawn(move || {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(scenario) = scenarios.get(n) else { break };
                    let row = play(scenario, &roots[&scenario.suite], kvm, subject, folder, options.keep.is_some());
                    if sender.send((n, row)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for (n, row) in receiver {
            each(&row);
            rows.push((n, row));
        }
    });
    rows.sort_by_key(|(n, _)| *n);
    let versions =
        roots.into_iter().filter_map(|(s, r)| r.ok().map(|r| (s.name().into(), r.version().into()))).collect();
    Ok(Report {
        rows: rows.into_iter().map(|(_, row)| row).collect(),
        versions,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// A root, or why there is none.
type Installed = Result<Root, String>;

fn install(scenarios: &[Scenario]) -> BTreeMap<Suite, Installed> {
    let mut roots = BTreeMap::new();
    for scenario in scenarios {
        roots.entry(scenario.suite).or_insert_with(|| Root::install(scenario.suite).map_err(|e| format!("{e:#}")));
    }
    roots
}

/// Whether there is a KVM to use, and why not.
///
/// # Errors
/// The system's reason.
pub fn kvm() -> Result<(), String> {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(|_| ()).map_err(|e| format!("/dev/kvm cannot be opened: {e}"))
}

fn play(
    scenario: &Scenario,
    root: &Installed,
    kvm: &Result<(), String>,
    subject: &Subject,
    folder: &Path,
    keep: bool,
) -> Row {
    let started = Instant::now();
    let outcome = match (root, kvm) {
        (Err(why), _) => unavailable(REQUIRE_QEMU, why),
        (_, Err(why)) if scenario.accel == Accel::Kvm => unavailable(REQUIRE_KVM, why),
        (Ok(root), _) => {
            let folder = folder.join(scenario.folder());
            match record_and_judge(scenario, root, &folder, subject) {
                Ok(judgement) if judgement.problems.is_empty() => {
                    if !keep {
                        // Disk space is all that is lost if this fails.
                        let _ = fs::remove_dir_all(&folder);
                    }
                    Outcome::Holds(judgement)
                }
                Ok(judgement) => Outcome::Fails(judgement),
                Err(e) => Outcome::NotPlayed(format!("{e:#}")),
            }
        }
    };
    Row { name: scenario.name.clone(), outcome, duration: rounded(started.elapsed()) }
}

fn record_and_judge(scenario: &Scenario, root: &Root, folder: &Path, subject: &Subject) -> Result<Judgement> {
    // A QEMU that is busy, or loses a race of its own, gets a second chance. Where qevm takes part, there is none.
    let takes_part = matches!(scenario.route, Route::ReceiveUnix | Route::ReceiveTcp);
    let again = |first: anyhow::Error| match takes_part {
        true => Err(first),
        false => record::record(scenario, root, subject, folder).with_context(|| format!("again, after {first:#}")),
    };
    let recording = record::record(scenario, root, subject, folder).or_else(again)?;
    let mut judgement = judge::judge(&recording, folder, subject)?;
    // Damage is tried on the plain streams of the quick subset: it costs eight more runs of qevm each.
    if scenario.quick && scenario.route == Route::Exec && recording.capabilities.is_empty() {
        judgement.problems.extend(judge::damage(&recording, folder, subject)?);
    }
    if reload::applies(scenario) && judgement.problems.is_empty() {
        for form in Form::of(scenario.suite) {
            match reload::reload(scenario, *form, root, &recording, folder, subject)? {
                Taken::Same => judgement.reloads += 1,
                Taken::NoBetterThanItsOwn(what) => judgement.own_faults.extend(what),
                Taken::Wrong(problems) => judgement.problems.extend(problems),
            }
        }
    }
    Ok(judgement)
}

/// A skip, unless the environment demands that there be none.
fn unavailable(variable: &str, why: &str) -> Outcome {
    match required(variable) {
        true => Outcome::NotPlayed(format!("{variable}=1, but {why}")),
        false => Outcome::Skipped(why.into()),
    }
}

/// Whether the environment demands that there be no skips of that kind.
pub fn required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|v| v == "1")
}

fn rounded(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10.0).round() / 10.0
}
