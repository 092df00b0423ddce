//! What each real QEMU starts with under KVM on this host. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::roots::{Root, Suite};
use std::io::{Write, stderr};

#[test]
fn every_release_starts_under_kvm() {
    if let Err(why) = kvm() {
        return skip("all releases", REQUIRE_KVM, &why);
    }
    for suite in Suite::ALL {
        match Root::install(suite) {
            Ok(root) => {
                let cpu = root.host_cpu().unwrap_or_else(|error| panic!("{error:#}"));
                // Past the capture of the test harness: who reads the log of a run is to know it.
                writeln!(stderr(), "QEMU {} under KVM on this host: {cpu}", root.version()).unwrap();
            }
            Err(why) => skip(suite.series(), REQUIRE_QEMU, &format!("{why:#}")),
        }
    }
}

fn skip(name: &str, variable: &str, why: &str) {
    assert!(!required(variable), "{variable}=1, but {why}");
    eprintln!("skipped: {name}: {why}");
    list_skips("host_cpu", [(name, why)]).unwrap();
}
