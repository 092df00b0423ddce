//! What must hold whatever happens between two machines.

use super::*;
use crate::{Doubt, LoadError, Mode, Notice};
use qevm_savevm::command::Command;
use qevm_savevm::{Encoder, StreamWriter};
use qevm_wire::{Located, PageGeometry};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Bytes of the confirmation after the end of the stream: a command with a 32-bit value.
const CONFIRMATION: u64 = 9;

#[test]
fn a_working_guest_moves_with_and_without_a_return_path() {
    for return_path in [true, false] {
        let pair = Pair::new(2000).return_path(return_path);
        let outcome = pair.run(Faults::default());
        pair.assert_moved(&outcome);
        let ram = outcome.statistics.ram;
        assert!(ram.dirty_sync_count >= 2, "the guest was working: {ram:?}");
        assert!(ram.duplicate > 600 && ram.normal > 1300, "{ram:?}");
        assert_eq!(ram.remaining, 0);
        assert_eq!(outcome.destination.unwrap().bytes, outcome.written);
        assert_eq!(ram.transferred + if return_path { CONFIRMATION } else { 0 }, outcome.written);
    }
}

/// How acks are counted is the release's: 10.0 wants one from every destination, 11.1 one for each device that asks.
#[test]
fn the_switchover_waits_for_the_acks_that_the_release_wants() {
    let with_ack = Capabilities::default().with([("return-path", true), ("switchover-ack", true)]).unwrap();
    for (release, wanted) in [(QemuVersion::new(10, 0), true), (QemuVersion::NEWEST, false)] {
        let mut pair = Pair::new(60);
        pair.profile = Profile::new(release, "microvm");
        pair.job.set_capabilities(with_ack).unwrap();
        pair.assert_moved(&pair.run(Faults::default()));

        let mut pair = Pair::new(60);
        pair.profile = Profile::new(release, "microvm");
        pair.job.set_capabilities(with_ack).unwrap();
        pair.incoming = Some(Capabilities { switchover_ack: false, ..with_ack });
        let job = pair.job.clone();
        let operator = std::thread::spawn(move || {
            loop {
                let statistics = job.statistics();
                // It is named while the source waits, and when that has waited long enough.
                let named = statistics.stalled.or(statistics.error);
                if named.is_some() || statistics.status == Status::Completed {
                    job.cancel().unwrap();
                    return named;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let outcome = pair.run(Faults::default());
        let named = operator.join().unwrap();
        assert_eq!(named.is_some_and(|why| why.contains("0 of 1 switchover acks came")), wanted);
        if wanted { pair.assert_stayed(&outcome) } else { pair.assert_moved(&outcome) }
    }
}

/// What the kernel has taken and the link has not carried would be part of the downtime.
#[test]
fn the_guest_runs_while_what_was_sent_is_on_its_way() {
    let pair = Pair::new(60);
    let faults = Faults { backlog: Arc::new(20.into()), ..Faults::default() };
    let (left, job) = (faults.backlog.clone(), pair.job.clone());
    let watch = std::thread::spawn(move || {
        let mut stopped_early = false;
        loop {
            let stopped = job.statistics().stopped_at.is_some();
            // Looked at in this order: what was still on its way now was so when the guest was seen stopped.
            if left.load(Ordering::Relaxed) == 0 {
                return stopped_early;
            }
            stopped_early |= stopped;
        }
    });
    pair.assert_moved(&pair.run(faults));
    assert!(!watch.join().unwrap());

    // A peer that takes nothing any more does not keep an operator from cancelling.
    let pair = Pair::new(60);
    let faults = Faults { backlog: Arc::new(u64::MAX.into()), ..Faults::default() };
    let (left, job) = (faults.backlog.clone(), pair.job.clone());
    let operator = std::thread::spawn(move || {
        while left.load(Ordering::Relaxed) > u64::MAX - 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        job.cancel().unwrap();
    });
    let outcome = pair.run(faults);
    operator.join().unwrap();
    pair.assert_stayed(&outcome);
}

/// Nothing is dirtied while the guest is paused, so every page goes once; a working guest's go more often.
#[test]
fn mode_cpr_reboot_stops_the_guest_before_the_first_page() {
    let pair = Pair::new(500);
    let mut parameters = pair.job.parameters();
    parameters.mode = Mode::CprReboot;
    pair.job.set_parameters(parameters);
    let outcome = pair.run(Faults::default());
    pair.assert_moved(&outcome);
    let ram = outcome.statistics.ram;
    assert_eq!((ram.normal + ram.duplicate) * ram.page_size, ram.total);
    // It was paused while every round was sent.
    let Statistics { rounds, downtime, .. } = &outcome.statistics;
    let sending = rounds.iter().map(|round| round.took).sum();
    assert!(!rounds.is_empty() && *downtime >= Some(sending), "{:?}", outcome.statistics);

    let pair = Pair::new(500);
    let mut parameters = pair.job.parameters();
    parameters.mode = Mode::CprReboot;
    pair.job.set_parameters(parameters);
    let outcome = pair.run(Faults { cut_at: Some(100_000), ..Faults::default() });
    pair.assert_stayed(&outcome);
}

#[test]
fn a_paused_guest_moves_and_stays_paused() {
    let pair = Pair::new(100);
    pair.source.pause().unwrap();
    let outcome = pair.run(Faults::default());
    assert!(!outcome.destination.unwrap().running);
    assert!(!pair.source.is_running() && !pair.destination.is_running());
    pair.source.assert_same_memory(&pair.destination);
}

/// A few places, with threads and sockets; [`testing`](crate::testing) has all of them.
#[test]
fn a_cut_connection_leaves_the_guest_running_at_the_source() {
    let total = Pair::new(60).run(Faults::default()).written;
    let mut cut = 0;
    for place in [0, 3, 300, 100_000, total - CONFIRMATION - 400, total - 2, total - 1] {
        let mut pair = Pair::new(60);
        let outcome = pair.run(Faults { cut_at: Some(place), ..Faults::default() });
        // How long a stream is depends on how many rounds the clock makes of it.
        let confirming = outcome.statistics.status == Status::Completed;
        match (confirming, &outcome.destination) {
            (true, _) => pair.assert_moved(&outcome),
            // Only the confirmation was lost: the destination has everything, and the operator decides.
            (false, Err(MigrationError::Undecided(Doubt::NotConfirmed)))
                if matches!(outcome.source, Err(MigrationError::Unsettled { .. })) =>
            {
                assert!(!pair.source.is_running() && !pair.destination.is_running());
                pair.source.assert_same_memory(&pair.destination);
                assert!(place + CONFIRMATION > outcome.written);
            }
            (false, _) => {
                pair.assert_stayed(&outcome);
                cut += 1;
                pair.renew_destination();
                let again = pair.run(Faults::default());
                pair.assert_moved(&again);
            }
        }
    }
    // A guest that writes nothing needs one round, which is longer than that.
    assert!(cut >= 4, "only {cut} places were before the end");
}

#[test]
fn without_a_return_path_a_destination_that_misses_something_never_runs() {
    for place in [0, 150, 100_000] {
        let pair = Pair::new(60).return_path(false);
        let outcome = pair.run(Faults { cut_at: Some(place), ..Faults::default() });
        pair.assert_stayed(&outcome);
    }
}

#[test]
fn a_lost_verdict_leaves_the_guest_at_the_source() {
    // PONG 1, PONG AGREED, SHUT: 8 bytes each.
    for place in [0, 12, 16, 23] {
        let pair = Pair::new(60);
        let outcome = pair.run(Faults { cut_return_path_at: Some(place), ..Faults::default() });
        pair.assert_stayed(&outcome);
    }
    let pair = Pair::new(60);
    let outcome = pair.run(Faults { cut_return_path_at: Some(25), ..Faults::default() });
    pair.assert_moved(&outcome);
}

#[test]
fn cancelling_leaves_exactly_one_guest_running() {
    let total = Pair::new(60).run(Faults::default()).written;
    let mut cancelled = 0;
    for place in [0, 300, 100_000, total - 600, total - CONFIRMATION - 1, total - 1, total + 50] {
        let pair = Pair::new(60);
        let job = pair.job.clone();
        let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || job.cancel().unwrap());
        let outcome = pair.run(Faults { call_at: Some((place, call)), ..Faults::default() });
        if outcome.source.is_ok() {
            pair.assert_moved(&outcome);
        } else {
            pair.assert_stayed(&outcome);
            assert_eq!(outcome.statistics.status, Status::Cancelled, "{place}: {outcome:?}");
            cancelled += 1;
        }
    }
    // Places that every stream has.
    assert!(cancelled >= 3, "{cancelled}");
}

#[test]
fn a_damaged_stream_is_named_by_offset_and_reported_to_the_source() {
    // Magic, version, type of the configuration section, machine type, number and length of commands, the section's
    // type, name, instance and version, the first record, a block's name and length.
    let stream = [0, 7, 8, 14, 22, 29, 35, 43, 49, 55, 59, 67, 70, 83].map(|place| (place, 0x41));
    for (place, mask) in stream {
        let pair = Pair::new(60);
        let outcome = pair.run(Faults { flip: Some((place, mask)), ..Faults::default() });
        pair.assert_stayed(&outcome);
        let Err(MigrationError::Load(error)) = &outcome.destination else { panic!("byte {place}: {outcome:?}") };
        assert!(error.offset.abs_diff(place) < 24, "byte {place}: {error}");
    }
}

#[test]
fn a_failure_of_the_destination_reaches_the_source() {
    let pair = Pair::new(200);
    pair.destination.refuses_devices.store(true, Ordering::Relaxed);
    let outcome = pair.run(Faults::default());
    pair.assert_stayed(&outcome);
    assert!(matches!(outcome.source, Err(MigrationError::PeerFailed { status: 1 })), "{outcome:?}");
    assert!(matches!(outcome.destination, Err(MigrationError::Load(Located { kind: LoadError::Devices(_), .. }))));
    assert_eq!(outcome.statistics.status, Status::Failed);
    assert!(outcome.statistics.error.unwrap().contains("SHUT 1"));
}

#[test]
fn a_source_that_is_busy_sending_hears_why_it_fails() {
    let mut stream = StreamWriter::new(Encoder::new(PageGeometry::X86), true);
    stream.header(None).unwrap();
    stream.command(Command::OpenReturnPath).unwrap();
    let (mut source, destination) = UnixStream::pair().unwrap();
    let (guest, job) = (FakeGuest::new(&[("microvm.ram", 8)]), Job::default());
    job.begin().unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let receiving: Arc<dyn Channel> = Arc::new(Socket::Unix(destination));
            receive(&guest, receiving.into(), &job, &Profile::new(QemuVersion::NEWEST, "microvm"))
        });
        source.write_all(stream.bytes()).unwrap();
        // More than any socket holds, and no section.
        source.write_all(&vec![0xee; 4 << 20]).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        source.read_to_end(&mut heard).unwrap();
        assert!(heard.ends_with(&[0, 1, 0, 4, 0, 0, 0, 1]), "SHUT 1 at the end of {heard:?}");
        let failed = receiver.join().unwrap().unwrap_err();
        assert!(matches!(failed, MigrationError::Load(_)), "{failed:?}");
    });
}

#[test]
fn a_mismatch_of_ram_is_named() {
    let mut pair = Pair::new(60);
    pair.destination = Arc::new(FakeGuest::new(&[("microvm.ram", 61), ("pc.bios", 4)]));
    let outcome = pair.run(Faults::default());
    pair.assert_stayed(&outcome);
    let Err(MigrationError::Load(error)) = outcome.destination else { panic!("{:?}", outcome.destination) };
    let LoadError::RamBlockSize { name, found, expected } = &error.kind else { panic!("{error}") };
    assert_eq!((name.as_str(), *found, *expected), (Some("microvm.ram"), 60 * 4096, 61 * 4096));
    assert!(error.to_string().contains("section 1 'ram'"), "{error}");

    pair.destination = Arc::new(FakeGuest::new(&[("microvm.ram", 60)]));
    let outcome = pair.run(Faults::default());
    pair.assert_stayed(&outcome);
    let Err(MigrationError::Load(error)) = outcome.destination else { panic!("{:?}", outcome.destination) };
    assert!(matches!(&error.kind, LoadError::UnknownRamBlock { found, .. } if *found == *"pc.bios"), "{error}");
}

#[test]
fn a_guest_that_is_faster_than_the_link_is_not_stopped_and_the_stall_is_named() {
    let pair = Pair::new(600);
    // Every 64 KiB that go out, the guest writes much more.
    pair.source.pages_per_step.store(200, Ordering::Relaxed);
    let mut parameters = pair.job.parameters();
    parameters.downtime_limit_ms = 1;
    pair.job.set_parameters(parameters);
    let job = pair.job.clone();
    let watcher = thread::spawn(move || {
        let start = Instant::now();
        loop {
            let statistics = job.statistics();
            if let Some(stalled) = statistics.stalled {
                assert_eq!(statistics.status, Status::Active);
                job.cancel().unwrap();
                return stalled;
            }
            assert!(start.elapsed() < Duration::from_secs(300), "no stall was reported: {statistics:?}");
            thread::sleep(Duration::from_millis(5));
        }
    });
    let outcome = pair.run(Faults { bytes_per_ms: Some(20_000), ..Faults::default() });
    let stalled = watcher.join().unwrap();
    assert!(stalled.contains("'microvm.ram' no longer shrinks"), "{stalled}");
    pair.assert_stayed(&outcome);
    assert_eq!(outcome.statistics.status, Status::Cancelled);
}

#[test]
fn the_rate_limit_holds_while_the_guest_runs() {
    let pair = Pair::new(1000);
    let mut parameters = pair.job.parameters();
    parameters.max_bandwidth = 8_000_000;
    pair.job.set_parameters(parameters);
    let outcome = pair.run(Faults::default());
    pair.assert_moved(&outcome);
    let statistics = outcome.statistics;
    let floor =
        Duration::from_secs_f64(statistics.ram.precopy_bytes as f64 / 8e6).saturating_sub(Duration::from_millis(150));
    assert!(statistics.total_time > floor, "{statistics:?}");
}

#[test]
fn pause_before_switchover_waits_and_can_be_cancelled() {
    for cancel in [false, true] {
        let pair = Pair::new(60);
        let capabilities = Capabilities::default();
        let capabilities = capabilities.with([("return-path", true), ("pause-before-switchover", true)]).unwrap();
        pair.job.set_capabilities(capabilities).unwrap();
        let (job, guest) = (pair.job.clone(), pair.source.clone());
        let operator = thread::spawn(move || {
            while job.status() != Status::PreSwitchover {
                thread::sleep(Duration::from_millis(1));
            }
            assert!(!guest.is_running());
            if cancel { job.cancel().unwrap() } else { job.continue_switchover().unwrap() }
        });
        let outcome = pair.run(Faults::default());
        operator.join().unwrap();
        if cancel { pair.assert_stayed(&outcome) } else { pair.assert_moved(&outcome) }
    }
}

#[test]
fn the_status_goes_through_qemus_states() {
    let pair = Pair::new(60);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    pair.job.watch(move |notice| log.lock().push(notice));
    let outcome = pair.run(Faults::default());
    pair.assert_moved(&outcome);
    let statuses: Vec<_> = seen
        .lock()
        .iter()
        .filter_map(|notice| match notice {
            Notice::Status(status) => Some(*status),
            Notice::Pass(_) => None,
        })
        .collect();
    assert_eq!(statuses, [Status::Setup, Status::Active, Status::Device, Status::Completed]);
}

/// A stream of ours is one that the decoder takes apart and the encoder puts together again.
#[test]
fn what_is_sent_follows_the_profile() {
    let mut pair = Pair::new(60);
    for (version, start) in [("7.2", false), ("11.1", true)] {
        pair.profile = Profile::new(version.parse().unwrap(), "microvm");
        pair.renew_destination();
        let outcome = pair.run(Faults::default());
        pair.assert_moved(&outcome);
        assert_eq!(pair.profile.switchover_start, start);
        pair.source.resume().unwrap();
    }
}
