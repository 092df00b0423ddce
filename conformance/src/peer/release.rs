//! Memory that a source gives back to its host when the guest runs at the destination (capability `release-ram`).

use super::rows::{PEERS, plain};
use super::{Cut, Departure, Journey, Link, LinkCuts, Stop};
use crate::scenario::Accel;
use serde_json::Map;

/// Each release in both directions, and reference-vmm with itself.
pub(super) fn journeys() -> Vec<Journey> {
    let mut parameters = Map::new();
    parameters.insert("max-postcopy-bandwidth".into(), (32 << 20).into());
    let reference = Stop::Reference;
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let new = peers[2];
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    let mut journeys = Vec::new();
    for stops in ways {
        for (with, link) in [("release-ram", Link::Unix), ("release-ram+preempt", Link::Tcp)] {
            let mut capabilities = vec!["postcopy-ram", "release-ram"];
            if with.ends_with("preempt") {
                capabilities.push("postcopy-preempt");
            }
            journeys.push(Journey {
                name: format!("{}>{}/postcopy/{with}", stops[0], stops[1]),
                stops: stops.into(),
                link,
                capabilities,
                parameters: parameters.clone(),
                // Some of it goes before the guest, and is given back when that runs.
                postcopy: Some(Departure::AfterPass),
                load: Departure::AfterPass.load(),
                quick: stops == [reference, new] && link == Link::Tcp,
                ..plain()
            });
        }
    }
    journeys
}

/// A guest whose migration fails before it goes has all of its memory, and then goes.
pub(super) fn link_cuts() -> Vec<LinkCuts> {
    let [old, _, new] = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let reference = Stop::Reference;
    let link_cuts = |stops: [Stop; 2]| {
        let cuts = vec![
            Cut::After(40),
            Cut::After(1 << 20),
            Cut::After(17 << 20),
            Cut::Behind("timer", 30),
            Cut::Behind("globalstate", 20),
            Cut::Back(3),
        ];
        let journey = Journey {
            name: format!("{}>{}/cut/release-ram", stops[0], stops[1]),
            stops: stops.into(),
            capabilities: vec!["return-path", "postcopy-ram", "release-ram"],
            postcopy: Some(Departure::AtOnce),
            quick: stops == [reference, new],
            ..plain()
        };
        LinkCuts { journey, cuts }
    };
    [[reference, old], [reference, new], [reference; 2], [new, reference]].map(link_cuts).into()
}
