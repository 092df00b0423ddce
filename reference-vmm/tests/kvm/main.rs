//! Tests on real KVM.
//!
//! Where `/dev/kvm` cannot be opened they are reported as ignored, and their names are added to the file that
//! `QEVM_SKIPPED_TESTS` names; with `QEVM_REQUIRE_KVM=1` they fail instead.

mod backends;
mod boot;
mod cpr;
mod dirty_log;
mod dirty_ring;
mod drives;
mod event_log;
mod guest;
mod incoming;
mod lazy;
mod lifecycle;
mod linux;
mod machine;
mod migration;
mod page_server;
mod payload;
mod qmp;
mod qmp_clients;
mod reset;
mod snapshot;
mod state;
mod strange_peers;
mod testdev;
mod transports;
mod vfio;
mod vfio_host;
mod vfio_recorded;
mod vfio_used;
mod worst;

use libtest_mimic::{Arguments, Failed, Trial};
use reference_vmm::machine::open_kvm;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

type Test = (&'static str, fn());

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let missing = open_kvm(Path::new("/dev/kvm")).err().map(|error| error.to_string());
    let required = std::env::var_os("QEVM_REQUIRE_KVM").is_some_and(|value| value == "1");
    let tests: Vec<Test> = [
        boot::TESTS,
        payload::TESTS,
        machine::TESTS,
        reset::TESTS,
        lifecycle::TESTS,
        state::TESTS,
        dirty_log::TESTS,
        dirty_ring::TESTS,
        drives::TESTS,
        migration::TESTS,
        incoming::TESTS,
        backends::TESTS,
        cpr::TESTS,
        lazy::TESTS,
        page_server::TESTS,
        snapshot::TESTS,
        qmp::TESTS,
        qmp_clients::TESTS,
        event_log::TESTS,
        transports::TESTS,
        vfio::TESTS,
        vfio_host::TESTS,
        vfio_recorded::TESTS,
        vfio_used::TESTS,
        strange_peers::TESTS,
        worst::TESTS,
    ]
    .concat();
    if missing.is_some() && !required && !arguments.list {
        report_skipped(&tests, "cannot open /dev/kvm");
    }
    // A paravirtual KVM may let its guests read the host's TSC as it is.
    let tsc_moves = missing.is_none() && state::tsc_is_virtual();
    if !tsc_moves && !arguments.list {
        report_skipped(state::TSC_TESTS, "this KVM does not virtualise the TSC");
    }
    let tsc_tests = state::TSC_TESTS.iter().map(|(name, test)| {
        Trial::test(*name, move || {
            test();
            Ok(())
        })
        .with_ignored_flag(!tsc_moves)
    });
    let hosts = [
        (backends::HUGE_PAGE_TESTS, backends::huge_pages_missing()),
        (backends::USERFAULTFD_TESTS, backends::userfaultfd_stays()),
    ];
    let hosts = hosts.into_iter().flat_map(|(tests, why)| {
        let why = why.filter(|_| missing.is_none());
        if let Some(why) = why.filter(|_| !arguments.list) {
            report_skipped(tests, why);
        }
        let ignored = why.is_some() || missing.is_some();
        tests.iter().map(move |(name, test)| {
            let run = move || {
                test();
                Ok(())
            };
            Trial::test(*name, run).with_ignored_flag(ignored)
        })
    });
    let hosts: Vec<_> = hosts.collect();
    let linux = [linux::TESTS, linux::QEMU_TESTS].into_iter().zip(linux::missing()).flat_map(|(tests, missing)| {
        if let Some(why) = missing.filter(|_| !arguments.list) {
            report_skipped(tests, why);
        }
        tests.iter().map(move |(name, test)| {
            let run = move || {
                test();
                Ok(())
            };
            Trial::test(*name, run).with_ignored_flag(missing.is_some())
        })
    });
    let linux: Vec<_> = linux.collect();
    let trials = tests.into_iter().map(|(name, test)| match &missing {
        None => Trial::test(name, move || {
            test();
            Ok(())
        }),
        Some(why) if required => {
            let why = why.clone();
            Trial::test(name, move || Err(Failed::from(why)))
        }
        Some(_) => Trial::test(name, || Ok(())).with_ignored_flag(true),
    });
    libtest_mimic::run(&arguments, trials.chain(tsc_tests).chain(hosts).chain(linux).collect()).exit_code()
}

fn report_skipped(tests: &[Test], why: &str) {
    let Some(path) = std::env::var_os("QEVM_SKIPPED_TESTS") else { return };
    let mut file =
        OpenOptions::new().create(true).append(true).open(path).expect("the list of skipped tests is writable");
    for (name, _) in tests {
        writeln!(file, "reference-vmm kvm {name}: {why}").expect("the list of skipped tests is writable");
    }
}
