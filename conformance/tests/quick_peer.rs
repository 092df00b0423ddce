//! Running guests between real QEMUs and reference-vmm: the representative journeys. What this machine lacks is skipped
//! by name; `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::outcome::list_skips;
use qevm_conformance::peer::{self, Monitor};
use std::path::PathBuf;

#[test]
fn running_guests_go_to_and_fro_between_qemu_and_reference_vmm() {
    let program = Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let journeys = peer::table::quick();
    let report = peer::run(&journeys, &program, None, |row| eprintln!("{}", row.line())).unwrap();
    list_skips("peer", report.skips()).unwrap();
    assert_eq!(report.rows.len(), journeys.len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}
