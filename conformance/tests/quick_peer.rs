//! Running guests between real QEMUs and reference-vmm: the representative journeys. What this machine lacks is skipped by
//! name; `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use qevm_conformance::peer::{self, Monitor};

/// The file in which `make test` collects the names of tests that could not run.
const SKIPPED_TESTS: &str = "QEVM_SKIPPED_TESTS";

#[test]
fn running_guests_go_to_and_fro_between_qemu_and_reference_vmm() {
    let program = Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let journeys = peer::table::quick();
    let report = peer::run(&journeys, &program, None, |row| eprintln!("{}", row.line())).unwrap();
    let mut list = std::env::var_os(SKIPPED_TESTS).map(|path| {
        OpenOptions::new().create(true).append(true).open(path).expect("the list of skipped tests can be written")
    });
    for (name, why) in report.skips() {
        if let Some(list) = &mut list {
            writeln!(list, "qevm-conformance peer {name}: {why}").unwrap();
        }
    }
    assert_eq!(report.rows.len(), journeys.len());
    let failures: Vec<String> = report.failures().map(|row| row.line()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), report.rows.len(), failures.join("\n"));
}
