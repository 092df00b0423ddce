//! The rows, with their outcomes written down beforehand.

use super::Row;
use super::frozen::{Phase, Victim};
use super::mishaps::At;
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
    for (name, moment, outcomes) in moments().into_iter().chain(frozen()).chain(mishaps()) {
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

const QUICK: [&str; 11] = [
    "1.1 idle stranger/11.1>ref",
    "1.1 garbage/ref>ref",
    "1.2 link dies at SHUT/11.1>ref",
    "1.2 cancelled in device/ref>11.1",
    "1.3 second migrate/ref>11.1",
    "1.4 reset while active/11.1>ref",
    "1.5 peer resets/ref>ref",
    "2 setup, link frozen/ref>ref",
    "2 active, page channel frozen/ref>ref",
    "2 device, destination frozen/ref>11.1",
    "2 postcopy, source frozen/11.1>ref",
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

/// Each moment with its outcomes between ours, from QEMU and to QEMU; none where it is about the destination and that
/// is QEMU.
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
        // Ours keeps the end of the stream back from a QEMU that has not loaded the rest: the guest is still the
        // source's.
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

/// What is frozen and when. Ours decides, and a QEMU waits: as a source until it is cancelled, as a destination until
/// what was frozen goes on. Where it can bring neither side into doubt, nothing but the guest's place was to be written
/// down.
#[rustfmt::skip]
fn frozen() -> Vec<(&'static str, Moment, [Option<Expected>; 3])> {
    use Runs::{Destination, Source};
    let idle = |end| says(Source, end, "x-idle-timeout");
    let row = |name, phase, victim, outcomes| (name, Moment::Frozen(phase, victim), outcomes);
    let recovers = || [reports(Destination, "completed"), None, reports(Destination, "completed")];
    vec![
        row("2 setup, link frozen", Phase::Setup, Victim::Link, [says(Source, 0, "x-connect-timeout"), None, says(Source, 0, "x-connect-timeout")]),
        row("2 setup, destination frozen", Phase::Setup, Victim::Destination, [idle(0), runs(Source), idle(0)]),
        row("2 active, destination frozen", Phase::Active, Victim::Destination, [idle(0), runs(Source), idle(0)]),
        // A QEMU as destination has waited, and takes the guest when the source goes on.
        row("2 active, source frozen", Phase::Active, Victim::Source, [idle(1), idle(1), None]),
        row("2 active, link frozen", Phase::Active, Victim::Link, [idle(0), idle(1), idle(0)]),
        row("2 active, page channel frozen", Phase::Active, Victim::PageChannel, [says(Source, 2, "page channel"), runs(Source), says(Source, 0, "page channel")]),
        row("2 active, main channel frozen", Phase::Active, Victim::MainChannel, [runs(Source), runs(Source), runs(Source)]),
        row("2 device, destination frozen", Phase::Device, Victim::Destination, [says(Source, 0, "x-switchover-timeout"), None, says(Source, 0, "x-switchover-timeout")]),
        row("2 device, source frozen", Phase::Device, Victim::Source, [says(Source, 1, "did not confirm the handover"), runs(Destination), None]),
        row("2 device, link frozen", Phase::Device, Victim::Link, [says(Source, 0, "x-switchover-timeout"), runs(Source), says(Source, 0, "x-switchover-timeout")]),
        row("2 postcopy, destination frozen", Phase::Postcopy, Victim::Destination, recovers()),
        row("2 postcopy, source frozen", Phase::Postcopy, Victim::Source, [reports(Destination, "completed"), reports(Destination, "completed"), None]),
        row("2 postcopy, link frozen", Phase::Postcopy, Victim::Link, recovers()),
    ]
}

/// What guests, operators, hosts and links do.
#[rustfmt::skip]
fn mishaps() -> Vec<(&'static str, Moment, [Option<Expected>; 3])> {
    use At::{Active, Device, Postcopy, PreSwitchover, Setup};
    use Runs::{Destination, Gone, Source, Starved};
    let arrives = || [(); 3].map(|()| reports(Destination, "completed"));
    // From each kind of source, into one of ours.
    let from_each = || [reports(Destination, "completed"), reports(Destination, "completed"), None];
    vec![
        ("3 guest reboots", Moment::GuestReboots, arrives()),
        ("3 guest shuts down", Moment::GuestShutsDown, [runs(Gone); 3]),
        ("3 guest paused", Moment::PausedGuest, arrives()),
        ("3 guest spins", Moment::GuestSpins, arrives()),
        ("3 during boot", Moment::Boots, arrives()),
        // A QEMU as destination takes any caller for its source, and the late connection of a QEMU is one.
        // A QEMU that is cancelled before it is connected answers its monitor no more (11.1).
        ("3 cancelled in setup, then again", Moment::CancelAndGoAgain(Setup), [reports(Destination, "completed"), None, reports(Destination, "completed")]),
        ("3 cancelled while active, then again", Moment::CancelAndGoAgain(Active), arrives()),
        ("3 cancelled in pre-switchover, then again", Moment::CancelAndGoAgain(PreSwitchover), arrives()),
        ("3 cancelled in device, then elsewhere", Moment::CancelAndGoAgain(Device), arrives()),
        ("3 cancelled in postcopy", Moment::CancelInPostcopy, arrives()),
        ("3 destination killed in setup, then elsewhere", Moment::KilledAndGoElsewhere(Setup), arrives()),
        ("3 destination killed while active, then elsewhere", Moment::KilledAndGoElsewhere(Active), arrives()),
        ("3 destination killed in pre-switchover, then elsewhere", Moment::KilledAndGoElsewhere(PreSwitchover), arrives()),
        ("3 destination killed in device, then elsewhere", Moment::KilledAndGoElsewhere(Device), arrives()),
        ("3 destination killed in postcopy", Moment::KilledInPostcopy, [reports(Gone, "postcopy-paused"); 3]),
        ("3 source killed in setup", Moment::SourceKilled(Setup), [runs(Gone); 3]),
        ("3 source killed while active", Moment::SourceKilled(Active), [runs(Gone); 3]),
        ("3 source killed in pre-switchover", Moment::SourceKilled(PreSwitchover), [runs(Gone); 3]),
        ("3 source killed in postcopy", Moment::SourceKilled(Postcopy), [runs(Starved); 3]),
        ("3 both stopped for a minute", Moment::BothStopped, arrives()),
        ("3 slow link", Moment::SlowLink, [reports(Source, "cancelled"); 3]),
        ("3 lossy link", Moment::LossyLink, arrives()),
        ("3 delay of 300 ms", Moment::Delay, arrives()),
        ("3 destination out of memory", Moment::NoMemory, [reports(Source, "failed"); 3]),
        ("3 target full", Moment::TargetFull, from_each()),
        ("3 target read-only", Moment::TargetReadOnly, from_each()),
        // A QEMU takes its disks after its verdict: the source has completed by then.
        ("3 disk in use at the destination", Moment::DiskInUse, from_each()),
        ("3 hot-plug", Moment::HotPlug, arrives()),
        // A QEMU's monitor is the judge's own here.
        ("3 QMP client gone, another there", Moment::AnotherClient, [reports(Destination, "completed"), None, reports(Destination, "completed")]),
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
