//! Plays journeys and tells how they went.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Account, Echo, Journey, Monitor, Outage, Pairing, Stage, Stop};
use crate::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use crate::roots::{Root, Suite};

/// How a journey ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "detail")]
pub enum Outcome {
    /// The guest arrived whole everywhere.
    Arrived(Account),
    /// It did not, or the journey could not be made although it had to be.
    Failed(String),
    /// This machine lacks what it needs.
    Skipped(String),
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The journey's name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Wall time, seconds.
    pub seconds: f64,
}

/// One thing to try.
#[derive(Debug, Clone)]
pub enum Case {
    /// The guest arrives.
    Journey(Journey),
    /// It arrives at last.
    Outage(Outage),
    /// It stays, and why is said.
    Pairing(Pairing),
    /// It comes back as it was.
    Echo(Echo),
}

impl Case {
    /// The way of the guest; its name is the case's.
    pub fn journey(&self) -> &Journey {
        match self {
            Case::Journey(journey) => journey,
            Case::Outage(outage) => &outage.journey,
            Case::Pairing(pairing) => &pairing.journey,
            Case::Echo(echo) => &echo.journey,
        }
    }

    fn play(&self, stage: &Stage<'_>) -> Result<Account> {
        match self {
            Case::Journey(journey) => journey.travel(stage, |_| ()),
            Case::Outage(outage) => outage.play(stage),
            Case::Pairing(pairing) => pairing.play(stage),
            Case::Echo(echo) => echo.play(stage),
        }
    }
}

/// All journeys.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// In the order of the table.
    pub rows: Vec<Row>,
}

/// Plays cases one after the other, telling `each` about every row as it ends. `keep` is where consoles and logs stay.
///
/// # Errors
/// No scratch folder can be made. Everything else is a row of the report.
pub fn run(cases: &[Case], program: &Monitor, keep: Option<PathBuf>, mut each: impl FnMut(&Row)) -> Result<Report> {
    let scratch = tempfile::Builder::new().prefix("qevm-peer-").tempdir()?;
    let folder = keep.unwrap_or_else(|| scratch.path().to_path_buf());
    let mut roots: BTreeMap<Suite, Result<Root, String>> = BTreeMap::new();
    let kvm = kvm();
    let mut rows = Vec::new();
    for case in cases {
        let journey = case.journey();
        let started = Instant::now();
        let suites = journey.stops.iter().filter_map(|stop| match stop {
            Stop::Qemu(suite, _) => Some(*suite),
            Stop::Reference => None,
        });
        let (mut here, mut missing) = (BTreeMap::new(), None);
        for suite in suites {
            match roots.entry(suite).or_insert_with(|| Root::install(suite).map_err(|e| format!("{e:#}"))) {
                Ok(root) => drop(here.insert(suite, root.clone())),
                Err(why) => missing = Some((REQUIRE_QEMU, why.clone())),
            }
        }
        if let Err(why) = &kvm {
            missing = Some((REQUIRE_KVM, why.clone()));
        }
        let folder = folder.join(journey.name.replace(['/', '>', ' '], "_"));
        let outcome = match missing {
            Some((variable, why)) if required(variable) => Outcome::Failed(format!("{variable}=1, but {why}")),
            Some((_, why)) => Outcome::Skipped(why),
            None => {
                fs::create_dir_all(&folder)?;
                match case.play(&Stage { roots: &here, program, scratch: &folder, more: &[] }) {
                    Ok(account) => Outcome::Arrived(account),
                    Err(error) => Outcome::Failed(format!("{error:#}")),
                }
            }
        };
        let row = Row { name: journey.name.clone(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    Ok(Report { rows })
}

impl Row {
    /// One readable line.
    pub fn line(&self) -> String {
        let (word, detail) = match &self.outcome {
            Outcome::Arrived(account) => ("ok", told(account)),
            Outcome::Failed(why) => ("FAILS", why.clone()),
            Outcome::Skipped(why) => ("skipped", why.clone()),
        };
        format!("{word:<8} {:<44} {:>6.1} s  {detail}", self.name, self.seconds)
    }
}

fn told(account: &Account) -> String {
    let hops = &account.hops;
    if hops.is_empty() {
        return format!("as expected; none of {} pages stale", account.pages);
    }
    let cuts = if account.cuts > 0 { format!("{} cut connections, then ", account.cuts) } else { String::new() };
    let mut downtimes: Vec<f64> = hops.iter().map(|hop| hop.downtime_ms).collect();
    downtimes.sort_by(f64::total_cmp);
    format!(
        "{cuts}{} hops, none of {} pages stale, downtime {:.1} to {:.1} ms, {} to {} rounds",
        hops.len(),
        account.pages,
        downtimes.first().copied().unwrap_or(0.0),
        downtimes.last().copied().unwrap_or(0.0),
        hops.iter().map(|hop| hop.rounds).min().unwrap_or(0),
        hops.iter().map(|hop| hop.rounds).max().unwrap_or(0),
    )
}

impl Report {
    /// Rows of journeys that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| matches!(row.outcome, Outcome::Failed(_)))
    }

    /// Journeys that this machine cannot make, and why.
    pub fn skips(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            Outcome::Skipped(why) => Some((row.name.as_str(), why.as_str())),
            _ => None,
        })
    }

    /// Whether everything that could be tried holds. A report in which nothing could be tried does not hold.
    pub fn holds(&self) -> bool {
        self.failures().next().is_none() && self.skips().count() < self.rows.len()
    }

    /// The numbers alone.
    pub fn summary(&self) -> Value {
        let arrived = || {
            self.rows.iter().filter_map(|row| match &row.outcome {
                Outcome::Arrived(account) => Some(account),
                _ => None,
            })
        };
        json!({
            "ok": self.holds(),
            "journeys": self.rows.len(),
            "arrived": arrived().count(),
            "failed": self.failures().count(),
            "skipped": self.skips().count(),
            "hops": arrived().map(|account| account.hops.len()).sum::<usize>(),
            "cuts": arrived().map(|account| account.cuts).sum::<usize>(),
            "pages": arrived().map(|account| account.pages).sum::<u64>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_failure_nor_nothing_at_all_holds() {
        let account = Account { hops: vec![], pages: 1, passes: 1, cut_lines: 0, cuts: 0 };
        let (good, bad) = (Outcome::Arrived(account), Outcome::Failed("stale".into()));
        let skipped = Outcome::Skipped("no KVM".into());
        let report = |outcomes: &[&Outcome]| Report {
            rows: outcomes.iter().map(|o| Row { name: "a".into(), outcome: (*o).clone(), seconds: 1.0 }).collect(),
        };
        assert!(report(&[&good, &skipped]).holds());
        assert!(!report(&[&good, &bad]).holds());
        assert!(!report(&[&skipped]).holds());
        assert!(!report(&[]).holds());
    }
}
