//! Live migration of the payload guest from one machine to another.

use crate::Test;
use crate::guest::Guest;
use qevm_migration::{
    Address, Capabilities, Job, Listener, MigrationError, Parameters, Socket, Statistics, Status, migrate, receive,
};
use qevm_wire::{Profile, QemuVersion};
use reference_vmm::machine::RunState;
use reference_vmm::payload::Progress;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("migration_over_tcp_with_return_path", over_tcp),
    ("migration_over_unix_without_return_path", over_unix_without_return_path),
    ("migration_of_two_vcpus_under_load", two_vcpus),
    ("migration_of_four_vcpus_under_load", four_vcpus),
    ("migration_there_and_back", there_and_back),
    ("migration_as_every_release", as_every_release),
    ("migration_failure_leaves_the_source_running", failure_leaves_the_source_running),
    ("migration_cancel_leaves_the_source_running", cancel_leaves_the_source_running),
    ("migration_of_a_fast_guest_waits_for_it", fast_guest),
    ("migration_into_another_machine_is_refused", into_another_machine),
];

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 64 * MIB;
/// A guest that dirties 16 MiB at 20 MiB/s, and checks all else quickly.
const PAYLOAD: &str = "dirty=16M rate=20M hold=8M zero=4M verify=16384 report=50";

fn tcp() -> Address {
    Address::tcp("127.0.0.1", 0)
}

fn profile() -> Profile {
    Profile::new(QemuVersion::NEWEST, "microvm")
}

fn job(return_path: bool, max_bandwidth: u64) -> Arc<Job> {
    let job = Job::default();
    job.set_capabilities(Capabilities::default().with([("return-path", return_path)]).unwrap()).unwrap();
    let mut parameters = Parameters::default();
    parameters.max_bandwidth = max_bandwidth;
    job.set_parameters(parameters);
    Arc::new(job)
}

/// Migrates, and starts the guest at the destination if it has arrived.
fn move_guest(
    from: &Guest,
    to: &Guest,
    job: &Job,
    address: &Address,
    profile: &Profile,
) -> (Result<(), MigrationError>, Result<(), MigrationError>) {
    let listener = Listener::bind(address).unwrap();
    let address = listener.address().clone();
    thread::scope(|scope| {
        let arriving = scope.spawn(|| {
            let channel = listener.accept()?;
            let incoming = Job::default();
            incoming.begin().unwrap();
            let arrival = receive(&to.machine, channel.clone().into(), &incoming, profile)?;
            assert!(arrival.running);
            to.machine.resume().unwrap();
            channel.close();
            Ok(())
        });
        job.begin().unwrap();
        let sent = Socket::connect(&address).and_then(|channel| migrate(&from.machine, &channel.into(), job, profile));
        (sent, arriving.join().unwrap())
    })
}

/// Moves a guest that dirties memory, and asserts that it lost nothing and goes on.
fn moves(cpus: usize, payload: &str, job: &Job, address: &Address, profile: &Profile) -> Statistics {
    let from = Guest::boot(MEMORY, cpus, payload);
    from.wait_for_passes();
    let to = Guest::new(MEMORY, cpus, payload);
    let (sent, arrived) = move_guest(&from, &to, job, address, profile);
    sent.unwrap();
    arrived.unwrap();
    assert_eq!(from.machine.run_state(), RunState::Paused, "the guest runs on both sides");
    assert!(!from.machine.dirty_log().is_enabled());
    assert_goes_on(&from, &to);
    let statistics = job.statistics();
    assert_eq!(statistics.status, Status::Completed);
    assert!(statistics.ram.duplicate > 0 && statistics.ram.normal > 0);
    statistics
}

/// The output of both sides is one text, and the guest finds all its pages as it left them.
fn assert_goes_on(from: &Guest, to: &Guest) {
    let last = |lines: &[String]| lines.iter().rev().find_map(|line| Progress::parse(line));
    let before = last(&from.console.lines()).expect("it printed before");
    to.assert_healthy();
    let text = [from.console.raw(), to.console.raw()].concat();
    let progress: Vec<_> = String::from_utf8(text).unwrap().lines().filter_map(Progress::parse).collect();
    assert!(progress.is_sorted_by_key(|p| (p.ms, p.pass, p.written)), "the output has a gap or repeats itself");
    let after = progress.last().unwrap();
    assert!(after.pass > before.pass && after.stale == 0);
}

fn over_tcp() {
    let statistics = moves(1, PAYLOAD, &job(true, 60 * MIB), &tcp(), &profile());
    assert!(statistics.rounds.len() >= 2, "{statistics:?}");
    // The guest was stopped for what it wrote last, and not for all of it.
    let ram = &statistics.ram;
    assert!(statistics.downtime.is_some() && ram.downtime_bytes < ram.precopy_bytes, "{statistics:?}");
}

fn over_unix_without_return_path() {
    let directory = tempfile::tempdir().unwrap();
    moves(1, PAYLOAD, &job(false, 60 * MIB), &Address::Unix(directory.path().join("in")), &profile());
}

fn two_vcpus() {
    moves(2, PAYLOAD, &job(true, 60 * MIB), &tcp(), &profile());
}

fn four_vcpus() {
    moves(4, PAYLOAD, &job(true, 0), &tcp(), &profile());
}

fn there_and_back() {
    let mut here = Guest::boot(MEMORY, 2, PAYLOAD);
    for hop in 0..6 {
        let there = Guest::new(MEMORY, 2, PAYLOAD);
        let (sent, arrived) = move_guest(&here, &there, &job(hop % 2 == 0, 0), &tcp(), &profile());
        sent.unwrap();
        arrived.unwrap();
        there.assert_healthy();
        here = there;
    }
}

/// The bytes differ between releases; each must carry all that the guest needs.
fn as_every_release() {
    for release in ["5.2", "7.2", "10.0", "11.1"] {
        let profile = Profile::new(release.parse().unwrap(), "microvm");
        moves(2, PAYLOAD, &job(true, 0), &tcp(), &profile);
    }
}

fn failure_leaves_the_source_running() {
    let from = Guest::boot(MEMORY, 2, PAYLOAD);
    let job = job(true, 60 * MIB);
    // A destination that goes away in the middle of the first round.
    let listener = Listener::bind(&tcp()).unwrap();
    let address = listener.address().clone();
    thread::scope(|scope| {
        let listener = &listener;
        scope.spawn(move || {
            let channel = listener.accept().unwrap();
            thread::sleep(Duration::from_millis(100));
            channel.close();
        });
        job.begin().unwrap();
        let channel = Socket::connect(&address).unwrap();
        migrate(&from.machine, &channel.into(), &job, &profile()).unwrap_err();
    });
    assert_eq!(job.status(), Status::Failed);
    assert!(job.statistics().error.is_some());
    assert_eq!(from.machine.run_state(), RunState::Running);
    assert!(!from.machine.dirty_log().is_enabled());
    from.assert_healthy();
    // The receiver is gone.
    drop(listener);
    assert!(matches!(Socket::connect(&address), Err(MigrationError::Connect { .. })));
    // A later migration succeeds.
    let to = Guest::new(MEMORY, 2, PAYLOAD);
    let (sent, arrived) = move_guest(&from, &to, &job, &tcp(), &profile());
    sent.unwrap();
    arrived.unwrap();
    assert_goes_on(&from, &to);
}

fn cancel_leaves_the_source_running() {
    let from = Guest::boot(MEMORY, 1, PAYLOAD);
    let to = Guest::new(MEMORY, 1, PAYLOAD);
    let job = job(true, MIB);
    let canceller = job.clone();
    let cancel = thread::spawn(move || {
        while canceller.status() != Status::Active {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(200));
        canceller.cancel().unwrap();
    });
    let (sent, arrived) = move_guest(&from, &to, &job, &tcp(), &profile());
    cancel.join().unwrap();
    assert!(matches!(sent, Err(MigrationError::Cancelled | MigrationError::Send { .. })), "{sent:?}");
    arrived.unwrap_err();
    assert_eq!(job.status(), Status::Cancelled);
    assert_eq!((from.machine.run_state(), to.machine.run_state()), (RunState::Running, RunState::Paused));
    from.assert_healthy();
}

/// A guest that dirties faster than the link carries is not stopped, until the link becomes faster.
fn fast_guest() {
    let payload = "dirty=4M rate=0 hold=1M zero=1M report=50";
    let from = Guest::boot(MEMORY, 1, payload);
    let to = Guest::new(MEMORY, 1, payload);
    let job = job(true, 4 * MIB);
    let mut parameters = job.parameters();
    parameters.downtime_limit_ms = 10;
    job.set_parameters(parameters.clone());
    let watched = job.clone();
    let operator = thread::spawn(move || {
        while watched.statistics().stalled.is_none() {
            assert!(watched.status() != Status::Completed, "it was stopped although the rest did not fit");
            thread::sleep(Duration::from_millis(10));
        }
        parameters.max_bandwidth = 0;
        parameters.downtime_limit_ms = 2000;
        watched.set_parameters(parameters);
    });
    let (sent, arrived) = move_guest(&from, &to, &job, &tcp(), &profile());
    operator.join().unwrap();
    sent.unwrap();
    arrived.unwrap();
    to.assert_healthy();
}

fn into_another_machine() {
    let from = Guest::boot(MEMORY, 2, PAYLOAD);
    let job = job(true, 0);
    let smaller = Guest::new(MEMORY / 2, 2, PAYLOAD);
    let (sent, arrived) = move_guest(&from, &smaller, &job, &tcp(), &profile());
    let message = arrived.unwrap_err().to_string();
    assert!(message.contains("size mismatch: microvm.ram: 0x4000000 != 0x2000000"), "{message}");
    sent.unwrap_err();
    let fewer = Guest::new(MEMORY, 1, PAYLOAD);
    let (sent, arrived) = move_guest(&from, &fewer, &job, &tcp(), &profile());
    let message = arrived.unwrap_err().to_string();
    assert!(message.contains("unknown section or instance 'apic' 1"), "{message}");
    assert!(matches!(sent, Err(MigrationError::PeerFailed { status: 1 })), "{sent:?}");
    from.assert_healthy();
}
