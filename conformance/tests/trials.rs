//! Real QEMUs load what qevm writes, and qevm foresees what they refuse. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::outcome::list_skips;
use qevm_conformance::subject::Subject;
use qevm_conformance::trial;
use std::path::PathBuf;

#[test]
fn real_qemus_load_what_qevm_writes_and_refuse_what_it_foresees() {
    let subject = Subject::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let trials = trial::all();
    let report = trial::run(&trials, &subject, |row| eprintln!("{}", row.line()));
    list_skips("trial", report.skips()).unwrap();
    assert_eq!(report.rows.len(), trials.len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}

#[test]
fn names_of_trials_are_unique() {
    let mut names: Vec<String> = trial::all().into_iter().map(|trial| trial.name).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}
