//! Single questions to real QEMUs: whether they load what qevm writes, and whether qevm foresees what they refuse.
//!
//! A [`Trial`] has a name, the QEMUs that it needs, and a play that says what was seen or what is wrong. `written` and
//! `checkpoint` have the streams that qevm writes, [`machine`] a stream made of nothing but declarations, `foreseen`
//! the pairs of source and destination that `qevm check` has to judge as QEMU does.

mod checkpoint;
mod foreseen;
pub mod machine;
pub mod pairs;
mod question;
mod side;
mod written;

use anyhow::Result;
use std::collections::BTreeMap;
use std::time::Instant;

pub use self::question::{Trial, TrialEnv};
use crate::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm};
use crate::outcome::{Outcome, Report, Row};
use crate::roots::{Root, Suite};
use crate::subject::Subject;

/// All trials, in the order of the table.
pub fn all() -> Vec<Trial> {
    let mut trials = written::trials();
    trials.extend(checkpoint::trials());
    trials.extend(foreseen::trials());
    trials
}

/// Plays trials one after the other, telling `each` about every row as it ends.
pub fn run(trials: &[Trial], subject: &Subject, mut each: impl FnMut(&Row<String>)) -> Report<String> {
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
            (Some(why), _) => Outcome::unavailable(REQUIRE_QEMU, why),
            (None, Err(why)) if trial.kvm => Outcome::unavailable(REQUIRE_KVM, why),
            _ => play(trial, &roots, subject).into(),
        };
        let row = Row { name: trial.name.clone(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    Report { rows }
}

fn play(trial: &Trial, roots: &BTreeMap<Suite, Root>, subject: &Subject) -> Result<String> {
    // Sockets live here, and their paths must be short.
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    (trial.play)(&TrialEnv { roots, subject, scratch: scratch.path() })
}
