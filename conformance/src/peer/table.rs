//! The journeys.

use serde_json::Map;

use super::{Journey, Link, Load, Stop};
use crate::roots::Suite;
use crate::scenario::Accel;

/// The releases whose microvm can trade guests with reference-vmm.
const PEERS: [Suite; 3] = [Suite::Bookworm, Suite::Trixie, Suite::Sid];
/// Hops of the long ring.
const RING_HOPS: usize = 50;

/// Every journey.
pub fn all() -> Vec<Journey> {
    let mut journeys = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        for (link, link_name) in [(Link::Tcp, "tcp"), (Link::Unix, "unix")] {
            for capabilities in capability_sets(suite) {
                let with = if capabilities.is_empty() { "plain".into() } else { capabilities.join("+") };
                // One release for each direction is enough for the quick set.
                let out = link == Link::Tcp && suite == Suite::Sid && capabilities.contains(&"switchover-ack");
                let back = link == Link::Unix && suite == Suite::Bookworm && capabilities == ["return-path"];
                for (stops, quick) in [([qemu, Stop::Reference], out), ([Stop::Reference, qemu], back)] {
                    let name = format!("{}>{}/{link_name}/{with}", stops[0], stops[1]);
                    let capabilities = capabilities.clone();
                    journeys.push(Journey { name, stops: stops.into(), link, capabilities, quick, ..plain() });
                }
            }
        }
        let two = Load { cpus: 2, ..Load::default() };
        let name = format!("{suite_series}>ref>{suite_series}/cpus=2", suite_series = suite.series());
        journeys.push(Journey { name, stops: vec![qemu, Stop::Reference, qemu], load: two, ..plain() });
    }
    let ring = |hops: usize| -> Vec<Stop> {
        let [old, middle, new] = [Suite::Bookworm, Suite::Sid, Suite::Trixie].map(|s| Stop::Qemu(s, Accel::Kvm));
        [old, Stop::Reference, middle, Stop::Reference, new, Stop::Reference]
            .into_iter()
            .cycle()
            .take(hops + 1)
            .collect()
    };
    let capabilities = vec!["return-path"];
    let stops = ring(4);
    journeys.push(Journey { name: "ring/4".into(), stops, capabilities: capabilities.clone(), quick: true, ..plain() });
    journeys.push(Journey { name: "ring/50".into(), stops: ring(RING_HOPS), capabilities, ..plain() });
    journeys
}

/// The representative subset.
pub fn quick() -> Vec<Journey> {
    all().into_iter().filter(|journey| journey.quick).collect()
}

fn capability_sets(suite: Suite) -> Vec<Vec<&'static str>> {
    let mut sets = vec![vec![], vec!["return-path"]];
    if suite >= Suite::Trixie {
        sets.push(vec!["return-path", "switchover-ack"]);
    }
    sets
}

fn plain() -> Journey {
    Journey {
        name: String::new(),
        stops: Vec::new(),
        link: Link::Unix,
        capabilities: Vec::new(),
        parameters: Map::new(),
        load: Load::default(),
        quick: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_every_release_goes_both_ways() {
        let all = all();
        let names: BTreeSet<_> = all.iter().map(|journey| &journey.name).collect();
        assert_eq!(names.len(), all.len());
        for suite in PEERS {
            let qemu = Stop::Qemu(suite, Accel::Kvm);
            for way in [[qemu, Stop::Reference], [Stop::Reference, qemu]] {
                assert!(all.iter().any(|journey| journey.stops == way), "{way:?}");
            }
        }
        let long = all.iter().find(|journey| journey.name == "ring/50").unwrap();
        assert_eq!(long.stops.len(), RING_HOPS + 1);
        assert!(!quick().is_empty());
    }
}
