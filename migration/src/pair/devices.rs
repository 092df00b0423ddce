//! Devices whose state goes in parts: it arrives, and their rest decides about the switchover.

use super::device::{Behaviour, DEVICE, FakeDevice};
use super::*;
use crate::{LoadError, Notice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn pair(behaviour: Behaviour) -> Pair {
    let device = || Some(FakeDevice::new(behaviour));
    let mut pair = Pair::new(200);
    Arc::get_mut(&mut pair.source).unwrap().device = device();
    Arc::get_mut(&mut pair.destination).unwrap().device = device();
    pair
}

fn device(guest: &FakeGuest) -> &FakeDevice {
    guest.device.as_ref().unwrap()
}

#[test]
fn the_state_of_a_device_arrives_whole_and_in_order() {
    for behaviour in [
        Behaviour { precopy: 3 << 20, stopcopy: 100_000, ..Behaviour::default() },
        Behaviour { stopcopy: (2 << 20) + 5, ..Behaviour::default() },
        Behaviour { precopy: 1, ..Behaviour::default() },
        Behaviour::default(),
    ] {
        let pair = pair(behaviour);
        let outcome = pair.run(Faults::default());
        pair.assert_moved(&outcome);
        device(&pair.source).assert_arrived(device(&pair.destination));
        assert_eq!(outcome.statistics.device_bytes, behaviour.precopy + behaviour.stopcopy);
        // Once in each round at most, of which there may be many on a busy host.
        let (asked, rounds) = (device(&pair.source).asked() as usize, outcome.statistics.rounds.len());
        assert!((1..=rounds).contains(&asked), "asked {asked} times in {rounds} rounds");
        assert_eq!(device(&pair.source).ended(), 1);
    }
}

#[test]
fn a_device_that_makes_state_as_fast_as_it_is_sent_does_not_make_a_round_endless() {
    let pair = pair(Behaviour { precopy: 1 << 20, grows: 1, stopcopy: 1000, ..Behaviour::default() });
    let outcome = pair.run(Faults::default());
    pair.assert_moved(&outcome);
    device(&pair.source).assert_arrived(device(&pair.destination));
}

/// By its estimate the device fits from the beginning; exactly it does so only half a second later.
#[test]
fn a_device_that_shrinks_late_is_waited_for_and_noticed() {
    let late = Duration::from_millis(500);
    let pair = pair(Behaviour { stopcopy: 1000, more: Some((late, 1 << 40)), ..Behaviour::default() });
    let passes = Arc::new(AtomicU64::new(0));
    let count = passes.clone();
    pair.job.watch(move |notice| {
        if let Notice::Pass(pass) = notice {
            count.store(pass, Ordering::Relaxed);
        }
    });
    let start = Instant::now();
    let outcome = pair.run(Faults::default());
    pair.assert_moved(&outcome);
    device(&pair.source).assert_arrived(device(&pair.destination));
    assert!(start.elapsed() >= late, "stopped while the device did not fit");
    let (asked, passes) = (device(&pair.source).asked(), passes.load(Ordering::Relaxed));
    assert!(asked < 12, "asked {asked} times");
    // At least 20 ms for each: it does not spin.
    assert!(u128::from(passes) <= start.elapsed().as_millis() / 20 + 10, "{passes} passes");
}

#[test]
fn a_device_that_never_shrinks_is_named_and_the_guest_goes_on() {
    let pair = pair(Behaviour { stopcopy: 1000, more: Some((Duration::MAX, 1 << 40)), ..Behaviour::default() });
    let job = pair.job.clone();
    let operator = std::thread::spawn(move || {
        let start = Instant::now();
        while job.statistics().stalled.is_none() && start.elapsed() < Duration::from_secs(300) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let (statistics, told) = (job.statistics(), job.statistics().devices_remaining);
        job.cancel().unwrap();
        (statistics.stalled, told)
    });
    let outcome = pair.run(Faults::default());
    let (stalled, told) = operator.join().unwrap();
    let stalled = stalled.expect("nothing was named");
    assert!(stalled.contains(DEVICE) && stalled.contains("when the guest has stopped"), "{stalled}");
    assert!(told > 1 << 40, "{told}");
    pair.assert_stayed(&outcome);
    assert_eq!(device(&pair.source).ended(), 1);
}

#[test]
fn a_migration_with_a_device_that_is_cut_leaves_the_guest_at_the_source() {
    let behaviour = Behaviour { precopy: 200_000, stopcopy: 50_000, ..Behaviour::default() };
    // Two pages of three are sent in full, and all of the device: no run is shorter.
    for place in [0, 30_011, 350_003, 699_001] {
        let mut pair = pair(behaviour);
        let outcome = pair.run(Faults { cut_at: Some(place), ..Faults::default() });
        pair.assert_stayed(&outcome);
        assert_eq!(device(&pair.source).ended(), 1);
        pair.renew_destination();
        Arc::get_mut(&mut pair.destination).unwrap().device = Some(FakeDevice::new(behaviour));
        let again = pair.run(Faults::default());
        pair.assert_moved(&again);
        device(&pair.source).assert_arrived(device(&pair.destination));
    }
}

#[test]
fn a_destination_without_the_device_refuses_it_by_name() {
    let mut pair = pair(Behaviour { precopy: 1000, ..Behaviour::default() });
    pair.renew_destination();
    let outcome = pair.run(Faults::default());
    pair.assert_stayed(&outcome);
    let Err(MigrationError::Load(error)) = outcome.destination else { panic!("{outcome:?}") };
    assert!(matches!(&error.kind, LoadError::UnknownSection { idstr, .. } if *idstr == *DEVICE), "{error}");
}
