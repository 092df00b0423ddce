//! Guests with VFIO devices, which are doubles: they do what the kernel's drivers do.

use crate::Test;
use crate::guest::{Console, Guest, PATIENCE};
use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use qevm_migration::{Address, Capabilities, Status};
use qevm_wire::{Profile, QemuVersion};
use reference_vmm::devices::pci::{BarKind, ConfigOnly, ConfigSpace, Function, Identity};
use reference_vmm::vfio::{
    DeviceState, Double, Fault, Garbage, MultifdTransfer, Shape, Support, VfioBacking, VfioSlot,
};
use reference_vmm::vmm::{Event, RunState, Vmm};
use rustix::io::Errno;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("vfio_devices_move_with_their_guest", move_with_their_guest),
    ("vfio_device_that_fails_on_the_way_leaves_the_guest_at_the_source", leave_the_guest_at_the_source),
    ("vfio_device_that_is_refused_leaves_the_guest_at_the_source", refused_at_the_destination),
    ("vfio_device_that_does_not_start_leaves_the_guest_paused", does_not_start),
    ("vfio_driver_that_answers_garbage_ends_the_migration_or_is_cancelled", answers_garbage),
    ("vfio_devices_that_cannot_migrate_block_it", block_migration),
    ("vfio_devices_of_a_guest_that_is_reset_are_reset", are_reset),
];

const MEMORY: u64 = 32 << 20;
const PAYLOAD: &str = "dirty=2M rate=8M hold=1M zero=1M verify=16384 report=20 pci=1";
const ALL: Support = Support { p2p: true, precopy: true };
pub(crate) const SHAPE: Shape = Shape {
    support: ALL,
    initial: 700_000,
    dirty: 1_500_000,
    rest: 300_000,
    silent_drain: false,
    most: 0,
    takes_all: false,
    garbage: None,
};

/// Linux's sample `mtty` with two ports, as its section of QEMU 11.1 shows it (savevm/tests/data/vfio).
fn mtty() -> Box<dyn Function> {
    let identity = Identity {
        vendor: 0x4348,
        device: 0x3253,
        subsystem_vendor: 0x4348,
        subsystem: 0x3253,
        class: 0x07_0002,
        revision: 0x10,
        interrupt_pin: 1,
    };
    let mut config = ConfigSpace::new(&identity, true);
    config.add_bar(0, BarKind::Io, 8).unwrap();
    config.add_bar(1, BarKind::Io, 8).unwrap();
    Box::new(ConfigOnly(config))
}

pub(crate) fn slot(id: Option<&str>, double: &Double) -> VfioSlot {
    VfioSlot {
        id: id.map(str::to_owned),
        addr: None,
        backing: VfioBacking::Model { function: mtty(), driver: Ok(Box::new(double.clone())), log: None },
        multifd_transfer: MultifdTransfer::Auto,
        events: true,
    }
}

/// One side of a migration.
struct Side {
    vmm: Arc<Vmm>,
    console: Console,
    doubles: Vec<Double>,
    events: mpsc::Receiver<Event>,
}

impl Side {
    fn new(shapes: &[Shape], incoming: bool) -> Side {
        let names = ["one", "two"];
        let doubles: Vec<_> = names.iter().zip(shapes).map(|(name, shape)| Double::new(name, *shape)).collect();
        let slots = doubles.iter().zip([Some("vf0"), None]).map(|(double, id)| slot(id, double)).collect();
        let Guest { machine, console } = Guest::configured(MEMORY, 1, PAYLOAD, |config| {
            (config.pcie, config.vfio) = (true, slots);
        });
        let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), incoming);
        let events = vmm.subscribe();
        Side { vmm, console, doubles, events }
    }

    fn pair(shapes: &[Shape]) -> (Side, Side) {
        let (from, to) = (Side::new(shapes, false), Side::new(shapes, true));
        from.vmm.cont().unwrap();
        from.goes_on();
        (from, to)
    }

    /// The guest makes a pass more.
    fn goes_on(&self) {
        let progress = |lines: &[String]| lines.iter().filter(|line| line.starts_with("qevm-payload pass=")).count();
        let before = progress(&self.console.lines());
        self.console.wait_for("progress", |lines| (progress(lines) > before).then_some(()));
        assert!(!self.console.text().contains("stale-page"), "{}", self.console.text());
    }

    fn events(&self) -> Vec<String> {
        let told = |event: Event| {
            let data = event.data.unwrap_or_default();
            match (event.name, data["device-id"].as_str(), data["device-state"].as_str()) {
                ("VFIO_MIGRATION", Some(id), Some(state)) => {
                    let path = if id.is_empty() { "-anon/device[1]".to_owned() } else { format!("/{id}") };
                    assert_eq!(data["qom-path"].as_str(), Some(&*format!("/machine/peripheral{path}")));
                    format!("{id}:{state}")
                }
                (name, ..) => name.to_owned(),
            }
        };
        self.events.try_iter().map(told).collect()
    }
}

/// Capabilities that are switched on or off.
pub(crate) type Switches<'a> = &'a [(&'a str, bool)];

pub(crate) fn capabilities(more: Switches<'_>) -> Capabilities {
    let all = [("return-path", true)].into_iter().chain(more.iter().copied());
    Capabilities::default().with(all).unwrap()
}

/// Migrates, and gives the source's error and the destination's.
fn migrate(from: &Side, to: &Side, more: Switches<'_>) -> (Option<String>, Option<String>) {
    migrate_between(&from.vmm, &to.vmm, more)
}

pub(crate) fn migrate_between(from: &Arc<Vmm>, to: &Arc<Vmm>, more: Switches<'_>) -> (Option<String>, Option<String>) {
    let directory = tempfile::tempdir().unwrap();
    let address = Address::Unix(directory.path().join("migration"));
    for vmm in [from, to] {
        vmm.outgoing().set_capabilities(capabilities(more)).unwrap();
    }
    to.listen(&address, false).unwrap();
    from.migrate(address).unwrap();
    from.outgoing().wait();
    wait("the destination does not end", || !to.incoming().status().is_running());
    (from.outgoing().statistics().error, to.incoming().statistics().error)
}

pub(crate) fn wait(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn move_with_their_guest() {
    let stop_copy = Shape { support: Support { precopy: false, ..ALL }, ..SHAPE };
    let slow = Shape { most: 4096, silent_drain: true, ..SHAPE };
    let cases: [(&[Shape], Switches<'_>); 4] = [
        (&[SHAPE], &[("switchover-ack", true)]),
        (&[slow, stop_copy], &[]),
        (&[SHAPE, SHAPE], &[("multifd", true), ("switchover-ack", true)]),
        (&[stop_copy], &[("multifd", true)]),
    ];
    for (shapes, more) in cases {
        let (from, to) = Side::pair(shapes);
        assert_eq!(migrate(&from, &to, more), (None, None));
        wait("the guest is not started", || to.vmm.run_state() == RunState::Running);
        to.goes_on();
        assert_eq!(from.vmm.run_state(), RunState::Postmigrate);
        assert!(to.doubles.iter().all(Double::has_arrived));
        let size = |shape: &Shape| shape.rest + if shape.support.precopy { shape.initial + shape.dirty } else { 0 };
        let sent = from.vmm.outgoing().statistics().device_bytes;
        // Over page channels, the configuration counts as well.
        let all = shapes.iter().map(size).sum::<u64>();
        assert!((all..all + 2 * 5000).contains(&sent), "{sent} of {all}");
        for (double, shape) in from.doubles.iter().zip(shapes) {
            let way: &[_] = match shape.support.precopy {
                true => &[Running, Stop, RunningP2p, Running, PreCopy, PreCopyP2p, StopCopy, Stop],
                false => &[Running, Stop, RunningP2p, Running, RunningP2p, Stop, StopCopy, Stop],
            };
            // Before it was started it may have been stopped.
            assert!(way.ends_with(&double.way()[double.way().len().saturating_sub(4)..]), "{:?}", double.way());
        }
        for double in &to.doubles {
            assert!(double.way().ends_with(&[Resuming, Stop, RunningP2p, Running]), "{:?}", double.way());
        }
        if shapes[0].support.precopy {
            let events = from.events();
            let place =
                |event: &str| events.iter().rposition(|told| told == event).unwrap_or_else(|| panic!("{events:?}"));
            // STOP_COPY comes before the event STOP (`docs/format/vfio.md`).
            assert!(place("vf0:pre-copy-p2p") < place("vf0:stop-copy") && place("vf0:stop-copy") < place("STOP"));
            let events = to.events();
            let place =
                |event: &str| events.iter().position(|told| told == event).unwrap_or_else(|| panic!("{events:?}"));
            // The same: RUNNING_P2P and RUNNING after the event RESUME.
            let order = ["vf0:resuming", "RESUME", "vf0:running-p2p", "vf0:running"];
            assert!(order.windows(2).all(|pair| place(pair[0]) < place(pair[1])), "{events:?}");
        }
    }
}

fn leave_the_guest_at_the_source() {
    let arcs = [(Running, PreCopy), (PreCopy, PreCopyP2p), (PreCopyP2p, StopCopy)];
    let faults = arcs.into_iter().flat_map(|(from, to)| [Fault::Arc(from, to), Fault::ArcIntoError(from, to)]).chain([
        Fault::Read(PreCopy),
        Fault::Read(StopCopy),
        Fault::DataSize,
        Fault::PrecopyInfo,
    ]);
    let (from, to) = Side::pair(&[SHAPE, SHAPE]);
    for fault in faults {
        from.doubles[0].fail(fault, Errno::IO, 1);
        let (sent, arrived) = migrate(&from, &to, &[]);
        let (sent, _) = (sent.unwrap_or_else(|| panic!("{fault:?}")), arrived.unwrap_or_else(|| panic!("{fault:?}")));
        assert!(sent.contains("'vf0'") && sent.contains("os error 5"), "{fault:?}: {sent}");
        assert_eq!((from.vmm.outgoing().status(), from.vmm.run_state()), (Status::Failed, RunState::Running));
        from.goes_on();
        assert!(from.doubles.iter().all(|double| *double.way().last().unwrap() == Running), "{fault:?}");
        assert!(!to.doubles.iter().any(Double::has_arrived));
        assert_eq!(to.vmm.run_state(), RunState::Inmigrate);
    }
    // The same guest moves when nothing fails; the destination takes it although it was tried before.
    assert_eq!(migrate(&from, &to, &[("switchover-ack", true)]), (None, None));
    to.goes_on();
    // Away again, from where it is now, to one that has not been tried.
    let away = Side::new(&[SHAPE, SHAPE], true);
    assert_eq!(migrate(&to, &away, &[]), (None, None));
    away.goes_on();
}

fn refused_at_the_destination() {
    let (from, to) = Side::pair(&[SHAPE, SHAPE]);
    let faults = [
        (Fault::Write, "'two' refused its state", "os error 5"),
        (Fault::Arc(Resuming, Stop), "from RESUMING to STOP", "left it in RESUMING"),
        (Fault::ArcIntoError(Resuming, Stop), "from RESUMING to STOP", "left it in ERROR"),
    ];
    for (fault, what, left) in faults {
        to.doubles[1].fail(fault, Errno::IO, 1);
        let (sent, arrived) = migrate(&from, &to, &[]);
        let arrived = arrived.unwrap_or_else(|| panic!("{fault:?}"));
        let what = what.replace("'two'", "'0000:00:02.0/vfio'");
        assert!(sent.is_some() && arrived.contains("0000:00:02.0/vfio"), "{arrived}");
        assert!((arrived.contains(&what) || what.contains("refused")) && arrived.contains(left), "{arrived}");
        assert_eq!((from.vmm.run_state(), to.vmm.run_state()), (RunState::Running, RunState::Inmigrate));
        from.goes_on();
    }
    assert_eq!(migrate(&from, &to, &[]), (None, None));
    to.goes_on();
}

fn does_not_start() {
    for fault in [Fault::Arc(Stop, RunningP2p), Fault::Arc(RunningP2p, Running)] {
        let (from, to) = Side::pair(&[SHAPE, SHAPE]);
        to.doubles[0].fail(fault, Errno::IO, 1);
        assert_eq!(migrate(&from, &to, &[]), (None, None));
        // It has left the source; here it is paused, with all of its state, until an operator says `cont`.
        wait("it is not paused", || to.vmm.run_state() == RunState::Paused);
        assert_eq!(from.vmm.run_state(), RunState::Postmigrate);
        assert!(to.doubles.iter().all(|double| double.has_arrived() && double.resets() == 0));
        assert!(to.doubles.iter().all(|double| *double.way().last().unwrap() == Stop), "one works without the other");
        to.vmm.cont().unwrap();
        to.goes_on();
    }
}

fn answers_garbage() {
    for (garbage, what) in [
        (Garbage::EndlessSize, "MIG_DATA_SIZE says 18446744073709551615"),
        (Garbage::EndlessInitial, "PRECOPY_INFO says 18446744073709551615"),
        (Garbage::OverfullRead, "read says"),
        (Garbage::NoDescriptor, "no descriptor"),
    ] {
        let (from, to) = Side::pair(&[Shape { garbage: Some(garbage), ..SHAPE }]);
        let (sent, _) = migrate(&from, &to, &[]);
        let sent = sent.unwrap_or_else(|| panic!("{garbage:?}"));
        assert!(sent.contains("'vf0'") && sent.contains(what), "{sent}");
        assert_eq!(from.vmm.run_state(), RunState::Running);
        from.goes_on();
    }
    // These never end by themselves: reads after the guest has stopped, and initial data that the destination is to
    // agree to.
    for (garbage, acks, much) in [(Garbage::EndlessReads, false, 32 << 20), (Garbage::GrowingInitial, true, 1 << 20)] {
        let (from, to) = Side::pair(&[Shape { garbage: Some(garbage), takes_all: true, ..SHAPE }]);
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("migration"));
        for side in [&from, &to] {
            side.vmm.outgoing().set_capabilities(capabilities(&[("switchover-ack", acks)])).unwrap();
        }
        to.vmm.listen(&address, false).unwrap();
        from.vmm.migrate(address).unwrap();
        let moved = || from.vmm.outgoing().statistics().device_bytes > much;
        wait("nothing moves", moved);
        assert!(from.vmm.outgoing().status().is_running());
        assert!(from.vmm.outgoing().cancel().is_ok());
        from.vmm.outgoing().wait();
        assert_eq!((from.vmm.outgoing().status(), from.vmm.run_state()), (Status::Cancelled, RunState::Running));
        from.goes_on();
        assert_eq!(*from.doubles[0].way().last().unwrap(), Running);
    }
}

fn block_migration() {
    let backing = VfioBacking::Model { function: mtty(), driver: Err("enable-migration=off".into()), log: None };
    let unable = VfioSlot { backing, ..slot(Some("vf0"), &Double::new("one", SHAPE)) };
    let lone = Double::new("two", Shape { support: Support { p2p: false, ..ALL }, ..SHAPE });
    let Guest { machine, .. } = Guest::configured(MEMORY, 1, PAYLOAD, |config| {
        (config.pcie, config.vfio) = (true, vec![unable, slot(None, &lone)]);
    });
    let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), false);
    let blockers = vmm.blockers();
    assert_eq!(blockers.len(), 2, "{blockers:?}");
    assert!(blockers[0].contains("'vf0'") && blockers[0].contains("enable-migration=off"), "{blockers:?}");
    assert!(blockers[1].contains("0000:00:02.0/vfio") && blockers[1].contains("P2P"), "{blockers:?}");
    let error = vmm.migrate("unix:/nowhere".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("'vf0'"), "{error}");
    let double = Double::new("one", SHAPE);
    let Guest { machine, .. } = Guest::configured(MEMORY, 1, PAYLOAD, |config| {
        let slot = VfioSlot { multifd_transfer: MultifdTransfer::On, ..slot(Some("vf0"), &double) };
        (config.pcie, config.vfio) = (true, vec![slot]);
    });
    let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), false);
    let error = vmm.migrate("unix:/nowhere".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("vf0: x-migration") && error.contains("needs capability multifd"), "{error}");
    for (capability, what) in [("postcopy-ram", "postcopy migration"), ("background-snapshot", "background snapshot")] {
        vmm.set_capabilities([(capability, true)]).unwrap();
        for error in [
            vmm.migrate("unix:/nowhere".parse().unwrap()).unwrap_err().to_string(),
            vmm.listen(&"unix:/nowhere".parse().unwrap(), false).unwrap_err().to_string(),
        ] {
            assert!(error.contains(&format!("vf0: VFIO migration is not supported with {what}")), "{error}");
        }
        vmm.set_capabilities([(capability, false)]).unwrap();
    }
    // One without P2P moves alone.
    let (from, to) = Side::pair(&[Shape { support: Support { p2p: false, ..ALL }, ..SHAPE }]);
    assert!(from.vmm.blockers().is_empty());
    assert_eq!(migrate(&from, &to, &[]), (None, None));
    to.goes_on();
    assert!(to.doubles[0].way().ends_with(&[Resuming, Stop, Running]));
}

fn are_reset() {
    let side = Side::new(&[SHAPE], false);
    side.vmm.cont().unwrap();
    side.goes_on();
    side.vmm.system_reset();
    wait("it is not reset", || side.doubles[0].resets() > 0);
    side.goes_on();
    assert_eq!(*side.doubles[0].way().last().unwrap(), Running);
    assert!(!side.doubles[0].way().contains(&Error));
}
