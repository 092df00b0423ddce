//! RAM that is a file of both machines and does not travel (capability `x-ignore-shared`).

use super::rows::{PEERS, channels_of, plain};
use super::{Journey, Link, Load, Stop};
use crate::roots::Suite;
use crate::scenario::Accel;
use serde_json::Map;

/// Each release in both directions, reference-vmm with itself, and files where the release writes such.
pub(super) fn journeys() -> Vec<Journey> {
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let [old, middle, new] = peers;
    let reference = Stop::Reference;
    let backend = Some("memory-backend-file,mem-path={scratch}/ram,share=on");
    let load = Load { memory_backend: backend, ..Load::default() };
    let journey = |name: String, stops: Vec<Stop>, capabilities: &[&'static str]| Journey {
        name,
        stops,
        capabilities: [&["x-ignore-shared"], capabilities].concat(),
        load: load.clone(),
        ..plain()
    };
    let mut journeys = Vec::new();
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    for stops in ways {
        let name = |with: &str| format!("{}>{}/ignore-shared{with}", stops[0], stops[1]);
        let quick = stops.contains(&new);
        journeys.push(Journey { quick, ..journey(name(""), stops.into(), &["return-path"]) });
        let parameters = channels_of(2, "none");
        let multifd = journey(name("+multifd"), stops.into(), &["return-path", "multifd"]);
        journeys.push(Journey { link: Link::Tcp, parameters, ..multifd });
        // 10.0 cannot write such a file, nor read it.
        if !stops.iter().any(|stop| matches!(stop, Stop::Qemu(Suite::Bookworm | Suite::Trixie, _))) {
            let file = journey(name("+mapped-ram"), stops.into(), &["mapped-ram"]);
            journeys.push(Journey { link: Link::File, parameters: Map::new(), ..file });
        }
    }
    let stops = vec![old, reference, reference, middle, reference, new, reference];
    journeys.push(journey("ring/ignore-shared".into(), stops, &["return-path"]));
    journeys
}
