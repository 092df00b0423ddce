//! QMP as real QEMUs speak it. What this machine lacks is skipped by name; `QEVM_REQUIRE_QEMU=1` and
//! `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use qevm_conformance::peer::python::Python;
use qevm_conformance::peer::{Monitor, Stop, dialogue, reboots};
use qevm_conformance::roots::{Root, Suite};
use qevm_conformance::scenario::Accel;
use serde_json::json;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// The file in which `make test` collects the names of tests that could not run.
const SKIPPED_TESTS: &str = "QEVM_SKIPPED_TESTS";

fn program() -> Monitor {
    Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")))
}

fn skipped(name: &str, variable: &str, why: &str) {
    assert!(!required(variable), "{variable}=1, but {why}");
    eprintln!("skipped {name}: {why}");
    if let Some(path) = std::env::var_os(SKIPPED_TESTS) {
        let mut list = OpenOptions::new().create(true).append(true).open(path).expect("the list can be written");
        writeln!(list, "qevm-conformance {name}: {why}").expect("the list can be written");
    }
}

#[test]
fn reference_vmm_answers_as_qemu_does() {
    const NAME: &str = "qmp dialogue";
    if let Err(why) = kvm() {
        return skipped(NAME, REQUIRE_KVM, &why);
    }
    let root = match Root::install(Suite::Sid) {
        Ok(root) => root,
        Err(why) => return skipped(NAME, REQUIRE_QEMU, &format!("{why:#}")),
    };
    let scratch = tempfile::tempdir().unwrap();
    let (differences, replies) = dialogue::compare(&root, &program(), scratch.path()).unwrap();
    eprintln!("{replies} replies were compared");
    assert!(replies > 100, "only {replies} replies were compared");
    assert!(differences.is_empty(), "{} of {replies} replies differ:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn what_another_release_refuses_is_refused_for_its_sake() {
    const NAME: &str = "qmp dialogue of releases";
    if let Err(why) = kvm() {
        return skipped(NAME, REQUIRE_KVM, &why);
    }
    let scratch = tempfile::tempdir().unwrap();
    for suite in Suite::ALL {
        let root = match Root::install(suite) {
            Ok(root) => root,
            Err(why) => return skipped(NAME, REQUIRE_QEMU, &format!("{why:#}")),
        };
        let (differences, replies) = dialogue::releases::compare(&root, &program(), scratch.path()).unwrap();
        assert_eq!((replies, differences), (14, Vec::<String>::new()));
    }
}

#[test]
fn qemus_python_package_drives_reference_vmm() {
    const NAME: &str = "qmp python client";
    if let Err(why) = kvm() {
        return skipped(NAME, REQUIRE_KVM, &why);
    }
    let python = match Python::install() {
        Ok(python) => python,
        Err(why) => return skipped(NAME, REQUIRE_QEMU, &format!("{why:#}")),
    };
    let scratch = tempfile::tempdir().unwrap();
    let told = python.drive(&program(), scratch.path()).unwrap();
    assert_eq!(told["greeting"], json!(["capabilities", "version"]), "{told}");
    assert_eq!(
        (&told["status"], &told["migration"], &told["arrived"]),
        (&json!("running"), &json!("completed"), &json!("running")),
        "{told}"
    );
    let limits = "Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms";
    assert_eq!(told["refused"], json!(["GenericError", limits]), "{told}");
    assert_eq!(told["events"], json!(["setup", "active", "STOP", "device", "completed"]), "{told}");
    assert!(told["commands"].as_u64() >= Some(25), "{told}");
}

#[test]
fn guests_are_reset_and_monitors_end_as_with_qemu() {
    const NAME: &str = "resets and ends";
    if let Err(why) = kvm() {
        return skipped(NAME, REQUIRE_KVM, &why);
    }
    let root = match Root::install(Suite::Sid) {
        Ok(root) => root,
        Err(why) => return skipped(NAME, REQUIRE_QEMU, &format!("{why:#}")),
    };
    let scratch = tempfile::tempdir().unwrap();
    let differences = reboots::compare(&root, &program(), scratch.path()).unwrap();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn resets_do_not_hinder_a_migration_between_qemu_and_reference_vmm() {
    const NAME: &str = "resets while migrating";
    if let Err(why) = kvm() {
        return skipped(NAME, REQUIRE_KVM, &why);
    }
    let root = match Root::install(Suite::Sid) {
        Ok(root) => root,
        Err(why) => return skipped(NAME, REQUIRE_QEMU, &format!("{why:#}")),
    };
    let qemu = Stop::Qemu(Suite::Sid, Accel::Kvm);
    for (from, to) in [(qemu, Stop::Reference), (Stop::Reference, qemu), (Stop::Reference, Stop::Reference)] {
        let scratch = tempfile::tempdir().unwrap();
        reboots::play(from, to, &root, &program(), scratch.path())
            .unwrap_or_else(|error| panic!("{from} to {to}: {error:#}"));
    }
}
