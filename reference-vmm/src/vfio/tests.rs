use super::*;
use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::sync::Arc;

const ALL: Support = Support { p2p: true, precopy: true };
const SHAPE: Shape = Shape {
    support: ALL,
    initial: 3000,
    dirty: 5000,
    rest: 7000,
    silent_drain: false,
    most: 0,
    takes_all: false,
    garbage: None,
};
const CHUNK: usize = 1 << 10;

fn device(shape: Shape) -> (Double, Migration) {
    let double = Double::new("vf0", shape);
    let migration = Migration::new("vf0", Box::new(double.clone())).unwrap();
    (double, migration)
}

/// As a source does: while the guest runs, and when it has stopped.
fn send(device: &Migration) -> Result<Vec<u8>, VfioError> {
    let mut state = Vec::new();
    let drain = |state: &mut Vec<u8>| {
        loop {
            let before = state.len();
            device.read(state, CHUNK)?;
            assert!(state.len() <= before + CHUNK && state.capacity() < 1 << 20, "it takes what it likes");
            if state.len() == before {
                return Ok(());
            }
        }
    };
    device.begin()?;
    drain(&mut state)?;
    device.exact()?;
    device.quiesce()?;
    device.stop()?;
    device.save()?;
    device.exact()?;
    drain(&mut state)?;
    Ok(state)
}

/// As a source does whose migration has failed, or whose guest went on.
fn advance(device: &Migration) -> Result<(), VfioError> {
    device.resume()?;
    device.run()?;
    device.end();
    Ok(())
}

fn take(device: &Migration, state: &[u8]) -> Result<(), VfioError> {
    device.receive()?;
    state.chunks(CHUNK).try_for_each(|piece| device.load(piece))?;
    device.loaded()
}

#[test]
fn a_state_travels_in_the_order_that_was_seen_of_qemu() {
    let way = |p2p, precopy, silent_drain, most| {
        let shape = Shape { support: Support { p2p, precopy }, silent_drain, most, ..SHAPE };
        let ((source, from), (destination, to)) = (device(shape), device(shape));
        let state = send(&from).unwrap();
        assert_eq!(state.len() as u64, if precopy { 15_000 } else { 7000 });
        from.end();
        take(&to, &state).unwrap();
        assert!(destination.has_arrived());
        to.resume().unwrap();
        to.run().unwrap();
        (source.way(), destination.way())
    };
    // (`docs/format/vfio.md`)
    let there = vec![Running, RunningP2p, Stop, Resuming, Stop, RunningP2p, Running];
    let all = vec![Running, PreCopy, PreCopyP2p, StopCopy, Stop];
    assert_eq!(way(true, true, false, 0), (all.clone(), there.clone()));
    assert_eq!(way(true, true, true, 100), (all, there.clone()));
    assert_eq!(way(true, false, false, 0), (vec![Running, RunningP2p, Stop, StopCopy, Stop], there));
    let there = vec![Running, Stop, Resuming, Stop, Running];
    assert_eq!(way(false, true, false, 7), (vec![Running, PreCopy, StopCopy, Stop], there.clone()));
    assert_eq!(way(false, false, false, 0), (vec![Running, Stop, StopCopy, Stop], there));
}

#[test]
fn what_is_left_is_counted() {
    let (double, device) = device(SHAPE);
    assert_eq!(device.estimate(), qevm_migration::Pending::default());
    device.begin().unwrap();
    let left = |precopy, stopcopy| qevm_migration::Pending { precopy, stopcopy };
    assert_eq!((device.estimate(), device.initial()), (left(8000, 0), 3000));
    assert_eq!(device.exact(), Ok(left(8000, 7000)));
    device.read(&mut Vec::new(), 1000).unwrap();
    assert_eq!(device.initial(), 2000);
    device.read(&mut Vec::new(), 2500).unwrap();
    // Initial data first; asked again, the driver says the same.
    assert_eq!(device.initial(), 0);
    assert_eq!((device.estimate(), device.initial()), (left(4500, 0), 0));
    assert_eq!(device.exact(), Ok(left(4500, 7000)));
    // They begin anew.
    double.begin_anew();
    assert_eq!((device.estimate(), device.initial()), (left(7500, 0), 7500));
    double.set_rest(100);
    device.quiesce().unwrap();
    device.stop().unwrap();
    assert_eq!(device.exact(), Ok(left(0, 7600)));
}

/// Every step of the source, with what the device has.
const SOURCE_ARCS: [(Support, DeviceState, DeviceState); 8] = [
    (ALL, Running, PreCopy),
    (ALL, PreCopy, PreCopyP2p),
    (ALL, PreCopyP2p, StopCopy),
    (Support { p2p: true, precopy: false }, Running, RunningP2p),
    (Support { p2p: true, precopy: false }, RunningP2p, Stop),
    (Support { p2p: true, precopy: false }, Stop, StopCopy),
    (Support { p2p: false, precopy: true }, PreCopy, StopCopy),
    (Support { p2p: false, precopy: false }, Running, Stop),
];

#[test]
fn a_source_whose_device_fails_on_the_way_works_on() {
    for (support, from, to) in SOURCE_ARCS {
        for into_error in [false, true] {
            let (double, device) = device(Shape { support, ..SHAPE });
            let fault = if into_error { Fault::ArcIntoError(from, to) } else { Fault::Arc(from, to) };
            double.fail(fault, Errno::BUSY, 1);
            let error = send(&device).unwrap_err();
            let text = error.to_string();
            assert!(matches!(&error.failure, Failure::Arc { errno: Errno::BUSY, .. }), "{text}");
            assert!(text.contains("'vf0'") && text.contains(&to.to_string()) && text.contains("os error 16"), "{text}");
            advance(&device).unwrap_or_else(|error| panic!("{from} → {to}: {error}"));
            assert_eq!(device.state(), Running, "{from} → {to}");
            assert_eq!(DeviceState::from_raw(double.state().unwrap()), Some(Running));
            assert_eq!(double.resets(), u64::from(into_error), "{from} → {to}");
            // Another try is as good as the first.
            assert_eq!(send(&device).unwrap().len() as u64, if support.precopy { 15_000 } else { 7000 });
        }
    }
}

#[test]
fn a_source_whose_device_does_not_go_on_resets_it_and_at_last_gives_up() {
    for (from, to) in [(StopCopy, Stop), (Stop, RunningP2p), (RunningP2p, Running)] {
        let (double, device) = device(SHAPE);
        double.fail(Fault::Arc(from, to), Errno::IO, 1);
        send(&device).unwrap();
        advance(&device).unwrap();
        assert_eq!((device.state(), double.resets()), (Running, 0), "{from} → {to}");
        // Not the second time either.
        double.fail(Fault::Arc(from, to), Errno::IO, 9);
        send(&device).unwrap();
        advance(&device).unwrap();
        assert_eq!((device.state(), double.resets()), (Running, 1), "{from} → {to}");
        let (double, device) = self::device(SHAPE);
        double.fail(Fault::ArcIntoError(from, to), Errno::IO, 1);
        double.fail(Fault::Reset, Errno::NOTTY, 9);
        send(&device).unwrap();
        let error = advance(&device).unwrap_err();
        assert!(matches!(&error.failure, Failure::Lost { errno: Errno::NOTTY, .. }), "{error}");
        assert!(error.to_string().contains("stays paused"), "{error}");
        assert_eq!(device.state(), Error);
    }
}

#[test]
fn a_device_that_is_lost_tells_what_broke_it() {
    let (double, device) = device(SHAPE);
    double.fail(Fault::ArcIntoError(PreCopyP2p, StopCopy), Errno::IO, 1);
    double.fail(Fault::Reset, Errno::NOTTY, 9);
    send(&device).unwrap_err();
    // Another try is no better, and no other reason.
    for _ in 0..2 {
        let error = advance(&device).unwrap_err();
        let Failure::Lost { cause, errno: Errno::NOTTY } = error.failure else { panic!("{error}") };
        let expected = Failure::Arc { from: PreCopyP2p, to: StopCopy, left: Error, errno: Errno::IO };
        assert_eq!(*cause, expected);
    }
}

#[test]
fn a_device_whose_guest_has_gone_does_not_work_on() {
    for (fault, resets) in [(Fault::Arc(StopCopy, Stop), 0), (Fault::ArcIntoError(StopCopy, Stop), 1)] {
        let (double, device) = device(SHAPE);
        double.fail(fault, Errno::IO, 1);
        send(&device).unwrap();
        device.end();
        assert_eq!((device.state(), double.resets()), (Stop, resets));
        assert_eq!(DeviceState::from_raw(double.state().unwrap()), Some(Stop));
    }
}

#[test]
fn a_failed_read_or_question_is_told_and_leaves_the_device_at_work() {
    let faults = [
        (Fault::Read(PreCopy), "read in PRE_COPY after 0 bytes"),
        (Fault::Read(StopCopy), "read in STOP_COPY after 8000 bytes"),
        (Fault::DataSize, "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE failed in PRE_COPY"),
        (Fault::PrecopyInfo, "VFIO_MIG_GET_PRECOPY_INFO failed in PRE_COPY"),
    ];
    for (fault, expected) in faults {
        let (double, device) = device(SHAPE);
        double.fail(fault, Errno::IO, 1);
        let text = send(&device).unwrap_err().to_string();
        assert!(text.contains("'vf0'") && text.contains(expected) && text.contains("os error 5"), "{text}");
        advance(&device).unwrap();
        assert_eq!((device.state(), double.resets()), (Running, 0));
    }
    // A driver that does not know the question has a size all the same.
    let (double, device) = device(SHAPE);
    double.fail(Fault::DataSize, Errno::NOTTY, 1);
    assert_eq!(device.exact().unwrap().total(), 100 << 30);
    // ENOMSG means nothing but in PRE_COPY.
    let (double, device) = self::device(SHAPE);
    double.fail(Fault::Read(StopCopy), Errno::NOMSG, 1);
    assert!(matches!(send(&device).unwrap_err().failure, Failure::Read { errno: Errno::NOMSG, .. }));
    double.fail(Fault::Read(StopCopy), Errno::INTR, 3);
    advance(&device).unwrap();
    assert_eq!(send(&device).unwrap().len(), 15_000);
}

#[test]
fn a_destination_whose_device_fails_has_no_guest_to_run() {
    let (_, from) = device(SHAPE);
    let state = send(&from).unwrap();
    for (begin, end) in [(Running, RunningP2p), (RunningP2p, Stop), (Stop, Resuming), (Resuming, Stop)] {
        for into_error in [false, true] {
            let (double, to) = device(SHAPE);
            let fault = if into_error { Fault::ArcIntoError(begin, end) } else { Fault::Arc(begin, end) };
            double.fail(fault, Errno::IO, 1);
            let error = take(&to, &state).unwrap_err();
            let text = error.to_string();
            let arc = if begin == Resuming { "from RESUMING to STOP" } else { "from RUNNING to RESUMING" };
            let left = format!("left it in {}", if into_error { Error } else { begin });
            assert!(text.contains("'vf0'") && text.contains(arc) && text.contains("os error 5"), "{text}");
            assert!(text.contains(&left), "{text}");
            assert!(!double.has_arrived());
            to.forget();
            // Another guest may come.
            take(&to, &state).unwrap();
            assert!(double.has_arrived());
        }
    }
    for (begin, end) in [(Stop, RunningP2p), (RunningP2p, Running)] {
        let (double, to) = device(SHAPE);
        take(&to, &state).unwrap();
        double.fail(Fault::Arc(begin, end), Errno::IO, 1);
        let error = to.resume().and_then(|()| to.run()).unwrap_err();
        assert_eq!(error.failure, Failure::Arc { from: begin, to: end, left: begin, errno: Errno::IO });
        // What has come is not thrown away: the guest is paused, and may be told to go on.
        assert_eq!((double.resets(), double.has_arrived()), (0, true));
        to.resume().and_then(|()| to.run()).unwrap();
        assert_eq!(to.state(), Running);
        // From here on it is a device as any other.
        double.fail(Fault::ArcIntoError(Running, RunningP2p), Errno::IO, 1);
        to.quiesce().unwrap_err();
        assert_eq!((to.state(), double.resets()), (Running, 1));
    }
    let (double, to) = device(SHAPE);
    take(&to, &state).unwrap();
    double.fail(Fault::ArcIntoError(Stop, RunningP2p), Errno::IO, 1);
    to.resume().unwrap_err();
    assert_eq!((to.state(), double.resets()), (Error, 0));
    assert!(matches!(to.resume().unwrap_err().failure, Failure::Arc { from: Error, .. }));
}

#[test]
fn a_state_that_is_not_the_devices_is_refused() {
    let (_, from) = device(SHAPE);
    let mut state = send(&from).unwrap();
    let (double, to) = device(SHAPE);
    let error = take(&to, &state[..14_000]).unwrap_err();
    // Seen of a kernel: the device stays in RESUMING.
    assert_eq!(error.failure, Failure::Arc { from: Resuming, to: Stop, left: Resuming, errno: Errno::INVAL });
    state[4321] ^= 1;
    let error = take(&to, &state).unwrap_err();
    assert!(matches!(error.failure, Failure::Write { errno: Errno::FAULT, .. }), "{error}");
    state[4321] ^= 1;
    double.fail(Fault::Write, Errno::INTR, 3);
    take(&to, &state).unwrap();
    double.fail(Fault::Write, Errno::NOSPC, 1);
    let error = take(&to, &state).unwrap_err();
    assert_eq!(error.failure, Failure::Write { done: 0, errno: Errno::NOSPC });
    // A device that is not told of a guest takes nothing.
    let (_, other) = device(SHAPE);
    assert!(matches!(other.load(&state).unwrap_err().failure, Failure::Misplaced { state: Running, .. }));
}

#[test]
fn what_a_driver_cannot_mean_is_an_error() {
    let cases = [
        (Garbage::EndlessSize, "MIG_DATA_SIZE says 18446744073709551615"),
        (Garbage::EndlessInitial, "PRECOPY_INFO says 18446744073709551615"),
        (Garbage::OverfullRead, "read says 1025"),
        (Garbage::NoDescriptor, "gave no descriptor"),
    ];
    for (garbage, expected) in cases {
        let (_, device) = device(Shape { garbage: Some(garbage), ..SHAPE });
        let text = send(&device).unwrap_err().to_string();
        assert!(text.contains("'vf0'") && text.contains(expected), "{text}");
        advance(&device).unwrap();
        assert_eq!(device.state(), Running);
    }
    let unknown = Double::new("vf0", Shape { garbage: Some(Garbage::UnknownState), ..SHAPE });
    let error = Migration::new("vf0", Box::new(unknown)).err().unwrap();
    assert!(error.to_string().contains("says 57005, expected a state from 0 to 7"), "{error}");
    let (_, to) = device(Shape { garbage: Some(Garbage::EmptyWrite), ..SHAPE });
    to.receive().unwrap();
    assert!(to.load(&[1; 9]).unwrap_err().to_string().contains("write says 0"));
}

#[test]
fn reads_that_never_end_take_no_more_than_was_asked_for() {
    let (_, device) = device(Shape { garbage: Some(Garbage::EndlessReads), ..SHAPE });
    device.begin().unwrap();
    for _ in 0..1000 {
        let mut piece = Vec::new();
        device.read(&mut piece, CHUNK).unwrap();
        assert_eq!(piece.len(), CHUNK);
    }
    advance(&device).unwrap();
    assert_eq!(device.state(), Running);
}

#[test]
fn a_guest_that_goes_on_while_its_devices_are_sent_ends_the_migration() {
    let (_, device) = device(SHAPE);
    device.begin().unwrap();
    device.read(&mut Vec::new(), CHUNK).unwrap();
    // An operator says stop and cont.
    device.quiesce().unwrap();
    device.stop().unwrap();
    assert_eq!(device.state(), StopCopy);
    device.resume().unwrap();
    device.run().unwrap();
    assert_eq!(device.exact().unwrap_err().failure, Failure::BrokenOff { done: CHUNK as u64 });
    device.end();
    assert_eq!(send(&device).unwrap().len(), 15_000);
}

#[test]
fn a_guest_that_is_paused_takes_its_device_with_it() {
    let (double, device) = device(SHAPE);
    device.quiesce().unwrap();
    device.stop().unwrap();
    assert_eq!(device.state(), Stop);
    assert_eq!(send(&device).unwrap().len(), 7000);
    device.end();
    // It does not begin to work.
    assert_eq!(double.way(), [Running, RunningP2p, Stop, StopCopy, Stop]);
}

#[test]
fn a_watcher_is_told_of_each_state() {
    let (double, device) = device(SHAPE);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = seen.clone();
    device.watch(Box::new(move |state| sees.lock().push(state.as_str())));
    double.fail(Fault::ArcIntoError(PreCopyP2p, StopCopy), Errno::IO, 1);
    send(&device).unwrap_err();
    advance(&device).unwrap();
    assert_eq!(*seen.lock(), ["pre-copy", "pre-copy-p2p", "error", "running"]);
    // At a destination, as seen of QEMU 11.1.
    let (_, from) = self::device(SHAPE);
    let state = send(&from).unwrap();
    seen.lock().clear();
    device.receive().unwrap();
    state.chunks(CHUNK).for_each(|piece| device.load(piece).unwrap());
    device.loaded().unwrap();
    device.resume().unwrap();
    device.run().unwrap();
    assert_eq!(*seen.lock(), ["resuming", "running-p2p", "running"]);
}
