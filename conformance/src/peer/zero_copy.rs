//! Pages that the kernel sends out of guest memory itself (capability `zero-copy-send`).

use super::rows::{PEERS, channels_of, plain};
use super::{Journey, Link, Stop};
use crate::scenario::Accel;

/// Each release in both directions, and reference-vmm with itself. Only TCP sends so, and within a host the kernel
/// copies all the same, which is counted.
pub(super) fn journeys() -> Vec<Journey> {
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let new = peers[2];
    let reference = Stop::Reference;
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    let journey = |stops: [Stop; 2]| Journey {
        name: format!("{}>{}/zero-copy", stops[0], stops[1]),
        stops: stops.into(),
        link: Link::Tcp,
        capabilities: vec!["return-path", "multifd", "zero-copy-send"],
        parameters: channels_of(2, "none"),
        quick: stops == [reference, new],
        ..plain()
    };
    let mut journeys: Vec<_> = ways.map(journey).collect();
    let stops = vec![peers[0], reference, peers[1], reference, reference, new, reference];
    let name = "ring/zero-copy".into();
    journeys.push(Journey { name, stops, quick: false, ..journey([reference; 2]) });
    journeys
}
