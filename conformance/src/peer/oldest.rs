//! Guests that go before their memory to and from QEMU 5.2, the oldest that is judged.

use super::rows::{channels_of, plain};
use super::{Break, Departure, Journey, Link, Load, MismatchCase, Recovery, Stop};
use crate::roots::Suite;
use crate::scenario::Accel;
use serde_json::Map;

const OLDEST: Stop = Stop::Qemu(Suite::Bullseye, Accel::Kvm);

fn ways() -> [[Stop; 2]; 2] {
    [[Stop::Reference, OLDEST], [OLDEST, Stop::Reference]]
}

fn journey(stops: [Stop; 2], what: &str) -> Journey {
    let mut parameters = Map::new();
    parameters.insert("max-postcopy-bandwidth".into(), (32 << 20).into());
    Journey {
        name: format!("{}>{}/{what}", stops[0], stops[1]),
        stops: stops.into(),
        capabilities: vec!["postcopy-ram"],
        parameters,
        postcopy: Some(Departure::AtOnce),
        load: Load { downtime_limit: 1, ..Load::default() },
        ..plain()
    }
}

/// At once and after a pass, and from a source that gives its memory back.
pub(super) fn journeys() -> Vec<Journey> {
    let mut journeys = Vec::new();
    for stops in ways() {
        let at_once = journey(stops, "postcopy/tcp/at-once");
        journeys.push(Journey { link: Link::Tcp, quick: stops[0] == OLDEST, ..at_once });
        let after_pass = journey(stops, "postcopy/unix/after-pass");
        journeys.push(Journey { postcopy: Some(Departure::AfterPass), ..after_pass });
        let mut releasing = journey(stops, "postcopy/release-ram");
        releasing.capabilities.push("release-ram");
        journeys.push(releasing);
    }
    journeys
}

/// A source before 10.1 goes on writing to page channels in postcopy, and a QEMU 7.2 dies of that.
pub(super) fn mismatches() -> Vec<MismatchCase> {
    let mismatch = |suite| {
        let mut journey = journey([Stop::Qemu(suite, Accel::Kvm), Stop::Reference], "wrong/postcopy+multifd");
        journey.capabilities.push("multifd");
        journey.parameters.extend(channels_of(2, "none"));
        let said = vec!["capabilities 'postcopy-ram' and 'multifd' from a QEMU before 10.1", "turn one of them off"];
        let (source, destination, capabilities) = (vec![], vec![], vec![]);
        MismatchCase { journey, source, destination, capabilities, said, reported: "" }
    };
    [Suite::Bullseye, Suite::Bookworm].map(mismatch).into()
}

/// The connection is lost once and five times, in pages.
pub(super) fn recoveries() -> Vec<Recovery> {
    let recovery = |stops, count: u64| {
        let breaks = (0..count).map(|n| Break::Forth(40_000 + n * 977)).collect();
        Recovery { journey: journey(stops, &format!("recovery/{count}")), breaks, dies: false }
    };
    ways().into_iter().flat_map(|stops| [1, 5].map(|count| recovery(stops, count))).collect()
}
