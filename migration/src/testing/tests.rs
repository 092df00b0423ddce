//! What the simulator finds, and what it does not.

use super::simulation::Simulation;
use super::*;
use std::collections::HashMap;
use std::time::Duration;

/// Migrations of `make test`; the target `simulate` runs a million.
const RUNS: u64 = 10_000;

fn runs() -> u64 {
    std::env::var("QEVM_SIMULATED_MIGRATIONS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(RUNS)
}

#[test]
fn simulated_migrations_keep_every_promise() {
    let mut endings: HashMap<(&str, Ending), u64> = HashMap::new();
    for seed in 0..runs() {
        let plan = Plan::of(seed);
        let ending = migrate(&plan).unwrap_or_else(|violation| panic!("{violation}: {plan:?}"));
        let trouble = match (&plan.faults[..], plan.cancel) {
            ([], None) if plan.postcopy.is_some() => "postcopy",
            (_, None) if plan.postcopy.is_some() => "broken postcopy",
            ([], None) => "none",
            ([], Some(_)) => "cancelled",
            ([(_, Fault::Cut(_))], None) => "cut",
            ([(_, Fault::Flip(..))], None) => "flip",
            ([(_, Fault::Stall(..))], None) => "stall",
            _ => "several",
        };
        *endings.entry((trouble, ending)).or_default() += 1;
    }
    // The troubles matter: each of them ends migrations, and none ends all. Most flips hit the content of a page, which
    // nothing protects.
    let count = |trouble, ending| endings.get(&(trouble, ending)).copied().unwrap_or(0);
    for (trouble, least) in [("cut", 200), ("flip", 2000), ("stall", 200), ("cancelled", 200), ("several", 100)] {
        let (moved, stayed) = (count(trouble, Ending::Moved), count(trouble, Ending::Stayed));
        assert!(moved > runs() / least && stayed > runs() / least, "{trouble}: {endings:?}");
    }
    assert!(count("none", Ending::Moved) > runs() / 10, "{endings:?}");
    assert!(count("cut", Ending::Paused) + count("stall", Ending::Paused) > 0, "{endings:?}");
}

/// How many of this many plans find a planted mistake.
fn found(plan: impl Fn(u64) -> Plan, violation: impl Fn(&Violation) -> bool) -> usize {
    (0..200).filter(|seed| migrate(&plan(*seed)).is_err_and(|found| violation(&found))).count()
}

/// A migration in which nothing goes wrong but what is planted.
fn quiet(plant: Plant, channels: u8) -> impl Fn(u64) -> Plan {
    let (delay, work) = (Duration::from_micros(2000), Duration::from_micros(200));
    move |seed| {
        let plan = Plan::of(seed);
        let return_path = channels > 0 || plan.return_path;
        Plan {
            plant,
            channels,
            return_path,
            postcopy: None,
            release: false,
            faults: Vec::new(),
            cancel: None,
            pause: None,
            delay,
            work,
            ..plan
        }
    }
}

fn is_stale(violation: &Violation) -> bool {
    matches!(violation, Violation::Stale { .. })
        || matches!(violation, Violation::EarlyShut { pages } if !pages.is_empty())
}

#[test]
fn a_destination_without_a_barrier_is_found() {
    let count = found(quiet(Plant::NoBarrier, 3), is_stale);
    assert!(count > 20, "{count}");
}

#[test]
fn a_last_word_before_the_last_page_is_found() {
    let plan = |seed| Plan { return_path: true, ..quiet(Plant::EarlyShut, 0)(seed) };
    let count = found(plan, |violation| matches!(violation, Violation::EarlyShut { .. }));
    assert!(count > 150, "{count}");
}

#[test]
fn a_page_that_is_read_before_its_log_is_reset_is_found() {
    for channels in [0, 2] {
        let count = found(quiet(Plant::ReadBeforeReset, channels), is_stale);
        assert!(count > 20, "{channels} page channels: {count}");
    }
}

#[test]
fn a_log_that_is_not_read_after_the_pause_is_found() {
    for channels in [0, 2] {
        let count = found(quiet(Plant::NoLastReading, channels), is_stale);
        assert!(count > 20, "{channels} page channels: {count}");
    }
}

/// A postcopy in which nothing goes wrong but what is planted.
fn early(plant: Plant) -> impl Fn(u64) -> Plan {
    move |seed| Plan {
        return_path: true,
        postcopy: Some(Duration::from_micros(seed * 37)),
        bandwidth: 2_000_000,
        ..quiet(plant, 0)(seed)
    }
}

#[test]
fn old_pages_that_are_kept_are_found() {
    assert_eq!(found(early(Plant::Nothing), |_| true), 0);
    let count = found(early(Plant::NoDiscard), is_stale);
    assert!(count > 20, "{count}");
}

/// A postcopy whose connections break, and that goes on each time.
fn interrupted(plant: Plant) -> impl Fn(u64) -> Plan {
    move |seed| Plan {
        blocks: vec![60, 3],
        bandwidth: 1_000_000,
        postcopy: Some(Duration::from_micros(2500)),
        faults: vec![(0, Fault::Cut(50_000 + seed * 900))],
        recoveries: vec![vec![(0, Fault::Cut(seed * 37))], vec![(1, Fault::Cut(seed))], Vec::new(), Vec::new()],
        ..early(plant)(seed)
    }
}

#[test]
fn pages_that_were_sent_and_have_not_come_are_found() {
    assert_eq!(found(interrupted(Plant::Nothing), |_| true), 0);
    let count = found(interrupted(Plant::Assumes), is_stale);
    assert!(count > 20, "{count}");
}

/// A postcopy from a source that gives back what the destination has, whose connection may break.
fn released(plant: Plant) -> impl Fn(u64) -> Plan {
    move |seed| Plan {
        release: true,
        faults: vec![(0, Fault::Cut(20_000 + seed * 900))],
        recoveries: Vec::new(),
        ..interrupted(plant)(seed)
    }
}

#[test]
fn memory_that_is_given_back_too_early_is_found() {
    assert_eq!(found(released(Plant::Nothing), |_| true), 0);
    let count = found(released(Plant::ReleasesEarly), |violation| *violation == Violation::Released);
    assert!(count > 20, "{count}");
}

/// A migration whose return path breaks somewhere.
fn cut_off(plant: Plant, confirmed: bool) -> impl Fn(u64) -> Plan {
    move |seed| {
        let faults = vec![(1, Fault::Cut(20 + seed % 20))];
        Plan { return_path: true, confirmed, faults, ..quiet(plant, 0)(seed) }
    }
}

#[test]
fn a_source_that_goes_on_though_the_guest_may_have_gone_is_found() {
    let count = found(cut_off(Plant::GoesOn, false), |violation| *violation == Violation::TwoGuests);
    assert!(count > 20, "{count}");
}

#[test]
fn a_guest_that_neither_side_has_is_found() {
    // The confirmation is the last that is sent on the main channel, and gets lost.
    let plan = |seed| {
        let plan = Plan { return_path: true, confirmed: true, ..quiet(Plant::Silent, 0)(seed) };
        let mut whole = Simulation::new(&plan).unwrap();
        whole.run().unwrap();
        Plan { faults: vec![(0, Fault::Cut(whole.links[0].sent() - 1 - seed % 9))], ..plan }
    };
    let count = found(plan, |violation| matches!(violation, Violation::Lost { .. }));
    assert!(count > 20, "{count}");
}

#[test]
fn a_seed_decides_everything() {
    for seed in [1, 7, 4711] {
        let plan = Plan { delay: Duration::from_millis(3), ..Plan::of(seed) };
        assert_eq!(migrate(&plan), migrate(&plan));
    }
}
