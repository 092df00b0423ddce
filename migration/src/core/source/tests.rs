//! Whole migrations in one thread under virtual time, with a failure or an operator's word at every step.

use super::*;
use crate::core::DeviceOptions;
use crate::{Capabilities, Refused, SavedDevices, Status, handover};
use qevm_returnpath::Message;
use qevm_wire::{Profile, QemuVersion};
use std::collections::BTreeMap;
use std::io;

const BLOCKS: [u64; 2] = [3000, 70];
const BYTES_PER_MS: u64 = 400_000;
/// Longest migration, in virtual time.
const BOUND: Duration = Duration::from_secs(600);

/// What the destination does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// There is no return path.
    None,
    /// It answers as this engine's.
    Agrees,
    /// It answers as QEMU's.
    Answers,
    /// It answers as QEMU's, but not the last PING.
    DiesBeforeTheEnd,
    /// It answers as QEMU's, but gives no verdict.
    DiesAfterTheEnd,
    /// It waits for a confirmation, but gives no verdict.
    AgreesAndDies,
    /// It waits for a confirmation, which comes late because the source was held up…
    AgreesLate,
    /// …and has given up by then, which is heard after its verdict.
    AgreesAndGivesUp,
}

mod downtime;
mod patience;
mod urgent;

/// What goes wrong, at which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    Fails(usize),
    Cancelled(usize),
}

/// A guest and a channel in virtual time.
struct Simulation {
    core: SourceCore,
    answers: Option<Answers>,
    peer: Peer,
    now: Duration,
    random: u64,
    /// Version of every page, here and there.
    here: Vec<Vec<u64>>,
    there: Vec<Vec<u64>>,
    /// The dirty log as KVM keeps it: written, and reported by the last reading.
    written: BTreeMap<(usize, u64), u64>,
    reported: BTreeMap<(usize, u64), u64>,
    running: bool,
    pages_before_reset: bool,
    /// Some of the end of the stream was sent, and all of it.
    end: (bool, bool),
    confirmed: bool,
    statuses: Vec<Status>,
}

impl Simulation {
    fn new(peer: Peer, seed: u64) -> Self {
        let options = SourceOptions {
            profile: Profile::new(QemuVersion::NEWEST, "microvm"),
            capabilities: Capabilities::default(),
            machine_type: "microvm".into(),
            uuid: None,
            blocks: BLOCKS.iter().zip(["microvm.ram", "pc.bios"]).map(|(n, name)| (name.into(), n * 4096)).collect(),
            host_page_sizes: Vec::new(),
            shared: Vec::new(),
            devices: Vec::new(),
            route: PageRoute::Main,
            reader: Reader::Silent,
            patience: Some(Duration::from_secs(30)),
        };
        let pages = |value| BLOCKS.map(|pages| vec![value; pages as usize]).to_vec();
        let all = BLOCKS.iter().enumerate().flat_map(|(block, n)| (0..n.div_ceil(64)).map(move |word| (block, word)));
        Simulation {
            core: SourceCore::new(options, Parameters { max_bandwidth: 0, ..Parameters::default() }),
            answers: (peer != Peer::None).then(|| Answers::new(None, true)),
            peer,
            now: Duration::ZERO,
            random: seed,
            here: pages(1),
            there: pages(0),
            written: all.map(|word| (word, u64::MAX)).collect(),
            reported: BTreeMap::new(),
            running: true,
            pages_before_reset: false,
            end: (false, false),
            confirmed: false,
            statuses: Vec::new(),
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    /// Time goes by, and a running guest writes to some of its first pages.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        let writes = if self.running { (time.as_micros() as u64 / 20).min(200) } else { 0 };
        for _ in 0..writes {
            let page = self.random(300);
            self.here[0][page as usize] += 1;
            *self.written.entry((0, page / 64)).or_default() |= 1 << (page % 64);
        }
    }

    /// Runs to the end.
    fn run(&mut self, trouble: Trouble) -> Result<(), MigrationError> {
        for step in 0.. {
            assert!(self.now < BOUND, "{:?}", self.core.phase());
            if trouble == Trouble::Cancelled(step) {
                self.core.cancel();
            }
            let action = self.core.poll(self.now, self.answers.as_mut());
            if let Action::End(result) = action {
                return result;
            }
            // The way back has no errors of its own here.
            let returning = matches!(
                action,
                Action::Close
                    | Action::Resume
                    | Action::StopLog
                    | Action::LeaveGuest
                    | Action::StayStopped
                    | Action::Activate
            );
            if trouble == Trouble::Fails(step) && !returning {
                if let Action::Confirm(_) = action {
                    self.core.confirmed(Err(io::ErrorKind::BrokenPipe.into()));
                    continue;
                }
                let error = MigrationError::Send { doing: "anything", source: io::ErrorKind::BrokenPipe.into() };
                self.core.failed(error, self.now, self.answers.is_some());
                continue;
            }
            self.perform(action);
        }
        unreachable!()
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::ReadLog => {
                self.reported = self.written.clone();
                for ((block, word), bits) in self.reported.clone() {
                    let pages = BLOCKS[block] - word * 64;
                    let bits = if pages < 64 { bits & ((1 << pages) - 1) } else { bits };
                    self.core.found(block, word as usize, bits);
                }
                self.pass(Duration::from_micros(50));
            }
            Action::Reset(ranges) => self.reset(&ranges),
            Action::Pages(batch) => self.pages(&batch),
            Action::Send { .. } => self.send(),
            Action::MeasureBacklog { .. } => self.core.backlog(0),
            Action::Pause => {
                self.core.paused(self.running);
                self.running = false;
            }
            Action::Status(status) => self.statuses.push(status),
            Action::SaveDevices { running } => {
                assert!(running && !self.running);
                self.core.devices_saved(SavedDevices::opaque(Vec::new()));
            }
            Action::SendEnd => {
                self.end = (true, true);
                self.send();
                self.core.end_sent(Ok(()), self.now);
                if matches!(self.peer, Peer::AgreesLate | Peer::AgreesAndGivesUp) {
                    self.pass(Duration::from_secs(5));
                }
                if matches!(self.peer, Peer::Agrees | Peer::Answers | Peer::AgreesLate | Peer::AgreesAndGivesUp) {
                    self.hear(Message::Shut { status: 0 });
                }
            }
            Action::Settle => self.core.settled(Ok(())),
            Action::Commit => {
                self.core.committed(if self.core.cancelled { Err(MigrationError::Cancelled) } else { Ok(()) })
            }
            Action::Confirm(_) => {
                self.confirmed = true;
                self.core.confirmed(Ok(()));
            }
            Action::Wait { until, .. } => {
                let until = until.expect("every wait has a deadline");
                assert!(until > self.now, "a wait that is over");
                if self.peer == Peer::AgreesAndGivesUp && self.end.1 {
                    self.answers.iter_mut().for_each(|answers| answers.end(Ok(())));
                }
                self.pass(until - self.now);
            }
            Action::Resume => {
                self.running = true;
                self.core.resumed(Ok(()));
            }
            Action::Activate => self.core.resumed(Ok(())),
            _ => {}
        }
    }

    fn reset(&mut self, ranges: &[BlockRange]) {
        for BlockRange { block, pages } in ranges {
            for word in pages.start / 64..pages.end.div_ceil(64) {
                let reported = self.reported.get(&(*block, word)).copied().unwrap_or(0);
                *self.written.entry((*block, word)).or_default() &= !reported;
            }
        }
    }

    fn pages(&mut self, batch: &Batch) {
        if !self.pages_before_reset {
            self.reset(&batch.resets);
        }
        self.pass(Duration::from_micros(30));
        let mut normal = 0;
        for BlockRange { block, pages } in &batch.runs {
            let pages = pages.start as usize..pages.end as usize;
            self.there[*block][pages.clone()].copy_from_slice(&self.here[*block][pages.clone()]);
            normal += pages.len() as u64;
        }
        if self.pages_before_reset {
            self.pass(Duration::from_micros(30));
            self.reset(&batch.resets);
        }
        self.core.stream().clear();
        let bytes = normal * 4104;
        self.core.sent(Sent { bytes, normal, zero: 0, ..Sent::default() });
        self.pass(Duration::from_nanos(bytes * 1_000_000 / BYTES_PER_MS));
    }

    /// Sends what the stream holds, to a destination that answers at once.
    fn send(&mut self) {
        let bytes = self.core.stream().take();
        self.core.sent(Sent { bytes: bytes.len() as u64, ..Sent::default() });
        self.pass(Duration::from_micros(20));
        // MIG_CMD_PING: type 8, command 2, length 4, value.
        let ping = |value: u32| [&[8, 0, 2, 0, 4], &value.to_be_bytes()[..]].concat();
        let agrees = !matches!(self.peer, Peer::None | Peer::Answers | Peer::DiesBeforeTheEnd | Peer::DiesAfterTheEnd);
        let agreed = if agrees { handover::AGREED } else { handover::ANNOUNCE };
        for (asked, value) in [(1, 1), (handover::ANNOUNCE, agreed), (handover::LOADED, handover::LOADED)] {
            let dead = self.peer == Peer::DiesBeforeTheEnd && asked == handover::LOADED;
            if !dead && bytes.windows(9).any(|window| window == ping(asked)) {
                self.hear(Message::Pong { value });
            }
        }
    }

    fn hear(&mut self, message: Message) {
        if let Some(answers) = &mut self.answers {
            answers.message(message, 0);
        }
    }

    fn assert_consistent(&self, result: &Result<(), MigrationError>) {
        let context = format!("{:?} {result:?}", self.peer);
        match result {
            Ok(()) => {
                assert!(!self.running && self.here == self.there, "{context}");
                assert_eq!(self.confirmed, matches!(self.peer, Peer::Agrees | Peer::AgreesLate), "{context}");
            }
            // It may run there: it has everything.
            Err(MigrationError::Unsettled { .. }) => {
                assert!(!self.running && self.end.0 && self.here == self.there, "{context}");
            }
            Err(_) => assert!(self.running && !self.confirmed, "{context}"),
        }
    }
}

/// The steps of a migration without trouble.
fn steps(peer: Peer) -> usize {
    let mut simulation = Simulation::new(peer, 1);
    for step in 0.. {
        match simulation.core.poll(simulation.now, simulation.answers.as_mut()) {
            Action::End(result) => {
                result.unwrap();
                return step;
            }
            action => simulation.perform(action),
        }
    }
    unreachable!()
}

#[test]
fn every_page_arrives_in_its_newest_version_and_the_guest_is_paused_once() {
    for (seed, peer) in (0..60).flat_map(|seed| [Peer::None, Peer::Agrees, Peer::Answers].map(|peer| (seed, peer))) {
        let mut simulation = Simulation::new(peer, seed);
        let result = simulation.run(Trouble::None);
        result.as_ref().unwrap();
        simulation.assert_consistent(&result);
        assert_eq!(simulation.statuses, [Status::Active, Status::Device]);
        let mut statistics = Statistics::default();
        simulation.core.report(&mut statistics);
        assert!(statistics.ram.dirty_sync_count >= 2 && statistics.ram.remaining == 0, "{statistics:?}");
    }
}

/// The test above can fail.
#[test]
fn a_page_that_is_read_before_its_log_is_reset_is_found() {
    let stale = (0..60).any(|seed| {
        let mut simulation = Simulation::new(Peer::Answers, seed);
        simulation.pages_before_reset = true;
        simulation.run(Trouble::None).unwrap();
        simulation.here != simulation.there
    });
    assert!(stale);
}

#[test]
fn a_failure_at_any_step_leaves_the_guest_running_unless_it_may_run_there() {
    let mut unsettled = 0;
    for peer in [Peer::None, Peer::Agrees, Peer::Answers] {
        for step in 0..steps(peer) {
            let mut simulation = Simulation::new(peer, 1);
            let result = simulation.run(Trouble::Fails(step));
            simulation.assert_consistent(&result);
            unsettled += usize::from(matches!(result, Err(MigrationError::Unsettled { .. })));
        }
    }
    assert!(unsettled > 0, "the confirmation was never lost");
}

#[test]
fn cancelling_at_any_step_leaves_the_guest_running_or_is_too_late() {
    for peer in [Peer::None, Peer::Agrees, Peer::Answers] {
        let mut late = 0;
        for step in 0..steps(peer) {
            let mut simulation = Simulation::new(peer, 1);
            let result = simulation.run(Trouble::Cancelled(step));
            simulation.assert_consistent(&result);
            match result {
                Ok(()) | Err(MigrationError::Unsettled { .. }) => late += 1,
                Err(error) => assert!(matches!(error, MigrationError::Cancelled), "{error:?}"),
            }
        }
        assert!((1..20).contains(&late), "{peer:?}: {late} steps were too late");
    }
}

#[test]
fn the_rate_limit_holds_in_virtual_time() {
    let mut simulation = Simulation::new(Peer::Answers, 3);
    simulation.core.set_parameters(Parameters { max_bandwidth: 8_000_000, ..Parameters::default() });
    simulation.run(Trouble::None).unwrap();
    let mut statistics = Statistics::default();
    simulation.core.report(&mut statistics);
    let least = Duration::from_secs_f64(statistics.ram.precopy_bytes as f64 / 8e6);
    assert!(simulation.now >= least.saturating_sub(Duration::from_millis(250)), "{:?} {least:?}", simulation.now);
}

#[test]
fn the_dirty_limit_is_that_of_the_parameters_and_so_is_its_period() {
    let mut simulation = Simulation::new(Peer::Answers, 5);
    simulation.core.options.capabilities.dirty_limit = true;
    // The guest never comes to an end over such a link.
    simulation.core.set_parameters(Parameters {
        max_bandwidth: 400_000,
        downtime_limit_ms: 1,
        throttle_trigger_threshold: 1,
        vcpu_dirty_limit: 7,
        vcpu_dirty_limit_period_ms: 345,
        ..Parameters::default()
    });
    loop {
        assert!(simulation.now < BOUND, "the guest is not slowed down");
        match simulation.core.poll(simulation.now, simulation.answers.as_mut()) {
            Action::LimitDirtyRate { mib_per_second, period } => {
                assert_eq!((mib_per_second, period), (7, Duration::from_millis(345)));
                return;
            }
            Action::End(result) => panic!("{result:?}"),
            action => simulation.perform(action),
        }
    }
}

#[test]
fn postcopy_is_refused_where_it_cannot_be() {
    let options = |change: fn(&mut SourceOptions)| {
        let profile = Profile::new(QemuVersion::NEWEST, "microvm");
        let mut options = SourceOptions::new(profile, "microvm", vec![("microvm.ram".into(), 4096)]);
        options.capabilities.postcopy_ram = true;
        change(&mut options);
        SourceCore::new(options, Parameters::default()).start_postcopy()
    };
    assert_eq!(options(|_| ()), Ok(()));
    assert_eq!(options(|options| options.route = PageRoute::Channels), Ok(()));
    assert_eq!(options(|options| options.capabilities.postcopy_ram = false), Err(Refused::PostcopyOff));
    for change in [
        (|options| options.route = PageRoute::File) as fn(&mut SourceOptions),
        |options| options.route = PageRoute::FileByThreads,
        |options| {
            let idstr = idstr("0000:00:01.0/vfio").unwrap();
            options.devices = vec![DeviceOptions::new(idstr)];
        },
    ] {
        assert!(matches!(options(change), Err(Refused::Blocked(_))));
    }
}

/// What a driver tells without having been asked changes nothing, however absurd it is. The destination fails between
/// the package and the PING after it: a source that has not looked in between gets all of it at once.
#[test]
fn a_destination_that_may_run_the_guest_keeps_it_whenever_it_fails() {
    for (release, loaded, goes_on) in [
        (QemuVersion::NEWEST, false, true),
        (QemuVersion::NEWEST, true, false),
        (QemuVersion::new(10, 0), false, false),
    ] {
        let mut simulation = Simulation::new(Peer::Answers, 11);
        simulation.core.options.capabilities.postcopy_ram = true;
        simulation.core.options.profile = Profile::new(release, "microvm");
        simulation.core.start_postcopy().unwrap();
        let mut result = None;
        while result.is_none() {
            let action = simulation.core.poll(simulation.now, simulation.answers.as_mut());
            let package = matches!(action, Action::Send { doing: "the package of the devices" });
            match action {
                Action::End(end) => result = Some(end),
                // It is not given up, and no other connection comes.
                Action::AwaitConnection { .. } => break,
                action => simulation.perform(action),
            }
            if package {
                for value in if loaded { &[2, 3, 0x42][..] } else { &[2] } {
                    simulation.hear(Message::Pong { value: *value });
                }
                simulation.hear(Message::Shut { status: 1 });
            }
        }
        let failed = matches!(result, Some(Err(MigrationError::PeerFailed { status: 1 })));
        assert_eq!((failed, simulation.running), (goes_on, goes_on), "{release}, loaded {loaded}: {result:?}");
    }
}

#[test]
fn answers_that_were_not_asked_for_are_harmless() {
    for step in 0..steps(Peer::Agrees) {
        let mut simulation = Simulation::new(Peer::Agrees, 1);
        let mut result = None;
        for number in 0.. {
            assert!(simulation.now < BOUND, "{:?}", simulation.core.phase());
            match simulation.core.poll(simulation.now, simulation.answers.as_mut()) {
                Action::End(ended) => {
                    result = Some(ended);
                    break;
                }
                action => simulation.perform(action),
            }
            if number == step {
                let (core, now) = (&mut simulation.core, simulation.now);
                core.found(0, usize::MAX, u64::MAX);
                core.found(7, 0, 1);
                core.device_sizes(vec![DeviceSize::default(); 3]);
                core.device_state(b"nobody's").unwrap();
                core.backlog(0);
                core.resumed(Ok(()));
                if !matches!(core.phase(), Phase::Stopped(_)) {
                    core.devices_saved(SavedDevices::opaque(Vec::new()));
                }
                if !matches!(core.phase(), Phase::Committing { .. }) {
                    core.committed(Err(MigrationError::Cancelled));
                }
                if !matches!(core.phase(), Phase::Confirming { .. }) {
                    core.confirmed(Err(io::ErrorKind::BrokenPipe.into()));
                }
                if !matches!(core.phase(), Phase::Ending) {
                    core.end_sent(Err(MigrationError::NoVerdict), now);
                }
                core.settled(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        simulation.assert_consistent(&result.unwrap());
    }
    let mut simulation = Simulation::new(Peer::Agrees, 1);
    simulation.core.sent(Sent { bytes: u64::MAX, normal: u64::MAX, zero: u64::MAX, ..Sent::default() });
    simulation.core.sent(Sent { bytes: u64::MAX, normal: u64::MAX, zero: u64::MAX, ..Sent::default() });
}
