//! What a matrix found, for people and for machines.

use crate::judge::Judgement;
use crate::roots::Suite;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// How one scenario ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "detail")]
pub enum Outcome {
    /// qevm agrees with QEMU in everything.
    Holds(Judgement),
    /// qevm disagrees with QEMU.
    Fails(Judgement),
    /// The recording could not be made: QEMU, the scenario or the machine is at fault. Counts as a failure.
    NotPlayed(String),
    /// This machine lacks what it needs.
    Skipped(String),
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The scenario's name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Wall time, seconds.
    pub duration: f64,
}

/// A whole matrix.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// In the order of the table.
    pub rows: Vec<Row>,
    /// QEMU's version by suite.
    pub versions: BTreeMap<String, String>,
    /// Wall time, seconds.
    pub seconds: f64,
}

impl Row {
    /// One readable line.
    pub fn line(&self) -> String {
        let (word, detail) = match &self.outcome {
            Outcome::Holds(j) => ("ok", measured(j)),
            Outcome::Fails(j) => ("FAILS", j.problems.join("; ")),
            Outcome::NotPlayed(why) => ("NOT PLAYED", why.clone()),
            Outcome::Skipped(why) => ("skipped", why.clone()),
        };
        format!("{word:<10} {:<44} {:>5.1} s  {detail}", self.name, self.duration)
    }

    /// Whether this row makes the whole matrix fail.
    pub fn is_failure(&self) -> bool {
        matches!(self.outcome, Outcome::Fails(_) | Outcome::NotPlayed(_))
    }

    /// Whether this row could not be tried on this machine.
    pub fn is_skip(&self) -> bool {
        matches!(self.outcome, Outcome::Skipped(_))
    }
}

fn measured(j: &Judgement) -> String {
    let mut text = format!("{} bytes, {} sections, {} RAM blocks", j.bytes, j.sections, j.blocks);
    if j.reloads > 0 {
        // Writing to a string cannot fail.
        let _ = write!(text, ", loaded by QEMU {}x", j.reloads);
    }
    if !j.own_faults.is_empty() {
        let _ = write!(text, ", no better than QEMU's own stream: {}", j.own_faults.join("; "));
    }
    if j.opaque_bytes > 0 {
        let _ = write!(text, ", {} bytes opaque", j.opaque_bytes);
    }
    if !j.unjudged_blocks.is_empty() {
        let _ = write!(text, ", no truth about {}", j.unjudged_blocks.join(" "));
    }
    text
}

impl Report {
    /// Rows that fail.
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|r| r.is_failure())
    }

    /// Rows that were skipped, and why.
    pub fn skips(&self) -> impl Iterator<Item = (&Row, &str)> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            Outcome::Skipped(why) => Some((row, why.as_str())),
            _ => None,
        })
    }

    /// Whether everything that could be tried holds. A matrix in which nothing could be tried does not hold.
    pub fn holds(&self) -> bool {
        self.failures().next().is_none() && self.skips().count() < self.rows.len()
    }

    /// The numbers alone.
    pub fn summary(&self) -> Value {
        let held: Vec<&Judgement> = self
            .rows
            .iter()
            .filter_map(|r| match &r.outcome {
                Outcome::Holds(j) => Some(j),
                _ => None,
            })
            .collect();
        json!({
            "ok": self.holds(),
            "scenarios": self.rows.len(),
            "held": held.len(),
            "failed": self.failures().count(),
            "skipped": self.skips().count(),
            "bytes": held.iter().map(|j| j.bytes).sum::<u64>(),
            "opaque_bytes": held.iter().map(|j| j.opaque_bytes).sum::<u64>(),
            "ram_blocks": held.iter().map(|j| j.blocks).sum::<usize>(),
            "loaded_by_qemu": held.iter().map(|j| j.reloads).sum::<usize>(),
            "pmemsave_bytes": held.iter().map(|j| j.pmemsave_bytes).sum::<u64>(),
            "qemu": self.versions,
            "seconds": (self.seconds * 10.0).round() / 10.0,
        })
    }

    /// The end of the readable report: the failures and skips again, by name, and the count.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for row in self.rows.iter().filter(|r| r.is_failure() || r.is_skip()) {
            let _ = writeln!(text, "{}", row.line());
        }
        let s = self.summary();
        let qemu: Vec<&str> =
            Suite::ALL.iter().filter_map(|s| self.versions.get(s.name())).map(String::as_str).collect();
        let _ = write!(
            text,
            "{} scenarios with QEMU {}: {} hold, {} fail, {} skipped; {} bytes, {} RAM blocks equal to QEMU's, {:.0} s",
            s["scenarios"],
            qemu.join(", "),
            s["held"],
            s["failed"],
            s["skipped"],
            s["bytes"],
            s["ram_blocks"],
            self.seconds
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: Vec<Outcome>) -> Report {
        let rows = outcomes.into_iter().map(|outcome| Row { name: "a".into(), outcome, duration: 1.0 }).collect();
        Report { rows, versions: BTreeMap::new(), seconds: 1.0 }
    }

    #[test]
    fn neither_a_failure_nor_nothing_at_all_holds() {
        let good = || Outcome::Holds(Judgement::default());
        assert!(report(vec![good(), Outcome::Skipped("no KVM".into())]).holds());
        assert!(!report(vec![good(), Outcome::NotPlayed("timeout".into())]).holds());
        assert!(!report(vec![good(), Outcome::Fails(Judgement::default())]).holds());
        assert!(!report(vec![Outcome::Skipped("no QEMU".into())]).holds());
        assert!(!report(vec![]).holds());
    }
}
