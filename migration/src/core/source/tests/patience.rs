//! Who is waited for, and for how long.

use super::{Peer, Simulation, Trouble};
use crate::MigrationError;
use std::time::Duration;

#[test]
fn a_destination_that_falls_silent_is_given_up_after_the_patience() {
    for peer in [Peer::DiesBeforeTheEnd, Peer::DiesAfterTheEnd, Peer::AgreesAndDies] {
        let mut simulation = Simulation::new(peer, 7);
        let result = simulation.run(Trouble::None);
        simulation.assert_consistent(&result);
        let may_run_there = peer == Peer::DiesAfterTheEnd;
        assert_eq!(matches!(result, Err(MigrationError::Unsettled { .. })), may_run_there, "{result:?}");
        assert!(
            result.unwrap_err().to_string().contains("the destination has not answered for 30 s on the return path")
        );
        assert!(simulation.now < Duration::from_secs(40), "{:?}", simulation.now);
    }
}

#[test]
fn a_source_that_was_held_up_hears_whether_it_is_still_waited_for() {
    for (peer, leaves) in [(Peer::AgreesLate, true), (Peer::AgreesAndGivesUp, false)] {
        let mut simulation = Simulation::new(peer, 11);
        let result = simulation.run(Trouble::None);
        simulation.assert_consistent(&result);
        assert_eq!((result.is_ok(), simulation.confirmed), (leaves, leaves), "{result:?}");
        assert!(leaves || matches!(result, Err(MigrationError::NotAwaited)), "{result:?}");
    }
}
