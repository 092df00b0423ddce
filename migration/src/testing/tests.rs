//! What the simulator finds, and what it does not.

use super::*;
use std::{collections::HashMap, time::Duration};

/// Migrations of `make test`; the target `simulate` runs a million.
const RUNS: u64 = 10_000;

fn runs() -> u64 {
    std::env::var("QEVM_SIMULATED_MIGRATIONS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(RUNS)
}

#[test]
fn simulated_migrations_keep_every_promise() {
    let mut endings: HashMap<(Option<&str>, Ending), u64> = HashMap::new();
    for seed in 0..runs() {
        let plan = Plan::of(seed);
        let ending = migrate(&plan).unwrap_or_else(|violation| panic!("{violation}: {plan:?}"));
        let fault = plan.fault.map(|(_, fault)| match fault {
            Fault::Cut(_) => "cut",
            Fault::Flip(..) => "flip",
            Fault::Stall(..) => "stall",
        });
        *endings.entry((fault, ending)).or_default() += 1;
    }
    // The faults hit: each of them ends migrations, and none ends all. Most flips hit the content of a page, which nothing protects.
    let count = |fault, ending| endings.get(&(fault, ending)).copied().unwrap_or(0);
    for (fault, least) in [("cut", runs() / 100), ("flip", runs() / 1000), ("stall", runs() / 100)] {
        let (moved, stayed) = (count(Some(fault), Ending::Moved), count(Some(fault), Ending::Stayed));
        assert!(moved > least && stayed > least, "{fault}: {endings:?}");
    }
    assert!(count(Some("cut"), Ending::Paused) + count(Some("stall"), Ending::Paused) > 0, "{endings:?}");
}

/// How many of so many plans find a planted mistake, without any fault of the links.
fn found(plant: Plant, channels: u8, violation: impl Fn(&Violation) -> bool) -> usize {
    let plan = |seed| Plan { plant, channels, fault: None, ..Plan::of(seed) };
    (0..200).filter(|seed| migrate(&plan(*seed)).is_err_and(|found| violation(&found))).count()
}

#[test]
fn a_destination_without_a_barrier_is_found() {
    let stale =
        |violation: &Violation| matches!(violation, Violation::EarlyShut { page: Some(_) } | Violation::Stale { .. });
    let count = found(Plant::NoBarrier, 3, stale);
    assert!(count > 20, "{count}");
}

#[test]
fn a_last_word_before_the_last_page_is_found() {
    let count = found(Plant::EarlyShut, 0, |violation| matches!(violation, Violation::EarlyShut { .. }));
    assert!(count > 150, "{count}");
}

#[test]
fn a_page_that_is_read_before_its_log_is_reset_is_found() {
    let stale =
        |violation: &Violation| matches!(violation, Violation::EarlyShut { page: Some(_) } | Violation::Stale { .. });
    for channels in [0, 2] {
        let count = found(Plant::ReadBeforeReset, channels, stale);
        assert!(count > 20, "{channels} page channels: {count}");
    }
}

#[test]
fn a_seed_decides_everything() {
    for seed in [1, 7, 4711] {
        let plan = Plan { delay: Duration::from_millis(3), ..Plan::of(seed) };
        assert_eq!(migrate(&plan), migrate(&plan));
    }
}
