//! Where the guest runs when something goes wrong: the representative rows. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::lifecycle::{self, table};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::peer::Monitor;
use std::path::PathBuf;

#[test]
fn the_guest_runs_at_one_end_or_is_held_paused_at_one() {
    let program = Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let rows = table::quick();
    let report = lifecycle::run(&rows, &program, |row| eprintln!("{}", row.line())).unwrap();
    list_skips("lifecycle", report.skips()).unwrap();
    assert_eq!(report.rows.len(), rows.len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}
