//! Plays the rows: those of a flavor one after the other with one source QEMU, several flavors at a time.

use super::source::{Flavor, Source};
use super::table::{Case, KINDS, Row};
use super::{live, mismatch, qemu_to_qevm, qevm_to_qemu, refused, secured};
use crate::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use crate::roots::{Root, Suite};
use crate::subject::Subject;
use anyhow::Result;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

/// How a row ended.
#[derive(Debug, Clone)]
pub enum Ended {
    /// As it should; the text tells what was seen.
    Holds(String),
    /// Not as it should.
    Fails(String),
    /// This machine lacks what it needs.
    Skipped(String),
}

/// One line of the report.
#[derive(Debug, Clone)]
pub struct Line {
    /// The row's name.
    pub name: String,
    /// Its kind, one of [`KINDS`].
    pub kind: &'static str,
    /// How it ended.
    pub ended: Ended,
    /// Wall time, seconds.
    pub seconds: f64,
}

/// What the whole matrix found.
#[derive(Debug, Clone)]
pub struct Report {
    /// In the order in which rows ended.
    pub lines: Vec<Line>,
    /// Wall time, seconds.
    pub seconds: f64,
}

impl Line {
    /// One readable line.
    pub fn text(&self) -> String {
        let (word, detail) = match &self.ended {
            Ended::Holds(detail) => ("ok", detail),
            Ended::Fails(detail) => ("FAILS", detail),
            Ended::Skipped(detail) => ("skipped", detail),
        };
        format!("{word:<8} {:<66} {:>5.1} s  {detail}", self.name, self.seconds)
    }

    /// It ended in another way than it should.
    pub fn is_failure(&self) -> bool {
        matches!(self.ended, Ended::Fails(_))
    }
}

impl Report {
    /// Rows that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter(|line| line.is_failure())
    }

    /// Rows that this machine cannot play, and why.
    pub fn skips(&self) -> impl Iterator<Item = (&Line, &str)> {
        self.lines.iter().filter_map(|line| match &line.ended {
            Ended::Skipped(why) => Some((line, why.as_str())),
            _ => None,
        })
    }

    /// Whether everything that could be played holds. A matrix of which nothing could be played does not hold.
    pub fn holds(&self) -> bool {
        self.failures().next().is_none() && self.skips().count() < self.lines.len()
    }

    /// The numbers alone.
    pub fn summary(&self) -> Value {
        let held =
            |kind: &str| self.lines.iter().filter(|l| l.kind == kind && matches!(l.ended, Ended::Holds(_))).count();
        let kinds: BTreeMap<&str, usize> = KINDS.into_iter().map(|kind| (kind, held(kind))).collect();
        json!({
            "ok": self.holds(),
            "rows": self.lines.len(),
            "held": kinds.values().sum::<usize>(),
            "failed": self.failures().count(),
            "skipped": self.skips().count(),
            "kinds": kinds,
            "seconds": (self.seconds * 10.0).round() / 10.0,
        })
    }

    /// The end of the readable report: failures and skips again, and the count.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for line in self.lines.iter().filter(|l| !matches!(l.ended, Ended::Holds(_))) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", line.text());
        }
        let s = self.summary();
        let kinds: Vec<String> = KINDS.iter().map(|kind| format!("{} {kind}", s["kinds"][kind])).collect();
        let _ = write!(
            text,
            "{} rows of page channels: {} hold ({}), {} fail, {} skipped, {:.0} s",
            s["rows"],
            s["held"],
            kinds.join(", "),
            s["failed"],
            s["skipped"],
            self.seconds
        );
        text
    }
}

/// Plays `rows`, telling `each` about every row as it ends. `jobs` flavors are played at a time.
pub fn run(rows: &[Row], subject: &Subject, jobs: usize, each: impl Fn(&Line) + Sync) -> Report {
    let started = Instant::now();
    let groups = groups(rows);
    let roots: BTreeMap<Suite, Result<Root, String>> = Suite::ALL
        .into_iter()
        .filter(|suite| rows.iter().any(|row| needs(row).contains(suite)))
        .map(|suite| (suite, Root::install(suite).map_err(|e| format!("{e:#}"))))
        .collect();
    let machine = Machine { roots, kvm: kvm(), subject };
    let (next, lines) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let done = |line: Line| {
        each(&line);
        lines.lock().push(line);
    };
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                    machine.play(group, &done);
                }
            });
        }
    });
    let lines = lines.into_inner();
    Report { lines, seconds: started.elapsed().as_secs_f64() }
}

/// Rows that share a source; the largest groups first, so that no long one is left for the end. A live row has a
/// source of its own.
fn groups(rows: &[Row]) -> Vec<Vec<&Row>> {
    let mut shared: BTreeMap<Flavor, Vec<&Row>> = BTreeMap::new();
    let mut alone = Vec::new();
    for row in rows {
        match row.case {
            Case::Live(..) | Case::Distrusted(..) => alone.push(vec![row]),
            _ => shared.entry(row.flavor).or_default().push(row),
        }
    }
    let mut groups: Vec<Vec<&Row>> = shared.into_values().collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    groups.extend(alone);
    groups
}

fn needs(row: &Row) -> Vec<Suite> {
    match row.case {
        Case::Live(_, to) => vec![row.flavor.suite, to],
        _ => vec![row.flavor.suite],
    }
}

struct Machine<'s> {
    roots: BTreeMap<Suite, Result<Root, String>>,
    kvm: Result<(), String>,
    subject: &'s Subject,
}

impl Machine<'_> {
    fn play(&self, group: &[&Row], done: &dyn Fn(Line)) {
        let mut source = None;
        for row in group {
            let started = Instant::now();
            let ended = match self.missing(row) {
                Some(ended) => ended,
                None => match self.row(row, &mut source) {
                    Ok(detail) => Ended::Holds(detail),
                    Err(e) => {
                        // A source that a row has left in an unknown state is not used for the next one.
                        source = None;
                        Ended::Fails(format!("{e:#}").replace('\n', " "))
                    }
                },
            };
            let seconds = started.elapsed().as_secs_f64();
            done(Line { name: row.name.clone(), kind: row.case.kind(), ended, seconds });
        }
        let Some(mut source) = source else { return };
        // RAM was compared with what it was at the start: it must still be that.
        let moved = source.moved().unwrap_or_else(|e| vec![format!("{e:#}")]);
        if !moved.is_empty() {
            let ended = Ended::Fails(format!("the stopped guest's RAM is another one now: {}", moved.join(", ")));
            let name = format!("{}/source", source.flavor.name());
            done(Line { name, kind: KINDS[0], ended, seconds: 0.0 });
        }
        source.quit();
    }

    fn missing(&self, row: &Row) -> Option<Ended> {
        let lacks = |variable: &str, why: &str| match required(variable) {
            true => Ended::Fails(format!("{variable}=1, but {why}")),
            false => Ended::Skipped(why.into()),
        };
        for suite in needs(row) {
            if let Some(Err(why)) = self.roots.get(&suite) {
                return Some(lacks(REQUIRE_QEMU, why));
            }
        }
        match (&row.case, &self.kvm) {
            (Case::Live(..) | Case::Distrusted(..), Err(why)) => Some(lacks(REQUIRE_KVM, why)),
            _ => None,
        }
    }

    fn root(&self, suite: Suite) -> Result<&Root> {
        match self.roots.get(&suite) {
            Some(Ok(root)) => Ok(root),
            _ => anyhow::bail!("QEMU {} is not installed", suite.series()),
        }
    }

    fn row(&self, row: &Row, source: &mut Option<Source>) -> Result<String> {
        let root = self.root(row.flavor.suite)?;
        if let Case::Live(live, to) = &row.case {
            return live::play(root, self.root(*to)?, self.subject, live);
        }
        if let Case::Distrusted(version, flaw) = row.case {
            return secured::refused(root, self.subject, version, flaw);
        }
        let usable = match source {
            Some(source) => source.is_clean()?,
            None => false,
        };
        if !usable {
            *source = Some(Source::start(row.flavor, root)?);
        }
        let Some(source) = source else { anyhow::bail!("no source") };
        let subject = self.subject;
        match &row.case {
            Case::Leaves(setup, told) => qemu_to_qevm::play(source, subject, setup, *told),
            Case::Arrives(setup, from) => qevm_to_qemu::play(source, subject, setup, *from),
            Case::Refused(setup) => refused::at_source(source, setup),
            Case::Late(capability) => refused::late_at_destination(source, capability),
            Case::NotSent(setup) => refused::by_send(source, subject, setup),
            Case::ReceiverDiffers(setup, options, word) => mismatch::at_receiver(source, subject, setup, options, word),
            Case::NoSwitchover(setup, options) => mismatch::no_switchover(source, subject, setup, options),
            Case::TargetDiffers(sent, expected, options) => {
                mismatch::at_target(source, subject, sent, expected, options)
            }
            Case::Live(..) | Case::Distrusted(..) => anyhow::bail!("it has a source of its own"),
        }
    }
}
