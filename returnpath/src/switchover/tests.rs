use super::*;
use SwitchoverAckFlow::{Counted, Legacy};

#[test]
fn with_the_capability_off_the_gate_is_open_and_acks_are_wrong() {
    let mut gate = SourceGate::new(None);
    gate.request("vfio").unwrap();
    assert!(gate.is_open());
    assert_eq!(gate.ack(), Err(SwitchoverError::Off));
    let mut gate = DestinationGate::new(None);
    assert_eq!(gate.return_path_opened(), Ok(Ack::Hold));
    assert_eq!(gate.agree("anything"), Ok(Ack::Hold));
}

#[test]
fn the_legacy_source_waits_for_one_ack() {
    let mut gate = SourceGate::new(Some(Legacy));
    gate.request("vfio").unwrap(); // counts nothing
    let waiting = AckWait { received: 0, expected: 1, devices: vec![] };
    assert_eq!(gate.waiting(), Some(waiting.clone()));
    assert_eq!(gate.ended(), Err(SwitchoverError::Missing { waiting: waiting.clone() }));
    assert_eq!(gate.timed_out(), Err(SwitchoverError::TimedOut { waiting }));
    gate.ack().unwrap();
    assert_eq!((gate.is_open(), gate.ended(), gate.timed_out()), (true, Ok(()), Ok(())));
    assert_eq!(gate.ack(), Err(SwitchoverError::TooMany { received: 2, expected: 1 }));
}

#[test]
fn the_counting_source_waits_for_an_ack_per_request() {
    let mut gate = SourceGate::new(Some(Counted));
    assert_eq!(gate.clone().ack(), Err(SwitchoverError::BeforeRequest));
    for device in ["b", "a", "b"] {
        gate.request(device).unwrap();
    }
    gate.ack().unwrap();
    let devices = vec!["a".into(), "b".into()];
    assert_eq!(gate.waiting(), Some(AckWait { received: 1, expected: 3, devices }));
    gate.ack().unwrap();
    gate.ack().unwrap();
    assert!(gate.is_open());
    assert_eq!(gate.clone().ack(), Err(SwitchoverError::TooMany { received: 4, expected: 3 }));
    // A device that has to start over closes the gate again.
    gate.request("a").unwrap();
    assert!(!gate.is_open());
}

#[test]
fn a_stopped_guest_is_not_held_back_and_takes_no_requests() {
    let mut gate = SourceGate::new(Some(Counted));
    gate.request("a").unwrap();
    gate.guest_stopped();
    assert!(gate.is_open());
    assert_eq!(gate.request("a"), Err(SwitchoverError::RequestAfterStop { device: "a".into() }));
    gate.guest_running();
    assert!(!gate.is_open());
}

#[test]
fn the_legacy_destination_acks_once() {
    let mut gate = DestinationGate::new(Some(Legacy));
    assert_eq!(gate.return_path_opened(), Ok(Ack::Send), "it has no devices");

    let mut gate = DestinationGate::new(Some(Legacy));
    gate.announce("a").unwrap();
    gate.announce("b").unwrap();
    assert_eq!(gate.agree("a"), Err(SwitchoverError::NoReturnPath { device: "a".into() }));
    assert_eq!(gate.return_path_opened(), Ok(Ack::Hold));
    assert_eq!(gate.return_path_opened(), Err(SwitchoverError::OpenedTwice));
    assert!(matches!(gate.announce("c"), Err(SwitchoverError::Order { .. })));
    assert_eq!(gate.agree("b"), Ok(Ack::Hold));
    assert_eq!(gate.waiting().collect::<Vec<_>>(), ["a"]);
    assert_eq!(gate.agree("b"), Err(SwitchoverError::Repeated { device: "b".into() }));
    assert_eq!(gate.agree("x"), Err(SwitchoverError::UnknownDevice { device: "x".into() }));
    assert_eq!(gate.agree("a"), Ok(Ack::Send));
}

#[test]
fn the_counting_destination_acks_each_time() {
    let mut gate = DestinationGate::new(Some(Counted));
    assert_eq!(gate.return_path_opened(), Ok(Ack::Hold), "no device, no ack");
    gate.announce("a").unwrap();
    assert_eq!((gate.agree("a"), gate.agree("a")), (Ok(Ack::Send), Ok(Ack::Send)));
    assert_eq!(gate.agree("x"), Err(SwitchoverError::UnknownDevice { device: "x".into() }));
}

/// Both sides of both flows together, with any number of devices that agree in any order.
#[test]
fn source_and_destination_of_one_flow_agree_and_of_two_do_not() {
    for (source_flow, destination_flow, devices, works) in [
        (Legacy, Legacy, 0, true),
        (Legacy, Legacy, 3, true),
        (Counted, Counted, 0, true),
        (Counted, Counted, 3, true),
        (Counted, Legacy, 0, false), // one unexpected ack
        (Legacy, Counted, 0, false), // no ack at all
        (Legacy, Counted, 2, false), // one ack too many
    ] {
        let (mut source, mut destination) =
            (SourceGate::new(Some(source_flow)), DestinationGate::new(Some(destination_flow)));
        let names: Vec<String> = (0..devices).map(|i| format!("vfio {i}")).collect();
        for name in &names {
            source.request(name).unwrap();
            destination.announce(name).unwrap();
        }
        let mut acks = vec![destination.return_path_opened().unwrap()];
        acks.extend(names.iter().rev().map(|name| destination.agree(name).unwrap()));
        let result = acks.iter().filter(|ack| **ack == Ack::Send).try_for_each(|_| source.ack());
        assert_eq!(
            result.and_then(|()| source.ended()).is_ok(),
            works,
            "{source_flow:?} {destination_flow:?} {devices}"
        );
    }
}
