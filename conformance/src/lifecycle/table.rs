//! The rows, with their outcomes written down beforehand.

use super::Row;
use super::moments::Moment;
use super::sides::{Expected, Runs};
use crate::peer::Stop;
use crate::roots::Suite;
use crate::scenario::Accel;

const QEMU: Stop = Stop::Qemu(Suite::Sid, Accel::Kvm);
const OURS: Stop = Stop::Reference;
/// Between ours, from QEMU, to QEMU.
const ROUTES: [[Stop; 2]; 3] = [[OURS, OURS], [QEMU, OURS], [OURS, QEMU]];
/// What an operator is told where both ends may have the guest.
const DECIDE: &str = "cont";

/// All rows.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, moment, outcomes) in moments() {
        for (stops, expected) in ROUTES.into_iter().zip(outcomes) {
            let Some(expected) = expected else { continue };
            let name = format!("{name}/{}>{}", stops[0], stops[1]);
            let quick = QUICK.contains(&name.as_str());
            rows.push(Row { name, moment, stops, capabilities: &[], expected, quick });
        }
    }
    // What calls at the port of page channels. A QEMU as destination is left out: it is not ours to mend.
    for row in rows.clone() {
        if row.name.starts_with("1.1") && row.stops[1] == OURS {
            let name = row.name.replace('/', ", multifd/");
            rows.push(Row { name, capabilities: &["multifd"], quick: false, ..row });
        }
    }
    rows
}

/// The rows of `make test`.
pub fn quick() -> Vec<Row> {
    all().into_iter().filter(|row| row.quick).collect()
}

const QUICK: [&str; 7] = [
    "1.1 idle stranger/11.1>ref",
    "1.1 garbage/ref>ref",
    "1.2 link dies at SHUT/11.1>ref",
    "1.2 cancelled in device/ref>11.1",
    "1.3 second migrate/ref>11.1",
    "1.4 reset while active/11.1>ref",
    "1.5 peer resets/ref>ref",
];

fn runs(runs: Runs) -> Option<Expected> {
    Some(Expected { runs, says: None, source: None })
}

fn says(runs: Runs, end: usize, text: &'static str) -> Option<Expected> {
    Some(Expected { runs, says: Some((end, text)), source: None })
}

fn reports(runs: Runs, source: &'static str) -> Option<Expected> {
    Some(Expected { runs, says: None, source: Some(source) })
}

/// Each moment with its outcomes between ours, from QEMU and to QEMU; none where it is about the destination and that is QEMU.
#[rustfmt::skip]
fn moments() -> Vec<(&'static str, Moment, [Option<Expected>; 3])> {
    use Runs::{Destination, Gone, Paused, Source};
    let arrives = || reports(Destination, "completed");
    vec![
        // A QEMU takes the first caller for its source: it ends, or never starts the guest, which stays where it is.
        ("1.1 idle stranger", Moment::IdleStranger, [arrives(), arrives(), runs(Source)]),
        ("1.1 port scan", Moment::PortScan, [arrives(), arrives(), runs(Source)]),
        ("1.1 garbage", Moment::Garbage, [arrives(), arrives(), runs(Source)]),
        ("1.1 5000 idle strangers", Moment::Crowd, [arrives(), arrives(), None]),
        ("1.1 no descriptors", Moment::NoDescriptors, [arrives(), arrives(), None]),
        ("1.1 second source", Moment::SecondSource, [arrives(), arrives(), arrives()]),
        // The destination cannot know whether its verdict arrived. A QEMU starts the guest all the same.
        ("1.2 link dies at SHUT", Moment::LinkDiesAtShut, [says(Paused(1), 1, DECIDE), says(Paused(1), 1, DECIDE), runs(Destination)]),
        ("1.2 link dies at SHUT then cancel", Moment::LinkDiesAtShutThenCancel, [says(Source, 1, DECIDE), says(Source, 1, DECIDE), says(Destination, 0, DECIDE)]),
        ("1.2 link dies after SHUT", Moment::LinkDiesAfterShut, [says(Paused(1), 1, DECIDE), says(Paused(1), 1, DECIDE), arrives()]),
        // Ours keeps the end of the stream back from a QEMU that has not loaded the rest: the guest is still the source's.
        ("1.2 source killed in device", Moment::SourceKilledInDevice, [says(Paused(1), 1, DECIDE), says(Paused(1), 1, DECIDE), runs(Gone)]),
        ("1.2 cancelled in device", Moment::CancelInDevice, [runs(Source); 3]),
        ("1.3 second migrate", Moment::SecondMigrate, [arrives(), arrives(), arrives()]),
        ("1.4 reset while active", Moment::ResetWhileActive, [arrives(), arrives(), arrives()]),
        ("1.4 reset after arrival", Moment::ResetAfterArrival, [arrives(), arrives(), arrives()]),
        ("1.4 SIGTERM to the source", Moment::TerminateSource, [runs(Gone), runs(Gone), runs(Gone)]),
        ("1.4 SIGTERM to the destination", Moment::TerminateDestination, [reports(Source, "failed"), reports(Source, "failed"), reports(Source, "failed")]),
        ("1.5 exit-on-error off", Moment::ExitOnErrorOff, [arrives(), arrives(), None]),
        ("1.5 peer resets", Moment::PeerResets, [reports(Source, "failed"), None, None]),
        ("1.6 silence", Moment::Silence, [arrives(), arrives(), arrives()]),
        ("1.6 events", Moment::Events, [arrives(), arrives(), arrives()]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_the_quick_rows_are_there() {
        let names: BTreeSet<String> = all().into_iter().map(|row| row.name).collect();
        assert_eq!(names.len(), all().len());
        assert_eq!(quick().len(), QUICK.len());
    }
}
