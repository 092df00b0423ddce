//! Guests that go before their memory.

use super::rows::{PEERS, channels_of, plain};
use super::{Departure, Journey, Link, Load, Stop};
use crate::scenario::Accel;
use serde_json::{Map, Value};

/// Hops of the ring.
const RING_HOPS: usize = 20;

/// Guests that go before their memory. In the background it comes slowly enough that they have to wait for much of it.
pub(super) fn all() -> Vec<Journey> {
    let mut parameters = Map::new();
    parameters.insert("max-postcopy-bandwidth".into(), (32 << 20).into());
    let mut journeys = Vec::new();
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let [old, middle, new] = peers;
    let reference = Stop::Reference;
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    for stops in ways {
        for (link, link_name) in [(Link::Tcp, "tcp"), (Link::Unix, "unix")] {
            for (departure, when, preempt) in [
                (Departure::AtOnce, "at-once", false),
                (Departure::AfterPass, "after-pass", false),
                (Departure::AtOnce, "preempt", true),
            ] {
                let name = format!("{}>{}/postcopy/{link_name}/{when}", stops[0], stops[1]);
                let quick = [
                    ([reference, new], Link::Tcp, "at-once"),
                    ([reference, old], Link::Unix, "after-pass"),
                    ([new, reference], Link::Unix, "at-once"),
                    ([old, reference], Link::Tcp, "at-once"),
                    ([reference; 2], Link::Tcp, "after-pass"),
                    // The connections come in another order to and from 7.2 than to and from those after it.
                    ([reference, old], Link::Tcp, "preempt"),
                    ([reference, middle], Link::Tcp, "preempt"),
                    ([old, reference], Link::Tcp, "preempt"),
                    ([new, reference], Link::Unix, "preempt"),
                ]
                .contains(&(stops, link, when));
                let capabilities =
                    if preempt { vec!["postcopy-ram", "postcopy-preempt"] } else { vec!["postcopy-ram"] };
                journeys.push(Journey {
                    name,
                    stops: stops.into(),
                    link,
                    capabilities,
                    parameters: parameters.clone(),
                    postcopy: Some(departure),
                    tls: None,
                    load: departure.load(),
                    quick,
                });
            }
        }
    }
    for stops in [[reference, new], [new, reference], [reference; 2]] {
        journeys.push(Journey {
            name: format!("{}>{}/postcopy/blocktime", stops[0], stops[1]),
            stops: stops.into(),
            link: Link::Unix,
            capabilities: vec!["postcopy-ram", "postcopy-blocktime"],
            parameters: parameters.clone(),
            postcopy: Some(Departure::AtOnce),
            load: Load { downtime_limit: 1, cpus: 2, ..Load::default() },
            quick: stops[1] == reference && stops[0] == new,
            ..plain()
        });
    }
    journeys.extend(with_page_channels(&parameters));
    // A huge page comes as a whole, over either channel.
    let ways = peers.into_iter().flat_map(|qemu| [[qemu, reference], [reference, qemu]]).chain([[reference; 2]]);
    for stops in ways {
        for preempt in [false, true] {
            let with = if preempt { "huge-pages+preempt" } else { "huge-pages" };
            let backend = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,seal=off";
            journeys.push(Journey {
                name: format!("{}>{}/postcopy/{with}", stops[0], stops[1]),
                stops: stops.into(),
                link: Link::Unix,
                capabilities: if preempt { vec!["postcopy-ram", "postcopy-preempt"] } else { vec!["postcopy-ram"] },
                parameters: parameters.clone(),
                postcopy: Some(Departure::AtOnce),
                load: Load { downtime_limit: 1, memory_backend: Some(backend), ..Load::default() },
                quick: preempt && [[new, reference], [reference, new]].contains(&stops),
                ..plain()
            });
        }
    }
    // Each way of all is taken before the memory and with it: there are seven.
    let all = [old, reference, reference, new, reference, middle, reference];
    let short = [new, reference, reference];
    for (name, stops, hops) in [(RING_HOPS.to_string(), &all[..], RING_HOPS), ("short".into(), &short, 4)] {
        journeys.push(Journey {
            name: format!("ring/postcopy/{name}"),
            stops: stops.iter().copied().cycle().take(hops + 1).collect(),
            capabilities: vec!["postcopy-ram"],
            parameters: parameters.clone(),
            postcopy: Some(Departure::InTurn),
            ..plain()
        });
    }
    journeys
}

/// Pages go over page channels until the guest goes: with 11.1 and between two reference-vmm. (10.0 refuses that, and a
/// destination of 7.2 dies of it.)
fn with_page_channels(parameters: &Map<String, Value>) -> Vec<Journey> {
    let new = Stop::Qemu(PEERS[2], Accel::Kvm);
    let reference = Stop::Reference;
    let mut journeys = Vec::new();
    for stops in [[reference, new], [new, reference], [reference; 2]] {
        for (departure, with, link, (channels, method)) in [
            (Departure::AtOnce, "multifd/at-once", Link::Tcp, (2, "none")),
            (Departure::AfterPass, "multifd/after-pass", Link::Unix, (4, "zstd")),
            (Departure::AtOnce, "multifd+preempt", Link::Unix, (2, "none")),
        ] {
            let mut capabilities = vec!["postcopy-ram", "multifd"];
            if with.ends_with("preempt") {
                capabilities.push("postcopy-preempt");
            }
            let mut parameters = parameters.clone();
            parameters.extend(channels_of(channels, method));
            journeys.push(Journey {
                name: format!("{}>{}/postcopy/{with}", stops[0], stops[1]),
                stops: stops.into(),
                link,
                capabilities,
                parameters,
                postcopy: Some(departure),
                load: departure.load(),
                quick: [[reference, new], [new, reference]].contains(&stops) && departure == Departure::AfterPass,
                ..plain()
            });
        }
    }
    journeys
}
