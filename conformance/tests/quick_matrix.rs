//! The quick matrix with real QEMU. What this machine lacks is skipped by name; `QEVM_REQUIRE_QEMU=1` and
//! `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use qevm_conformance::matrix::{self, Options};
use qevm_conformance::report::Outcome;
use qevm_conformance::subject::Subject;
use qevm_conformance::table;

/// The file in which `make test` collects the names of tests that could not run.
const SKIPPED_TESTS: &str = "QEVM_SKIPPED_TESTS";

#[test]
fn qevm_agrees_with_real_qemu() {
    let subject = Subject::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let options = Options { jobs: 2, keep: None };
    let report = matrix::run(&table::quick(), &subject, &options, |row| eprintln!("{}", row.line())).unwrap();
    eprintln!("{}", report.text());
    let mut list = std::env::var_os(SKIPPED_TESTS).map(|path| {
        OpenOptions::new().create(true).append(true).open(path).expect("the list of skipped tests can be written")
    });
    for row in report.skips() {
        let Outcome::Skipped(why) = &row.outcome else { unreachable!("only skipped rows are listed as skips") };
        if let Some(list) = &mut list {
            writeln!(list, "qevm-conformance {}: {why}", row.name).unwrap();
        }
    }
    assert_eq!(report.rows.len(), table::quick().len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}
