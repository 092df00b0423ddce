//! The quick subset of the matrix of page channels with real QEMU. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::channels::{run, table};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::subject::Subject;
use std::path::PathBuf;

#[test]
fn qevm_trades_page_channels_with_real_qemu() {
    let subject = Subject::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    let rows = table::quick();
    let report = run::run(&rows, &subject, 2, |line| eprintln!("{}", line.text()));
    eprintln!("{}", report.text());
    list_skips("channels", report.skips().map(|(line, why)| (line.name.as_str(), why))).unwrap();
    assert!(report.lines.len() >= rows.len());
    let failures: Vec<String> = report.failures().map(|line| line.text()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), rows.len(), failures.join("\n"));
}
