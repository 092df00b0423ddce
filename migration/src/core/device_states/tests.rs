use super::*;

const DEVICE: usize = 0;
const SECOND: Duration = Duration::from_secs(1);

fn name() -> CountedString {
    CountedString::new("0000:00:04.0/vfio").unwrap()
}

fn states() -> DeviceStates<u32> {
    let mut states = DeviceStates::new([name()], 2);
    states.switchover();
    states
}

fn data(index: u32) -> VfioDeviceState {
    VfioDeviceState { index, config: false }
}

fn config(index: u32) -> VfioDeviceState {
    VfioDeviceState { index, config: true }
}

/// Loads what is there, and gives it.
fn load(states: &mut DeviceStates<u32>) -> Vec<u32> {
    let mut loaded = Vec::new();
    while let NextPiece::Load(piece) = states.next(DEVICE).unwrap() {
        assert_eq!(states.next(DEVICE).unwrap(), NextPiece::Wait, "one at a time");
        loaded.push(piece);
        states.loaded(DEVICE);
    }
    loaded
}

#[test]
fn pieces_that_come_in_any_order_are_loaded_in_theirs() {
    let orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1], [1, 0, 4, 2, 3]];
    for order in orders {
        let (mut states, mut loaded) = (states(), Vec::new());
        for index in order {
            let header = if index == 4 { config(index) } else { data(index) };
            assert_eq!(states.put(DEVICE, header, index, 12), Ok(None));
            loaded.extend(load(&mut states));
        }
        assert_eq!(loaded, [0, 1, 2, 3], "{order:?}");
        assert_eq!(states.next(DEVICE), Ok(NextPiece::Over));
        assert_eq!(states.main_waits(0, SECOND), Ok(None));
        assert_eq!((states.configurations(), states.waiting), (vec![(name(), 4)], 0));
    }
}

#[test]
fn what_is_not_for_a_device_or_comes_again_is_refused() {
    let mut states = states();
    assert_eq!(states.device(&name(), 0), Ok(DEVICE));
    let other = CountedString::new("0000:00:05.0/vfio").unwrap();
    for (idstr, instance_id) in [(other, 0), (name(), 1)] {
        let error = states.device(&idstr, instance_id).unwrap_err();
        assert_eq!(error, DeviceStateError::Unexpected { idstr, instance_id });
        assert_eq!(error.fault(), Fault::Mismatch);
    }
    states.put(DEVICE, data(0), 0, 12).unwrap();
    states.put(DEVICE, data(2), 2, 12).unwrap();
    let again = |index| DeviceStateError::Again { idstr: name(), index };
    assert_eq!(states.put(DEVICE, data(2), 2, 12), Err(again(2)));
    assert_eq!(load(&mut states), [0]);
    assert_eq!(states.put(DEVICE, data(0), 0, 12), Err(again(0)), "it is loaded already");
    assert_eq!(again(0).fault(), Fault::Malformed);
}

#[test]
fn the_configuration_is_the_last() {
    let mut states = states();
    states.put(DEVICE, data(3), 3, 12).unwrap();
    let after = |index, last| DeviceStateError::AfterLast { idstr: name(), index, last };
    assert_eq!(states.put(DEVICE, config(2), 2, 12), Err(after(3, 2)));
    states.put(DEVICE, config(4), 4, 12).unwrap();
    assert_eq!(states.put(DEVICE, data(2), 2, 12), Ok(None), "it was overtaken");
    assert_eq!(states.put(DEVICE, config(1), 1, 12), Err(after(4, 1)), "a second configuration");
    assert_eq!(states.put(DEVICE, config(5), 5, 12), Err(after(5, 4)), "a second configuration");
    assert_eq!(states.put(DEVICE, data(5), 5, 12), Err(after(5, 4)));
}

#[test]
fn nothing_is_loaded_before_the_main_channel_has_switched_over() {
    let mut states = DeviceStates::new([name()], 1);
    states.put(DEVICE, data(0), 0, 12).unwrap();
    assert_eq!(states.next(DEVICE), Ok(NextPiece::Wait));
    assert_eq!(states.main_waits(0, SECOND), Err(DeviceStateError::NoSwitchover { idstr: name() }));
    states.switchover();
    assert_eq!(load(&mut states), [0]);
}

#[test]
fn what_waits_is_bounded_and_the_piece_whose_turn_it_is_always_gets_in() {
    const MIB: u64 = 1 << 20;
    let mut states = states();
    let mut index = 1;
    while states.put(DEVICE, data(index), index, MIB) == Ok(None) {
        index += 1;
    }
    assert_eq!(u64::from(index), (ROOM + 2 * PIECE) / (MIB + OVERHEAD) + 1);
    assert_eq!(states.put(DEVICE, data(0), 0, MIB), Ok(None));
    assert_eq!(load(&mut states).len(), index as usize);
    assert_eq!((states.put(DEVICE, data(index), index, MIB), states.waiting), (Ok(None), MIB + OVERHEAD));
    // Empty pieces are not for free.
    let mut many = DeviceStates::new([name()], 1);
    let taken = (1..=1_000_000).take_while(|index| many.put(DEVICE, data(*index), *index, 12) == Ok(None)).count();
    assert!(taken < 300_000, "{taken}");
}

#[test]
fn a_missing_piece_is_named_when_nothing_comes_any_more() {
    let missing = |index| Err(DeviceStateError::Missing { idstr: name(), index });
    let mut states = states();
    states.put(DEVICE, config(1), 1, 12).unwrap();
    assert_eq!(states.main_waits(0, SECOND), Ok(Some(61 * SECOND)));
    assert_eq!(states.main_waits(7, 60 * SECOND), Ok(Some(120 * SECOND)), "bytes have come");
    assert_eq!(states.main_waits(7, 120 * SECOND), missing(0));
    states.channel_end();
    assert_eq!(states.main_waits(7, 100 * SECOND), Ok(Some(120 * SECOND)), "one channel is open");
    states.channel_end();
    assert_eq!(states.main_waits(7, 100 * SECOND), missing(0));
    // A device that takes its time is waited for.
    states.put(DEVICE, data(0), 0, 12).unwrap();
    assert_eq!(states.next(DEVICE), Ok(NextPiece::Load(0)));
    assert_eq!(states.main_waits(7, 1000 * SECOND), Ok(Some(1060 * SECOND)));
    states.loaded(DEVICE);
    assert_eq!(states.next(DEVICE), Ok(NextPiece::Over));
    assert_eq!(states.main_waits(7, 1000 * SECOND), Ok(None));
}

#[test]
fn no_thread_waits_for_a_reader_that_has_given_up() {
    let mut states = states();
    states.abandon("cut");
    let given_up = DeviceStateError::Abandoned { reason: "cut".into() };
    assert_eq!(states.put(DEVICE, data(0), 0, 12), Err(given_up.clone()));
    assert_eq!(states.next(DEVICE), Err(given_up.clone()));
    assert_eq!(states.main_waits(0, SECOND), Err(given_up));
}

#[test]
fn a_configuration_is_framed_as_in_its_section() {
    let framed = |front: u64, end: u64| [&front.to_be_bytes()[..], b"vmstate", &end.to_be_bytes()].concat();
    let good = framed(0xffff_ffff_ef10_0002, 0xffff_ffff_ef10_0001);
    assert_eq!(configuration(&name(), &good), Ok(&b"vmstate"[..]));
    for bad in [framed(0xffff_ffff_ef10_0004, 0xffff_ffff_ef10_0001), good[..good.len() - 1].to_vec(), Vec::new()] {
        assert!(matches!(configuration(&name(), &bad), Err(DeviceStateError::Configuration { .. })), "{bad:?}");
    }
}
