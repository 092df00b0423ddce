//! Guests between real QEMUs and `toy_vmm`: the representative trips. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` turns such skips into failures.

use qevm_conformance::outcome::list_skips;
use qevm_conformance::toy;
use std::path::Path;

#[test]
fn guests_go_to_the_toy_and_back_with_their_memory_and_a_device() {
    let trips = toy::quick();
    let judge = Path::new(env!("CARGO_BIN_EXE_qevm-conformance"));
    let report = toy::run(&trips, judge, |row| eprintln!("{}", row.line()));
    list_skips("toy", report.skips()).unwrap();
    assert_eq!(report.rows.len(), trips.len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}
