//! Guests whose memory stays where it is (mode `cpr-transfer`). Two machines of a test have no memory in common, so
//! that whatever the engines did to it would be seen.

use super::*;
use crate::{LoadError, Mode};

/// A source in this mode, and a destination in that one.
fn modes(source: Mode, destination: Mode) -> Pair {
    let pair = Pair::new(600);
    let parameters = |mode| Parameters { mode, ..pair.job.parameters() };
    let (source, destination) = (parameters(source), parameters(destination));
    pair.job.set_parameters(source);
    Pair { incoming_parameters: Some(destination), ..pair }
}

fn refused(pair: &Pair, outcome: Outcome) -> LoadError {
    pair.assert_stayed(&outcome);
    match outcome.destination {
        Err(MigrationError::Load(error)) => error.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_page_travels_and_none_is_touched() {
    for capability in ["return-path", "multifd", "x-ignore-shared"] {
        let pair = modes(Mode::CprTransfer, Mode::CprTransfer).with(&[(capability, true)]);
        let before = pair.source.contents();
        let outcome = pair.run(Faults::default());
        assert!(outcome.source.is_ok() && outcome.destination.is_ok(), "{outcome:?}");
        assert!(!pair.source.is_running() && pair.destination.is_running());
        let Statistics { ram, stopped_at, .. } = outcome.statistics;
        assert_eq!((ram.total, ram.normal, ram.duplicate), (0, 0, 0), "{capability}");
        assert!(stopped_at.is_some() && outcome.written < 20_000, "{} bytes", outcome.written);
        assert!(pair.destination.contents().iter().flatten().all(|byte| *byte == 0), "{capability}");
        // It was stopped before it could do anything.
        assert!(pair.source.contents() == before);
    }
}

/// Whatever a source sends is not written where its own guest still runs.
#[test]
fn memory_that_is_the_sources_is_never_written_to() {
    let pair = modes(Mode::Normal, Mode::CprTransfer);
    let outcome = pair.run(Faults::default());
    assert!(matches!(refused(&pair, outcome), LoadError::SharedSent { .. }));
    assert!(pair.destination.contents().iter().flatten().all(|byte| *byte == 0));
}

/// Otherwise it would run there without memory.
#[test]
fn a_guest_does_not_arrive_where_its_memory_is_not() {
    let pair = modes(Mode::CprTransfer, Mode::Normal);
    let outcome = pair.run(Faults::default());
    assert!(matches!(refused(&pair, outcome), LoadError::NoMemory));
}

#[test]
fn a_guest_whose_memory_was_passed_stays_where_the_stream_is_cut() {
    for cut_at in [0, 100, 200] {
        let pair = modes(Mode::CprTransfer, Mode::CprTransfer);
        let outcome = pair.run(Faults { cut_at: Some(cut_at), ..Faults::default() });
        pair.assert_stayed(&outcome);
    }
}
