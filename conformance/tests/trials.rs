//! Real QEMUs load what qevm writes, and qevm foresees what they refuse. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use qevm_conformance::subject::Subject;
use qevm_conformance::trial::{self, Outcome};

/// The file in which `make test` collects the names of tests that could not run.
const SKIPPED_TESTS: &str = "QEVM_SKIPPED_TESTS";

#[test]
fn real_qemus_load_what_qevm_writes_and_refuse_what_it_foresees() {
    let subject = Subject::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let trials = trial::all();
    let rows = trial::run(&trials, &subject, |row| eprintln!("{}", row.line()));
    let mut list = std::env::var_os(SKIPPED_TESTS).map(|path| {
        OpenOptions::new().create(true).append(true).open(path).expect("the list of skipped tests can be written")
    });
    for row in &rows {
        if let (Outcome::Skipped(why), Some(list)) = (&row.outcome, &mut list) {
            writeln!(list, "qevm-conformance trial {}: {why}", row.name).unwrap();
        }
    }
    assert_eq!(rows.len(), trials.len());
    let failures: Vec<String> =
        rows.iter().filter(|row| matches!(row.outcome, Outcome::Failed(_))).map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), rows.len(), failures.join("\n"));
}

#[test]
fn names_of_trials_are_unique() {
    let mut names: Vec<String> = trial::all().into_iter().map(|trial| trial.name).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}
