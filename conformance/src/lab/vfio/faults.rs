//! The table of faults: every arc, read, write and query of a device fails once, at either side of a migration between
//! reference-vmm and QEMU; acks that are counted otherwise, or at one side alone; and a driver that answers garbage.

use super::case::{Case, Ending, NEW, OLD, PRECOPY, Says, Stop};
use crate::lab::boot::Boot;
use qevm_lab::Side;
use serde_json::json;

/// EIO, and how a message has it.
const ERRNO: u32 = 5;
const SAYS_ERRNO: &str = "(os error 5)";
/// The name of the device in messages.
const DEVICE: &str = "'vfio0'";
/// Flags of devices with fewer states.
const P2P: u64 = 3;
const STOP_COPY: u64 = 1;
const WITHOUT_P2P: u64 = 5;

pub(super) fn faults() -> Vec<Case> {
    let mut all = Vec::new();
    for left_in_error in [false, true] {
        all.extend(source_arcs(left_in_error));
        all.extend(ways_back(left_in_error));
        all.extend(destination_arcs(left_in_error));
    }
    all.extend(calls());
    all.extend(lost());
    all.extend(acks());
    all.extend(garbage());
    all
}

/// From reference-vmm to a QEMU 11.1.
fn leaving(name: String) -> Case {
    Case { path: vec![Stop::Reference(NEW), Stop::Qemu(NEW)], ..Case::new(name, NEW, NEW) }
}

/// From a QEMU 11.1 to reference-vmm.
fn arriving(name: String) -> Case {
    Case { path: vec![Stop::Qemu(NEW), Stop::Reference(NEW)], ..Case::new(name, NEW, NEW) }
}

fn name(side: &str, from: &str, to: &str, left_in_error: bool) -> String {
    let suffix = if left_in_error { "-error" } else { "" };
    format!("fault-{side}-{from}-{to}{suffix}").replace('_', "-").to_lowercase()
}

fn says(at: Says, words: &[&str]) -> Option<(Says, Vec<String>)> {
    Some((at, words.iter().map(|word| (*word).to_owned()).collect()))
}

/// The device refuses an arc, once.
fn refuse(case: Case, side: Side, from: &str, to: &str, left_in_error: bool) -> Case {
    case.set(side, "error_after_fault", u8::from(left_in_error)).set(side, "fail", format!("{from} {to} {ERRNO}"))
}

/// The guest runs on at the source, whose `query-migrate` says why.
fn source_arcs(left_in_error: bool) -> Vec<Case> {
    let arcs = [
        (PRECOPY, "RUNNING", "PRE_COPY"),
        (PRECOPY, "PRE_COPY", "PRE_COPY_P2P"),
        (PRECOPY, "PRE_COPY_P2P", "STOP_COPY"),
        (WITHOUT_P2P, "PRE_COPY", "STOP_COPY"),
        (P2P, "RUNNING", "RUNNING_P2P"),
        (P2P, "RUNNING_P2P", "STOP"),
        (P2P, "STOP", "STOP_COPY"),
        (STOP_COPY, "RUNNING", "STOP"),
        (STOP_COPY, "STOP", "STOP_COPY"),
    ];
    let case = |(flags, from, to): (u64, &str, &str)| {
        let states = format!("from {from} to {to} ");
        let words = [DEVICE, &states, SAYS_ERRNO];
        let ending = Ending::Fault { runs: Some(Side::Source), says: says(Says::Error, &words) };
        let name = name(&format!("source-{flags}"), from, to, left_in_error);
        refuse(Case { flags, ending, ..leaving(name) }, Side::Source, from, to, left_in_error)
    };
    let mut all: Vec<_> = arcs.into_iter().map(case).collect();
    // The guest has gone, and the device must do nothing more.
    let words = [DEVICE, "from STOP_COPY to STOP ", SAYS_ERRNO];
    let ending = Ending::Fault { runs: Some(Side::Destination), says: says(Says::Log(Side::Source), &words) };
    let name = name("source-after", "STOP_COPY", "STOP", left_in_error);
    all.push(refuse(Case { ending, ..leaving(name) }, Side::Source, "STOP_COPY", "STOP", left_in_error));
    all
}

/// The destination's device does not take its state, and the source's refuses to go back to work at first.
fn ways_back(left_in_error: bool) -> Vec<Case> {
    let case = |(flags, from, to): (u64, &str, &str)| {
        let words = [DEVICE, to, SAYS_ERRNO];
        let ending = Ending::Fault { runs: Some(Side::Source), says: says(Says::Log(Side::Source), &words) };
        let name = name("source-back", from, to, left_in_error);
        let case = Case { flags, ending, ..leaving(name) }.set(Side::Destination, "fail", "write 22");
        refuse(case, Side::Source, from, to, left_in_error)
    };
    // Without PRE_COPY the first that it is to take comes when the source's has stopped.
    [
        (P2P, "STOP_COPY", "STOP"),
        (P2P, "STOP", "RUNNING_P2P"),
        (P2P, "RUNNING_P2P", "RUNNING"),
        (PRECOPY, "PRE_COPY", "RUNNING"),
    ]
    .into_iter()
    .map(case)
    .collect()
}

fn destination_arcs(left_in_error: bool) -> Vec<Case> {
    // A device that is not ready for a guest at first, and is asked again when the guest's state comes.
    let before = [("RUNNING", "RUNNING_P2P"), ("RUNNING_P2P", "STOP"), ("STOP", "RESUMING")];
    // The guest is here, and nowhere else.
    let after = [("STOP", "RUNNING_P2P"), ("RUNNING_P2P", "RUNNING")];
    let case = |from: &str, to: &str, runs: Option<Side>, says| {
        let case =
            Case { ending: Ending::Fault { runs, says }, ..arriving(name("destination", from, to, left_in_error)) };
        refuse(case, Side::Destination, from, to, left_in_error)
    };
    let at_destination = |words: &[&str]| says(Says::Log(Side::Destination), words);
    let mut all = Vec::new();
    for (from, to) in before {
        all.push(case(from, to, Some(Side::Destination), at_destination(&[DEVICE, "to RESUMING ", SAYS_ERRNO])));
    }
    let words = [DEVICE, "from RESUMING to STOP ", SAYS_ERRNO];
    all.push(case("RESUMING", "STOP", Some(Side::Source), at_destination(&words)));
    for (from, to) in after {
        let states = format!("to {to} ");
        all.push(case(from, to, None, at_destination(&[DEVICE, &states, SAYS_ERRNO])));
    }
    all
}

/// Reads, writes and questions.
fn calls() -> Vec<Case> {
    let at_source = |name: &str, flags: u64, fault: &str, runs: Side, words: &[&str]| {
        // What does not keep the guest here is a warning.
        let at = if runs == Side::Source { Says::Error } else { Says::Log(Side::Source) };
        let ending = Ending::Fault { runs: Some(runs), says: says(at, words) };
        Case { flags, ending, ..leaving(format!("fault-source-{name}")) }.set(Side::Source, "fail", fault)
    };
    let writing = |name: &str, fault: &str| {
        let ending = Ending::Fault {
            runs: Some(Side::Source),
            says: says(Says::Log(Side::Destination), &[DEVICE, "refused its state after", SAYS_ERRNO]),
        };
        Case { ending, ..arriving(format!("fault-destination-{name}")) }.set(Side::Destination, "fail", fault)
    };
    let source = Side::Source;
    // The log is tried when the device is opened, and again when the migration begins: a start, a report of each of two
    // ranges of RAM and a stop.
    vec![
        at_source("read-pre-copy", PRECOPY, "read 5", source, &[DEVICE, "cannot be read in PRE_COPY", SAYS_ERRNO]),
        at_source("read-stop-copy", P2P, "read 5", source, &[DEVICE, "cannot be read in STOP_COPY", SAYS_ERRNO]),
        at_source("data-size", PRECOPY, "data_size 5", source, &[DEVICE, "MIG_DATA_SIZE failed in", SAYS_ERRNO]),
        at_source("precopy-info", PRECOPY, "precopy_info 5", source, &[DEVICE, "PRECOPY_INFO failed in", SAYS_ERRNO]),
        // The migration goes on with another log, or with all of RAM once more.
        at_source(
            "log-start",
            PRECOPY,
            "log_start 5 1 1",
            Side::Destination,
            &["DMA_LOGGING_START", "vfio0", SAYS_ERRNO],
        ),
        at_source("log-report", PRECOPY, "log_report 5 1 4", source, &["DMA_LOGGING_REPORT", "vfio0", SAYS_ERRNO]),
        at_source("log-stop", PRECOPY, "log_stop 5 1 1", Side::Destination, &["DMA_LOGGING_STOP", "vfio0", SAYS_ERRNO]),
        writing("write", "write 5"),
        writing("write-last", "write 5 1 2"),
    ]
}

/// A device that cannot be reset: its guest is paused, with the reason.
fn lost() -> Vec<Case> {
    let words = [DEVICE, "from PRE_COPY_P2P to STOP_COPY ", SAYS_ERRNO, "guest stays paused"];
    let ending = Ending::Fault { runs: None, says: says(Says::Log(Side::Source), &words) };
    let case = Case { ending, ..leaving("fault-source-lost".to_owned()) }.set(Side::Source, "reset_offered", 0);
    vec![refuse(case, Side::Source, "PRE_COPY_P2P", "STOP_COPY", true)]
}

fn acks() -> Vec<Case> {
    let path = |from, to| vec![from, to];
    let (qemu, ours) = (Stop::Qemu(NEW), Stop::Reference(NEW));
    let slow = |case: Case| case.set(Side::Destination, "load_initial_ms", 1000);
    // reference-vmm takes its destination for a QEMU 11.1, and it is a 10.0.
    let ending = Ending::Fault {
        runs: Some(Side::Source),
        says: says(Says::Error, &["counted as QEMU 11.1 does, one for each device"]),
    };
    // Its devices' initial data are 64 KiB each.
    let unset = Case {
        devices: 2,
        path: path(ours, Stop::Qemu(OLD)),
        ending,
        fails_within: Some((2 * (64 << 10), 1000.0)),
        ..Case::new("acks-two-to-10.0-unset", NEW, OLD)
    };
    let set = Case {
        devices: 2,
        path: path(Stop::Reference(OLD), Stop::Qemu(OLD)),
        ..Case::new("acks-two-to-10.0-set", OLD, OLD)
    };
    let counted = |case: Case| Case { boot: Boot::Counted, ..slow(case) };
    let mut all = vec![counted(unset.ack()), counted(set.ack())];
    for (between, from, to) in [("ours-qemu", ours, qemu), ("qemu-ours", qemu, ours), ("ours-ours", ours, ours)] {
        for (where_, side) in [("source", Side::Source), ("destination", Side::Destination)] {
            let case = Case { path: path(from, to), ending: Ending::Ends, limit_s: 30, ..Case::new("", NEW, NEW) };
            let mut capability = Case { name: format!("acks-capability-at-{where_}-{between}"), ..case.clone() };
            capability.capabilities.push((Some(side), "switchover-ack"));
            // The other side's device has no PRE_COPY.
            let other = if side == Side::Source { Side::Destination } else { Side::Source };
            let device = Case { name: format!("acks-device-at-{where_}-{between}"), ..case };
            let device = device.ack().set(other, "migration_flags", P2P);
            all.extend([capability, device]);
        }
    }
    all
}

/// The driver answers what cannot be, or does not come to an end.
fn garbage() -> Vec<Case> {
    let source = Side::Source;
    let case = |name: &str, ending: Ending| {
        let parameters = json!({ "downtime-limit": 300 });
        Case { boot: Boot::Counted, ending, parameters, ..leaving(format!("garbage-{name}")) }
    };
    let refused = |words: &[&str]| Ending::Fault { runs: Some(source), says: says(Says::Error, words) };
    let cancelled = || Ending::Fault { runs: Some(source), says: None };
    let endless = u64::MAX - 1;
    let mut growing = case("initial-grows", cancelled());
    growing.cancel_after_ms = Some(4000);
    for second in 0..8 {
        growing = growing.change(500 * second, "initial_bytes", (1_u64 << 30) << second);
    }
    let ended = |name: &str, flags: u64, multifd: bool| {
        let mut case = case(name, cancelled());
        (case.flags, case.cancel_after_ms) = (flags, Some(3000));
        let case = if multifd { case.multifd() } else { case };
        case.set(source, "endless", 1)
    };
    vec![
        case("data-size", refused(&[DEVICE, "MIG_DATA_SIZE says", "expected fewer than 64 PiB"])).set(
            source,
            "data_size",
            endless,
        ),
        case("initial-bytes", refused(&[DEVICE, "PRECOPY_INFO says", "expected fewer than 64 PiB"])).set(
            source,
            "initial_bytes",
            endless,
        ),
        growing,
        ended("endless", PRECOPY, false),
        ended("endless-stop-copy", P2P, false),
        ended("endless-multifd", PRECOPY, true),
    ]
}
