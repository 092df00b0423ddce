//! What commands have in common: the choice of rows, and printing a report.

use anyhow::{Context, Result};
use clap::Args;
use qevm_conformance::outcome;
use qevm_conformance::report::Report;
use qevm_conformance::subject::Subject;
use serde::Serialize;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// Which of a table's rows run.
#[derive(Args)]
pub(crate) struct Choice {
    /// Every row, and not the representative subset alone
    #[arg(long)]
    pub(super) full: bool,
    /// Only rows whose name contains this (may be given several times; of all, not of the subset alone)
    #[arg(long)]
    pub(super) only: Vec<String>,
    /// Print the rows and stop
    #[arg(long)]
    pub(super) list: bool,
}

impl Choice {
    /// The rows that are asked for. With `--list`, each is printed as `line` has it, and there are none.
    pub(super) fn rows<T>(
        &self,
        all: impl FnOnce() -> Vec<T>,
        quick: impl FnOnce() -> Vec<T>,
        name: impl Fn(&T) -> String,
        line: impl Fn(&T) -> String,
    ) -> Option<Vec<T>> {
        let mut rows = if self.full || !self.only.is_empty() { all() } else { quick() };
        rows.retain(|row| wanted(&name(row), &self.only));
        if self.list {
            rows.iter().for_each(|row| println!("{}", line(row)));
            return None;
        }
        Some(rows)
    }
}

#[derive(Args)]
pub(crate) struct Reporting {
    /// Print one JSON object with the numbers as the last line
    #[arg(long)]
    pub(super) json: bool,
    /// Write every row with its numbers into this file, as JSON
    #[arg(long)]
    pub(super) report: Option<PathBuf>,
}

impl Reporting {
    /// The end of a report: the counts, and the file if one is wanted.
    pub(super) fn tell<T: Serialize>(&self, what: &str, report: &outcome::Report<T>, summary: Value) -> Result<()> {
        if let Some(path) = &self.report {
            let json = serde_json::to_vec_pretty(report)?;
            fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
        }
        match self.json {
            true => println!("{summary}"),
            false => println!("{} {what}, {} fail, {} skipped", summary["rows"], summary["failed"], summary["skipped"]),
        }
        Ok(())
    }

    pub(super) fn print(&self, report: &Report) -> Result<bool> {
        println!("\n{}", report.text());
        if let Some(path) = &self.report {
            let json = serde_json::to_vec_pretty(report)?;
            fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
        }
        if self.json {
            println!("{}", report.summary());
        }
        Ok(report.holds())
    }
}

pub(super) fn subject() -> Result<Subject> {
    Ok(Subject::new(std::env::current_exe()?))
}

pub(super) fn wanted(name: &str, only: &[String]) -> bool {
    only.is_empty() || only.iter().any(|o| name.contains(o.as_str()))
}

/// Prints the lines of a benchmark, unless JSON is all that is wanted.
pub(super) fn progress(json: bool) -> impl Fn(&str) {
    let tell = move |line: &str| {
        if !json {
            println!("{line}");
        }
    };
    if cfg!(debug_assertions) {
        tell("this is a debug build: its figures mean nothing");
    }
    tell
}
