//! Pages that a source sends as differences to what it has sent of them before (capability `xbzrle`).

use super::rows::{PEERS, plain};
use super::{Departure, Journey, Link, Load, Stop};
use crate::scenario::Accel;
use serde_json::Map;

/// Each release in both directions, reference-vmm with itself, and every pair of kinds of source and destination one
/// after the other, so that what each sends can be compared: the guest does the same on every hop.
pub(super) fn journeys() -> Vec<Journey> {
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let [old, _, new] = peers;
    let reference = Stop::Reference;
    // It rewrites a few bytes of each page of 4 MiB, six times a second, which takes longer than that to send in full.
    // A round is long enough for a guest on a busy host to write in it.
    let payload = "dirty=4M rate=24M hold=4M zero=2M verify=16384 report=20".into();
    let load = Load { payload, max_bandwidth: 4 << 20, downtime_limit: 1, ..Load::default() };
    let journey = |name: String, stops: Vec<Stop>| Journey {
        name,
        stops,
        capabilities: vec!["return-path", "xbzrle"],
        load: load.clone(),
        ..plain()
    };
    let mut journeys = Vec::new();
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    for stops in ways {
        let name = format!("{}>{}/xbzrle", stops[0], stops[1]);
        journeys.push(Journey { quick: stops == [reference, new], ..journey(name, stops.into()) });
        // Not all of what the guest writes to is remembered.
        let name = format!("{}>{}/xbzrle/cache=2M", stops[0], stops[1]);
        let mut parameters = Map::new();
        parameters.insert("xbzrle-cache-size".into(), (2 << 20).into());
        let quick = stops == [reference; 2];
        journeys.push(Journey { link: Link::Tcp, parameters, quick, ..journey(name, stops.into()) });
        // What comes after the guest comes in full.
        let name = format!("{}>{}/xbzrle+postcopy", stops[0], stops[1]);
        let capabilities = vec!["xbzrle", "postcopy-ram"];
        let (postcopy, load) = (Some(Departure::AfterPass), Departure::AfterPass.load());
        journeys.push(Journey { capabilities, postcopy, load, ..journey(name, stops.into()) });
    }
    let stops = vec![old, old, reference, reference, new, new, reference, new];
    journeys.push(Journey { load: Load { cpus: 2, ..load.clone() }, ..journey("ring/xbzrle".into(), stops) });
    journeys
}
