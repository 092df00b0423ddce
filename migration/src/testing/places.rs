//! One migration, with something going wrong at each of its places.

use super::simulation::Simulation;
use super::*;
use crate::MigrationError;
use std::time::Duration;

/// Bytes of the confirmation after the end of the stream: a command with a 32-bit value.
const CONFIRMATION: u64 = 9;
/// Bytes of a PONG and of SHUT.
const MESSAGE: u64 = 8;

/// Most bytes of a description here.
const DESCRIPTION: u64 = 200;

/// A migration of 40 pages, on the main channel or on page channels, in which nothing goes wrong.
fn plan(channels: u8, return_path: bool) -> Plan {
    Plan {
        blocks: vec![40, 3],
        channels,
        return_path,
        confirmed: true,
        switchover_ack: false,
        delay: Duration::from_millis(2),
        bandwidth: 0,
        downtime: Duration::from_millis(300),
        work: Duration::from_micros(200),
        pause: None,
        cancel: None,
        postcopy: None,
        faults: Vec::new(),
        ..Plan::of(1)
    }
}

/// Runs a migration to its end, and gives it with how it ended.
fn run(plan: &Plan) -> (Simulation<'_>, Ending) {
    let mut simulation = Simulation::new(plan).unwrap();
    let ended = simulation.run().and_then(|()| simulation.ending());
    let ending = ended.unwrap_or_else(|violation| panic!("{violation}: {plan:?}"));
    (simulation, ending)
}

/// With what a link carries in a whole migration, and how it ends when it is cut at one of these bytes.
fn cut(plan: &Plan, link: usize, places: impl Fn(u64) -> Vec<u64>, check: impl Fn(u64, u64, &Simulation<'_>, Ending)) {
    let (whole, ending) = run(plan);
    assert_eq!(ending, Ending::Moved);
    let total = whole.links.get(link).unwrap_or(&whole.back).sent();
    for place in places(total) {
        let plan = Plan { faults: vec![(link, Fault::Cut(place))], ..plan.clone() };
        let (simulation, ending) = run(&plan);
        check(place, total, &simulation, ending);
    }
}

/// The beginning and the end byte by byte, and some of what is between.
fn places(total: u64) -> Vec<u64> {
    (0..400).chain((400..total - 400).step_by(1009)).chain(total - 400..total + 1).collect()
}

#[test]
fn a_cut_anywhere_on_the_main_channel_leaves_the_guest_at_the_source_until_only_the_confirmation_is_missing() {
    for channels in [0, 2] {
        cut(&plan(channels, true), 0, places, |place, total, simulation, ending| {
            let expected = match place {
                _ if place + CONFIRMATION < total => Ending::Stayed,
                _ if place < total => Ending::Paused,
                _ => Ending::Moved,
            };
            // The return path breaks with the main channel, or SHUT has come by then.
            assert_eq!(ending, expected, "{place} of {total}");
            if ending == Ending::Paused {
                let result = simulation.source.result.as_ref().unwrap();
                assert!(matches!(result, Err(MigrationError::Unsettled { .. })) && simulation.receiver.undecided);
            }
        });
    }
}

#[test]
fn without_a_return_path_a_destination_that_misses_something_never_runs() {
    cut(&plan(0, false), 0, places, |place, total, simulation, ending| {
        let ended = simulation.source.ended && place < total;
        let unsettled = matches!(simulation.source.result, Some(Err(MigrationError::Unsettled { .. })));
        assert_eq!(unsettled, ended, "{place} of {total}");
        match ending {
            // Only the description after the end was cut, which no destination needs.
            Ending::Moved => assert!(place == total || (ended && total - place < DESCRIPTION), "{place} of {total}"),
            Ending::Paused => assert!(ended, "{place} of {total}"),
            Ending::Stayed => assert!(!ended, "{place} of {total}"),
            Ending::Split => panic!("{place} of {total}: there was no postcopy"),
        }
    });
}

#[test]
fn a_lost_answer_or_verdict_leaves_the_guest_at_the_source() {
    for channels in [0, 2] {
        let all = |total| (0..=total).collect();
        cut(&plan(channels, true), usize::from(channels) + 1, all, |place, total, _, ending| {
            assert_eq!(total, 3 * MESSAGE, "PONG 1, PONG AGREED, SHUT");
            assert_eq!(ending, if place < total { Ending::Stayed } else { Ending::Moved }, "{place} of {total}");
        });
    }
}

#[test]
fn a_page_channel_that_breaks_anywhere_leaves_the_guest_at_the_source() {
    for channels in [1, 3] {
        let some = |total: u64| (0..400).chain((400..total).step_by(211)).chain([total - 1, total]).collect();
        cut(&plan(channels, true), 1, some, |place, total, _, ending| {
            assert_eq!(ending, if place < total { Ending::Stayed } else { Ending::Moved }, "{place} of {total}");
        });
    }
}

#[test]
fn cancelling_at_any_moment_leaves_one_guest() {
    for (channels, pause) in [(0, None), (2, None), (0, Some(Duration::from_millis(5)))] {
        let plan = Plan { pause, ..plan(channels, true) };
        let (whole, _) = run(&plan);
        let (mut cancelled, mut late) = (0, 0);
        for moment in (0..whole.now.as_micros() as u64 + 200).step_by(50) {
            let plan = Plan { cancel: Some(Duration::from_micros(moment)), ..plan.clone() };
            let (simulation, ending) = run(&plan);
            match simulation.source.result.as_ref().unwrap() {
                Ok(()) => late += 1,
                Err(MigrationError::Cancelled) => {
                    assert_eq!(ending, Ending::Stayed, "{moment} µs");
                    cancelled += 1;
                }
                Err(error) => panic!("cancelled after {moment} µs of {:?}: {error:?}", whole.now),
            }
        }
        assert!(cancelled > 50 && late > 2, "{cancelled} were cancelled, {late} were too late");
    }
}

/// A postcopy that starts when the first pages are under way.
fn postcopy() -> Plan {
    Plan { blocks: vec![100, 3], bandwidth: 1_000_000, postcopy: Some(Duration::from_micros(2500)), ..plan(0, true) }
}

#[test]
fn a_cut_in_postcopy_leaves_the_guest_at_the_source_until_the_package_is_sent_and_then_both_sides_know() {
    let (mut stayed, mut split) = (0, 0);
    let plan = postcopy();
    for link in [0, 1] {
        let (whole, ending) = run(&plan);
        assert!(ending == Ending::Moved && whole.receiver.early.listens);
        let total = whole.links.get(link).unwrap_or(&whole.back).sent();
        for place in (0..total + 1).step_by(if total > 5000 { 97 } else { 1 }) {
            let plan = Plan { faults: vec![(link, Fault::Cut(place))], ..postcopy() };
            let (simulation, ending) = run(&plan);
            let broken = matches!(simulation.source.result, Some(Err(MigrationError::PostcopyBroken { .. })));
            match ending {
                Ending::Stayed => stayed += 1,
                Ending::Split => split += 1,
                // SHUT was lost, or came.
                Ending::Moved => assert!(link == 1 || place >= total, "{place} of {total}"),
                // The package was sent, and has not come.
                Ending::Paused => assert!(broken, "{place} of {total}"),
            }
        }
    }
    assert!(stayed > 50 && split > 50, "{stayed} {split}");
}

#[test]
fn a_postcopy_that_is_cut_anywhere_goes_on_over_the_next_connection() {
    let plan = postcopy();
    let (whole, _) = run(&plan);
    let mut again = 0;
    for link in [0, 1] {
        let total = whole.links.get(link).unwrap_or(&whole.back).sent();
        for place in (0..total).step_by(if total > 5000 { 1009 } else { 7 }) {
            let cut = Plan { faults: vec![(link, Fault::Cut(place))], ..postcopy() };
            let split = run(&cut).1 == Ending::Split;
            let cut = Plan { recoveries: vec![Vec::new()], ..cut };
            let (simulation, ending) = run(&cut);
            // The guest had gone.
            if split {
                assert_eq!(ending, Ending::Moved, "byte {place} of link {link}");
                assert!(matches!(simulation.source.result, Some(Ok(()))), "{:?}", simulation.source.result);
                again += 1;
            }
        }
    }
    assert!(again > 50, "{again}");
}

#[test]
fn a_recovery_that_is_cut_anywhere_goes_on_over_the_next_connection() {
    // In the middle of what comes after the guest.
    let plan = postcopy();
    let (whole, _) = run(&plan);
    let cut = Plan { faults: vec![(0, Fault::Cut(whole.links[0].sent() / 2))], ..postcopy() };
    assert_eq!(run(&cut).1, Ending::Split);
    let recovered = Plan { recoveries: vec![Vec::new()], ..cut.clone() };
    let (once, _) = run(&recovered);
    for (link, total) in [(0, once.links[0].sent()), (1, once.back.sent())] {
        for place in (0..total).filter(|place| *place < 60 || place % 1009 == 0) {
            let recoveries = vec![vec![(link, Fault::Cut(place))], vec![(1, Fault::Cut(place % 50))], Vec::new()];
            let plan = Plan { recoveries, ..cut.clone() };
            let (simulation, ending) = run(&plan);
            assert_eq!(ending, Ending::Moved, "byte {place} of link {link}");
            // What was lost last may be the word that all has come.
            let over = place + 8 >= total;
            assert!(
                over || matches!(simulation.source.result, Some(Ok(()))),
                "{place}: {:?}",
                simulation.source.result
            );
        }
    }
}

#[test]
fn a_page_that_the_guest_waits_for_goes_before_the_others_and_beyond_the_rate_limit() {
    let slow = |plant| Plan { blocks: vec![400, 3], plant, ..postcopy() };
    let waited = |plan: &Plan| run(plan).0.receiver.early.longest;
    let longest = waited(&slow(Plant::Nothing));
    // There and back, a piece of the rest, and a few steps.
    assert!(longest > Duration::ZERO && longest < Duration::from_millis(20), "{longest:?}");
    let unheard = waited(&slow(Plant::Deaf));
    assert!(unheard > Duration::from_millis(100), "{unheard:?}");
}

#[test]
fn a_short_stall_anywhere_ends_nothing() {
    for channels in [0, 2] {
        for link in 0..usize::from(channels) + 2 {
            for place in (0..60_000).step_by(1511).filter(|place| link <= usize::from(channels) || *place < 30_000) {
                let place = if link > usize::from(channels) { place / 1511 } else { place };
                let faults = vec![(link, Fault::Stall(place, Duration::from_secs(5)))];
                assert_eq!(run(&Plan { faults, ..plan(channels, true) }).1, Ending::Moved, "link {link}, byte {place}");
            }
        }
    }
}
