//! Devices with all that QEMU's VFIO devices do in a migration: initial data, a configuration, and state over page
//! channels.

use super::multifd::Plan;
use super::*;
use crate::LoadError;
use crate::core::DeviceStateError;
use crate::testing::{VfioDevice, VfioShape};
use qevm_multifd::Compression;
use std::sync::atomic::{AtomicU64, Ordering};

const PATHS: [&str; 2] = ["0000:00:04.0", "0000:00:05.0"];
const MIB: u64 = 1 << 20;

/// Two machines with two devices each.
fn pair(release: QemuVersion, there: VfioShape, here: VfioShape) -> Pair {
    let mut pair = Pair::new(60);
    pair.profile = Profile::new(release, "microvm");
    let devices = |shape| PATHS.map(|path| VfioDevice::new(path, shape)).into();
    Arc::get_mut(&mut pair.destination).unwrap().vfio = devices(there);
    Arc::get_mut(&mut pair.source).unwrap().vfio = devices(here);
    pair
}

fn shape(multifd_transfer: bool) -> VfioShape {
    VfioShape {
        initial: 300_000,
        dirty: 70_000,
        stopcopy: 3 * MIB + 5,
        switchover_ack: true,
        multifd_transfer,
        ..VfioShape::default()
    }
}

/// With the device's state in the way, a first migration would be waited for: its size is what it is.
fn patient(pair: Pair) -> Pair {
    let mut parameters = pair.job.parameters();
    parameters.downtime_limit_ms = 60_000;
    pair.job.set_parameters(parameters);
    pair
}

fn acks(pair: Pair) -> Pair {
    let capabilities = pair.job.capabilities().with([("switchover-ack", true)]).unwrap();
    pair.job.set_capabilities(capabilities).unwrap();
    pair
}

/// The last that the guest does at the source is to ask whether the destination had all initial data then.
fn note_initial_data(pair: &mut Pair) -> Arc<AtomicU64> {
    let missing = Arc::new(AtomicU64::new(0));
    let (count, there) = (missing.clone(), pair.destination.clone());
    Arc::get_mut(&mut pair.source).unwrap().on_pause = Some(Box::new(move || {
        let devices = there.vfio.iter().filter(|device| !device.has_initial_data());
        count.store(devices.count() as u64, Ordering::SeqCst);
    }));
    missing
}

fn assert_arrived(pair: &Pair, outcome: &Outcome) {
    pair.assert_moved(outcome);
    assert!(pair.destination.vfio.iter().all(VfioDevice::has_arrived), "{outcome:?}");
    let VfioShape { initial, dirty, stopcopy, .. } = shape(true);
    assert_eq!(outcome.statistics.device_bytes, 2 * (initial + dirty + stopcopy));
}

#[test]
fn devices_move_with_their_configuration_on_the_main_channel() {
    // Acks by the legacy flow, and counted.
    for release in [QemuVersion::new(10, 0), QemuVersion::NEWEST] {
        for transfer in [false, true] {
            let mut pair = acks(patient(pair(release, shape(transfer), shape(transfer))));
            let missing = note_initial_data(&mut pair);
            // Without page channels nothing can go over them.
            let outcome = pair.run(Faults::default());
            assert_arrived(&pair, &outcome);
            assert_eq!(missing.load(Ordering::SeqCst), 0, "stopped before the destination had agreed");
            assert!(outcome.written > 6 * MIB, "{outcome:?}");
        }
    }
}

#[test]
fn what_is_left_of_devices_goes_over_page_channels() {
    for (release, channels) in [(QemuVersion::new(10, 0), 1), (QemuVersion::NEWEST, 1), (QemuVersion::NEWEST, 4)] {
        let pair = patient(pair(release, shape(true), shape(true))).multifd(channels, Compression::None);
        let mut pair = acks(pair);
        let missing = note_initial_data(&mut pair);
        let outcome = pair.go(&Plan::default());
        assert_arrived(&pair, &outcome);
        assert_eq!(missing.load(Ordering::SeqCst), 0, "stopped before the destination had agreed");
        assert!(outcome.written < 2 * MIB, "the rest went over the main channel: {outcome:?}");
        // 1 MiB at a time.
        assert!(pair.destination.vfio.iter().all(|device| device.pieces() >= 4));
    }
}

#[test]
fn state_stays_on_the_main_channel_where_page_channels_cannot_take_it() {
    // Compressed channels have no room for it, nor has QEMU 9.2.
    for (release, method) in [(QemuVersion::NEWEST, Compression::Zstd), (QemuVersion::new(9, 2), Compression::None)] {
        let pair = acks(patient(pair(release, shape(true), shape(true))).multifd(2, method));
        let outcome = pair.go(&Plan::default());
        assert_arrived(&pair, &outcome);
        assert!(outcome.written > 6 * MIB, "{outcome:?}");
    }
}

#[test]
fn sides_that_do_not_agree_on_where_the_state_travels_are_told() {
    for here in [true, false] {
        let pair = pair(QemuVersion::NEWEST, shape(!here), shape(here));
        let pair = patient(pair).multifd(2, Compression::None);
        let outcome = pair.go(&Plan::default());
        pair.assert_stayed(&outcome);
        let Err(MigrationError::Load(error)) = &outcome.destination else { panic!("{outcome:?}") };
        let LoadError::DeviceState(kind) = &error.kind else { panic!("{error}") };
        match kind {
            // Whichever is seen first: a piece, or the section without the configuration.
            DeviceStateError::Unexpected { .. } | DeviceStateError::NotOnMain { .. } => assert!(here, "{error}"),
            DeviceStateError::OnMain { .. } => assert!(!here, "{error}"),
            other => panic!("{other}"),
        }
        assert!(error.to_string().contains("x-migration-multifd-transfer"), "{error}");
    }
}

#[test]
fn a_device_that_refuses_its_state_leaves_the_guest_at_the_source() {
    // In its initial data, and in a piece of a page channel.
    for bad in [17, 2 * MIB] {
        let there = VfioShape { bad: Some(bad), ..shape(true) };
        let pair = patient(pair(QemuVersion::NEWEST, there, shape(true))).multifd(3, Compression::None);
        let outcome = pair.go(&Plan::default());
        pair.assert_stayed(&outcome);
        let Err(MigrationError::Load(error)) = &outcome.destination else { panic!("{outcome:?}") };
        assert!(matches!(&error.kind, LoadError::Devices(_)), "{error}");
        assert!(error.to_string().contains(&format!("does not like byte {bad}")), "{error}");
    }
}

#[test]
fn a_page_channel_that_breaks_amid_the_state_of_a_device_leaves_the_guest_at_the_source() {
    for place in [MIB, 2 * MIB + 7, 4 * MIB] {
        let mut pair = patient(pair(QemuVersion::NEWEST, shape(true), shape(true))).multifd(1, Compression::None);
        let faults = Some((0, Faults { cut_at: Some(place), ..Faults::default() }));
        let outcome = pair.go(&Plan { faults, ..Plan::default() });
        pair.assert_stayed(&outcome);
        assert!(!pair.destination.vfio.iter().all(VfioDevice::has_arrived));
        // Nothing is left of the failure.
        pair.renew_destination();
        let devices = PATHS.map(|path| VfioDevice::new(path, shape(true)));
        Arc::get_mut(&mut pair.destination).unwrap().vfio = devices.into();
        Arc::get_mut(&mut pair.source).unwrap().vfio = PATHS.map(|path| VfioDevice::new(path, shape(true))).into();
        let again = pair.go(&Plan::default());
        pair.assert_moved(&again);
        assert!(pair.destination.vfio.iter().all(VfioDevice::has_arrived));
    }
}
