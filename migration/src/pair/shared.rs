//! RAM that is a file of both machines, and does not travel (capability `x-ignore-shared`).

use super::*;
use crate::{Address, LoadError};
use multifd::Plan;
use qevm_multifd::Compression;
use std::sync::atomic::Ordering;

/// Pages of the block that travels.
const REST: u64 = 4;

impl Pair {
    /// Machines that map their first block shared, or say so.
    fn sharing(source: bool, destination: bool) -> Self {
        let pair = Pair::new(600).with(&[("return-path", true), ("x-ignore-shared", true)]);
        pair.source.shares.store(source, Ordering::Relaxed);
        pair.destination.shares.store(destination, Ordering::Relaxed);
        pair
    }

    /// The guest runs there, and nothing of its shared memory was sent or touched.
    fn assert_left_out(&self, outcome: &Outcome) {
        assert!(outcome.source.is_ok() && outcome.destination.is_ok(), "{outcome:?}");
        assert!(!self.source.is_running() && self.destination.is_running());
        let ram = outcome.statistics.ram;
        assert_eq!(ram.total, REST * ram.page_size, "{ram:?}");
        assert!(ram.normal + ram.duplicate < 600 && ram.normal >= 2, "{ram:?}");
        let [shared, rest] = &self.destination.contents()[..] else { panic!() };
        assert!(shared.iter().all(|byte| *byte == 0), "the destination has written to what it shares");
        assert!(*rest == self.source.contents()[1]);
    }
}

/// Why a destination refused, and that the guest has stayed.
fn refused(pair: &Pair, outcome: Outcome) -> LoadError {
    pair.assert_stayed(&outcome);
    match outcome.destination {
        Err(MigrationError::Load(error)) => error.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn shared_memory_stays_where_it_is() {
    let pair = Pair::sharing(true, true);
    pair.assert_left_out(&pair.run(Faults::default()));

    let pair = Pair::sharing(true, true).multifd(2, Compression::None);
    pair.assert_left_out(&pair.go(&Plan::default()));

    let directory = tempfile::tempdir().unwrap();
    let address = Address::File { path: directory.path().join("guest"), offset: 0 };
    for capabilities in [&[("mapped-ram", true)][..], &[("mapped-ram", true), ("multifd", true)], &[]] {
        let pair = Pair::sharing(true, true);
        let on = [("x-ignore-shared", true)];
        let pair = pair.with(&[&on[..], capabilities].concat());
        pair.assert_left_out(&pair.through(&address));
        // Nothing in the file has a place for it.
        assert!(std::fs::metadata(directory.path().join("guest")).unwrap().len() < 2 << 20);
    }
}

/// Otherwise a guest would run there without its memory, or another's file be overwritten.
#[test]
fn both_ends_must_share_it() {
    let pair = Pair::sharing(true, false);
    let outcome = pair.run(Faults::default());
    assert!(matches!(refused(&pair, outcome), LoadError::NotSent { name } if name == *"microvm.ram"));
    let pair = Pair::sharing(false, true);
    let outcome = pair.run(Faults::default());
    assert!(matches!(refused(&pair, outcome), LoadError::SharedSent { name } if name == *"microvm.ram"));
    for (source, destination) in [(true, false), (false, true)] {
        let pair = Pair::sharing(source, destination).multifd(2, Compression::None);
        let outcome = pair.go(&Plan::default());
        pair.assert_stayed(&outcome);
        let why = outcome.destination.unwrap_err().to_string();
        assert!(why.contains(if source { "is not in the stream" } else { "should not be migrated" }), "{why}");
    }
    let directory = tempfile::tempdir().unwrap();
    let address = Address::File { path: directory.path().join("guest"), offset: 0 };
    for (source, destination) in [(true, false), (false, true)] {
        let pair = Pair::sharing(source, destination).with(&[("mapped-ram", true), ("x-ignore-shared", true)]);
        let outcome = pair.through(&address);
        assert!(outcome.source.is_ok() && !pair.destination.is_running());
        let why = outcome.destination.unwrap_err().to_string();
        assert!(why.contains(if source { "is not in the stream" } else { "should not be migrated" }), "{why}");
    }
}

#[test]
fn both_ends_must_have_the_capability_on() {
    for here in [true, false] {
        let mut pair = Pair::sharing(true, true);
        pair.incoming = Some(Capabilities { ignore_shared: here, ..pair.job.capabilities() });
        pair.job.set_capabilities(Capabilities { ignore_shared: !here, ..pair.job.capabilities() }).unwrap();
        let outcome = pair.run(Faults::default());
        let why = refused(&pair, outcome);
        let LoadError::CapabilityDiffers { name: "x-ignore-shared", here: found } = why else { panic!("{why}") };
        assert_eq!(found, here);
    }
}

/// A file that the guest goes on writing to is no snapshot.
#[test]
fn a_snapshot_needs_memory_of_its_own() {
    let pair = Pair::sharing(true, true).with(&[("background-snapshot", true), ("x-ignore-shared", true)]);
    let outcome = pair.run(Faults::default());
    assert!(pair.source.is_running());
    let why = outcome.source.unwrap_err().to_string();
    assert_eq!(why, "Background-snapshot is not compatible with guest memory configuration");
}
