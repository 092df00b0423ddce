//! A Linux guest of an emulated QEMU visits reference-vmm. What this machine lacks is skipped by name;
//! `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::matrix::{REQUIRE_KVM, REQUIRE_QEMU};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::peer::{Monitor, StoppedLinuxGuest};
use qevm_conformance::roots::{Root, Suite};
use std::fs::OpenOptions;
use std::path::PathBuf;

#[test]
fn a_linux_guest_of_7_2_comes_back_as_it_was() {
    visit(StoppedLinuxGuest { from: Suite::Bookworm, to: Suite::Bookworm });
}

#[test]
fn a_linux_guest_of_10_0_comes_back_as_it_was() {
    // Not to 11.1, which refuses the queues of 1024 entries that 10.0.13 offers to the guest.
    visit(StoppedLinuxGuest { from: Suite::Trixie, to: Suite::Trixie });
}

#[test]
fn a_linux_guest_goes_from_11_1_to_10_0() {
    visit(StoppedLinuxGuest { from: Suite::Sid, to: Suite::Trixie });
}

fn visit(guest: StoppedLinuxGuest) {
    let name = format!("{} to {}", guest.from.series(), guest.to.series());
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return skip(&name, REQUIRE_KVM, &format!("/dev/kvm cannot be opened: {error}"));
    }
    let (from, to) = match (Root::install(guest.from), Root::install(guest.to)) {
        (Ok(from), Ok(to)) => (from, to),
        (Err(error), _) | (_, Err(error)) => return skip(&name, REQUIRE_QEMU, &format!("{error:#}")),
    };
    let program = Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
    match guest.play(&from, &to, &program) {
        Ok(account) => eprintln!("{name}: {account}"),
        Err(error) => panic!("{name}: {error:#}"),
    }
}

fn skip(name: &str, variable: &str, why: &str) {
    assert!(std::env::var_os(variable).is_none_or(|value| value != "1"), "{variable}=1, but {why}");
    eprintln!("skipped: {name}: {why}");
    list_skips("stopped-linux", [(name, why)]).unwrap();
}
