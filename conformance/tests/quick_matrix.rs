//! The quick matrix with real QEMU. What this machine lacks is skipped by name; `QEVM_REQUIRE_QEMU=1` and
//! `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::matrix::{self, Options};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::subject::Subject;
use qevm_conformance::table;
use std::path::PathBuf;

#[test]
fn qevm_agrees_with_real_qemu() {
    let subject = Subject::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let options = Options { jobs: 2, keep: None };
    let report = matrix::run(&table::quick(), &subject, &options, |row| eprintln!("{}", row.line())).unwrap();
    eprintln!("{}", report.text());
    list_skips("matrix", report.skips().map(|(row, why)| (row.name.as_str(), why))).unwrap();
    assert_eq!(report.rows.len(), table::quick().len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}
