//! Guests that go to another process of the host, and whose memory stays where it is (mode `cpr-transfer`).

use super::rows::{channels_of, plain};
use super::{Journey, Link, Load, Stop};
use crate::roots::Suite;
use crate::scenario::Accel;

/// Each release that has the mode in both directions, both with themselves, and round all of them.
pub(super) fn journeys() -> Vec<Journey> {
    let [middle, new] = [Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let reference = Stop::Reference;
    let backend = Some("memory-backend-memfd,share=on");
    let load = Load { memory_backend: backend, passes_memory: true, ..Load::default() };
    let journey = |name: String, stops: &[Stop], capabilities: &[&'static str]| Journey {
        name,
        stops: stops.into(),
        link: Link::Memory,
        capabilities: capabilities.into(),
        load: load.clone(),
        ..plain()
    };
    let mut journeys = Vec::new();
    let ways = [
        ([reference, reference], true),
        ([reference, new], true),
        ([new, reference], true),
        ([reference, middle], false),
        ([middle, reference], false),
        // What the others are held against.
        ([new, new], false),
        ([middle, new], false),
    ];
    for (stops, quick) in ways {
        let name = |with: &str| format!("{}>{}/cpr-transfer{with}", stops[0], stops[1]);
        journeys.push(Journey { quick, ..journey(name(""), &stops, &["return-path"]) });
        // Without answers, and with page channels that have nothing to carry.
        journeys.push(journey(name("/one-way"), &stops, &[]));
        let multifd = journey(name("+multifd"), &stops, &["return-path", "multifd"]);
        journeys.push(Journey { parameters: channels_of(2, "none"), ..multifd });
    }
    let stops = [new, reference, reference, new, reference, middle, reference, new];
    let two = Load { cpus: 2, ..load.clone() };
    journeys.push(Journey { load: two, ..journey("ring/cpr-transfer".into(), &stops, &["return-path"]) });
    journeys
}
