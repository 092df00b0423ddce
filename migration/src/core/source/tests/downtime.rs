//! What a pause consists of, in virtual time.

use super::{Action, Peer, Simulation};
use crate::{DowntimeParts, Statistics};
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);

/// Plays a migration in which some steps of the pause take their time.
fn parts(peer: Peer) -> (DowntimeParts, Duration) {
    let mut simulation = Simulation::new(peer, 9);
    loop {
        let action = simulation.core.poll(simulation.now, simulation.answers.as_mut());
        let costs = match &action {
            Action::End(result) => {
                assert!(result.is_ok(), "{result:?}");
                break;
            }
            Action::Pause => 7,
            Action::SaveDevices { .. } => 11,
            Action::FinishFile | Action::SyncChannels => 2,
            Action::Send { doing: "the state of the devices" } => 5,
            Action::SendEnd => 3,
            Action::Settle => 13,
            _ => 0,
        };
        // It is over when it is answered.
        simulation.pass(costs * MS);
        simulation.perform(action);
    }
    let mut statistics = Statistics::default();
    simulation.core.report(&mut statistics);
    (statistics.downtime_parts, statistics.downtime.expect("the guest was paused"))
}

#[test]
fn every_moment_of_the_pause_is_of_one_part() {
    for peer in [Peer::None, Peer::Agrees, Peer::Answers] {
        let (parts, downtime) = parts(peer);
        let DowntimeParts { stop, pre_switchover, device_state, last_round, protect, send, load, confirm } = parts;
        assert_eq!((stop, device_state), (7 * MS, 11 * MS), "{peer:?}: {parts:?}");
        // The channel takes 20 us for each of the two as well.
        let (sent, settled) = (8 * MS + Duration::from_micros(40), if peer == Peer::None { 13 } else { 0 });
        assert_eq!((send, load), (sent, settled * MS), "{peer:?}: {parts:?}");
        assert!(last_round >= Duration::from_micros(50), "{peer:?}: {parts:?}");
        assert_eq!((pre_switchover, protect, confirm), Default::default(), "{peer:?}: {parts:?}");
        assert_eq!(stop + device_state + last_round + send + load, downtime, "{peer:?}: {parts:?}");
    }
}
