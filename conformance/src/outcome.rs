//! What was played, and how it ended: for trials and journeys.

use crate::matrix::required;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::Write;

/// How something ended that was to be played; `T` is what was seen.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "detail")]
pub enum Outcome<T> {
    /// As it should.
    Held(T),
    /// It did not, or it could not be played although it had to be.
    Failed(String),
    /// This machine lacks what it needs.
    Skipped(String),
}

impl<T> Outcome<T> {
    /// A skip, unless the environment `variable` demands that there be none.
    pub(crate) fn unavailable(variable: &str, why: &str) -> Outcome<T> {
        match required(variable) {
            true => Outcome::Failed(format!("{variable}=1, but {why}")),
            false => Outcome::Skipped(why.to_owned()),
        }
    }
}

impl<T> From<Result<T>> for Outcome<T> {
    fn from(seen: Result<T>) -> Outcome<T> {
        match seen {
            Ok(seen) => Outcome::Held(seen),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        }
    }
}

/// One line of a report.
#[derive(Debug, Clone, Serialize)]
pub struct Row<T> {
    /// What was played.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome<T>,
    /// Wall time, seconds.
    pub seconds: f64,
}

impl<T: ToString> Row<T> {
    /// One readable line.
    pub fn line(&self) -> String {
        let (word, detail) = match &self.outcome {
            Outcome::Held(seen) => ("ok", seen.to_string()),
            Outcome::Failed(why) => ("FAILS", why.clone()),
            Outcome::Skipped(why) => ("skipped", why.clone()),
        };
        format!("{word:<8} {:<52} {:>6.1} s  {detail}", self.name, self.seconds)
    }
}

/// All that was played.
#[derive(Debug, Clone, Serialize)]
pub struct Report<T> {
    /// In the order of the table.
    pub rows: Vec<Row<T>>,
}

impl<T> Report<T> {
    /// Rows that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Row<T>> {
        self.rows.iter().filter(|row| matches!(row.outcome, Outcome::Failed(_)))
    }

    /// What this machine cannot play, and why.
    pub fn skips(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            Outcome::Skipped(why) => Some((row.name.as_str(), why.as_str())),
            _ => None,
        })
    }

    /// What was seen of all that held.
    pub fn held(&self) -> impl Iterator<Item = &T> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            Outcome::Held(seen) => Some(seen),
            _ => None,
        })
    }

    /// Whether everything that could be tried holds. A report in which nothing could be tried does not hold.
    pub fn holds(&self) -> bool {
        self.failures().next().is_none() && self.skips().count() < self.rows.len()
    }

    /// The numbers alone, for scripts.
    pub fn summary(&self) -> Value {
        json!({
            "ok": self.holds(),
            "rows": self.rows.len(),
            "held": self.held().count(),
            "failed": self.failures().count(),
            "skipped": self.skips().count(),
        })
    }
}

/// The file in which `make test` collects the names of tests that could not run.
const SKIPPED_TESTS: &str = "QEVM_SKIPPED_TESTS";

/// Adds tests that could not run, and why, to the list of `make test`, if that is what runs.
///
/// # Errors
/// The list cannot be written.
pub fn list_skips<'s>(what: &str, skips: impl IntoIterator<Item = (&'s str, &'s str)>) -> Result<()> {
    let Some(path) = std::env::var_os(SKIPPED_TESTS) else { return Ok(()) };
    let doing = || format!("writing the list of skipped tests {}", path.display());
    let mut list = OpenOptions::new().create(true).append(true).open(&path).with_context(doing)?;
    skips
        .into_iter()
        .try_for_each(|(name, why)| writeln!(list, "qevm-conformance {what} {name}: {why}"))
        .with_context(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_failure_nor_nothing_at_all_holds() {
        let (good, bad) = (Outcome::Held(1), Outcome::Failed("stale".into()));
        let skipped = Outcome::Skipped("no KVM".into());
        let report = |outcomes: &[&Outcome<u8>]| Report {
            rows: outcomes.iter().map(|o| Row { name: "a".into(), outcome: (*o).clone(), seconds: 1.0 }).collect(),
        };
        assert!(report(&[&good, &skipped]).holds());
        assert!(!report(&[&good, &bad]).holds());
        assert!(!report(&[&skipped]).holds());
        assert!(!report(&[]).holds());
        assert_eq!(report(&[&good, &bad, &skipped]).summary()["held"], 1);
    }
}
