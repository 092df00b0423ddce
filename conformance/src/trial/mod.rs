//! Single questions to real QEMUs: whether they load what qevm writes, and whether qevm foresees what they refuse.
//!
//! A [`Trial`] has a name, the QEMUs that it needs, and a play that says what was seen or what is wrong. `written` has the
//! streams that qevm writes, [`machine`] a stream made of nothing but declarations, `foreseen` the pairs of source and
//! destination that `qevm check` has to judge as QEMU does.

mod foreseen;
pub mod machine;
mod written;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use crate::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use crate::subject::Subject;

/// What a trial is played with.
#[derive(Debug)]
pub struct Bench<'b> {
    roots: &'b BTreeMap<Suite, Root>,
    /// The qevm under judgement.
    pub subject: &'b Subject,
    /// An empty folder of the trial's own.
    pub scratch: &'b Path,
}

impl Bench<'_> {
    /// The QEMU of `suite`, which the trial has said it needs.
    ///
    /// # Errors
    /// It has not.
    pub fn root(&self, suite: Suite) -> Result<&Root> {
        self.roots.get(&suite).ok_or_else(|| anyhow::anyhow!("the trial does not say that it needs {suite}"))
    }
}

type Play = Box<dyn Fn(&Bench<'_>) -> Result<String>>;

/// One question.
pub struct Trial {
    /// Unique: what it is about, releases, what is special.
    pub name: String,
    suites: Vec<Suite>,
    kvm: bool,
    play: Play,
}

impl Trial {
    fn new(name: String, suites: &[Suite], kvm: bool, play: impl Fn(&Bench<'_>) -> Result<String> + 'static) -> Trial {
        Trial { name, suites: suites.to_vec(), kvm, play: Box::new(play) }
    }
}

/// How a trial ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "detail")]
pub enum Outcome {
    /// As it should, with what was seen.
    Held(String),
    /// It did not, or could not be played although it had to be.
    Failed(String),
    /// This machine lacks what it needs.
    Skipped(String),
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The trial's name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Wall time, seconds.
    pub seconds: f64,
}

impl Row {
    /// One readable line.
    pub fn line(&self) -> String {
        let (word, detail) = match &self.outcome {
            Outcome::Held(what) => ("ok", what),
            Outcome::Failed(why) => ("FAILS", why),
            Outcome::Skipped(why) => ("skipped", why),
        };
        format!("{word:<8} {:<52} {:>5.1} s  {detail}", self.name, self.seconds)
    }
}

/// All trials, in the order of the table.
pub fn all() -> Vec<Trial> {
    let mut trials = written::trials();
    trials.extend(foreseen::trials());
    trials
}

/// Plays trials one after the other, telling `each` about every row as it ends.
pub fn run(trials: &[Trial], subject: &Subject, mut each: impl FnMut(&Row)) -> Vec<Row> {
    let mut missing: BTreeMap<Suite, String> = BTreeMap::new();
    let mut roots = BTreeMap::new();
    let kvm = kvm();
    let mut rows = Vec::new();
    for trial in trials {
        let started = Instant::now();
        for suite in &trial.suites {
            if !roots.contains_key(suite) && !missing.contains_key(suite) {
                match Root::install(*suite) {
                    Ok(root) => drop(roots.insert(*suite, root)),
                    Err(why) => drop(missing.insert(*suite, format!("{why:#}"))),
                }
            }
        }
        let lacking = trial.suites.iter().find_map(|suite| missing.get(suite));
        let outcome = match (lacking, &kvm) {
            (Some(why), _) => unavailable(REQUIRE_QEMU, why),
            (None, Err(why)) if trial.kvm => unavailable(REQUIRE_KVM, why),
            _ => played(trial, &roots, subject),
        };
        let row = Row { name: trial.name.clone(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    rows
}

fn played(trial: &Trial, roots: &BTreeMap<Suite, Root>, subject: &Subject) -> Outcome {
    // Sockets live here, and their paths must be short.
    let seen = tempfile::Builder::new().prefix("qevm-").tempdir().map_err(anyhow::Error::new).and_then(|scratch| {
        let bench = Bench { roots, subject, scratch: scratch.path() };
        (trial.play)(&bench)
    });
    match seen {
        Ok(what) => Outcome::Held(what),
        Err(why) => Outcome::Failed(format!("{why:#}")),
    }
}

/// A skip, unless the environment demands that there be none.
fn unavailable(variable: &str, why: &str) -> Outcome {
    match required(variable) {
        true => Outcome::Failed(format!("{variable}=1, but {why}")),
        false => Outcome::Skipped(why.to_owned()),
    }
}

/// The numbers alone, for scripts.
pub fn summary(rows: &[Row]) -> Value {
    let count = |wanted: fn(&Outcome) -> bool| rows.iter().filter(|row| wanted(&row.outcome)).count();
    json!({
        "trials": rows.len(),
        "held": count(|o| matches!(o, Outcome::Held(_))),
        "failed": count(|o| matches!(o, Outcome::Failed(_))),
        "skipped": count(|o| matches!(o, Outcome::Skipped(_))),
    })
}

/// How QEMU's options and the names of trials call an accelerator.
fn accel_name(accel: Accel) -> &'static str {
    match accel {
        Accel::Tcg => "tcg",
        Accel::Kvm => "kvm",
    }
}
