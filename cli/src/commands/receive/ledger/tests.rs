use super::*;
use qevm_multifd::Uuid;
use qevm_wire::CountedString;

const SOON: Duration = Duration::from_millis(20);

fn ledger(expected: Option<u8>) -> Ledger {
    let ledger = Ledger::new("tcp:here:1".into(), expected);
    ledger.block(RamBlock::new(CountedString::new(b"mem").unwrap(), 0x10000));
    ledger
}

fn open(ledger: &Ledger, number: u8) {
    ledger.admit(&Init::new(Uuid::default(), number)).unwrap();
}

fn sync(ledger: &Ledger, number: u8, syncs: u64) {
    ledger.channel_sync(number, Delivered { syncs, ..Delivered::default() });
}

#[test]
fn a_plain_migration_waits_for_nobody() {
    for expected in [None, Some(0)] {
        let ledger = ledger(expected);
        ledger.main_page();
        ledger.eos();
        let started = Instant::now();
        assert_eq!(ledger.settle(Duration::from_secs(1000)), None);
        assert!(started.elapsed() < DOUBT);
        ledger.fail(Failure::mismatch("a channel", 0, "", "too late to matter"));
        assert_eq!((ledger.failure(), ledger.phase()), (None, Phase::Settled));
    }
}

#[test]
fn all_is_there_when_every_channel_has_brought_what_was_announced() {
    for per_round in [false, true] {
        let ledger = ledger(Some(2));
        open(&ledger, 1);
        open(&ledger, 0);
        ledger.eos();
        if per_round {
            ledger.flush();
            ledger.eos(); // means nothing
        }
        sync(&ledger, 0, 1);
        assert!(ledger.settle(SOON).is_some_and(|f| f.message.contains("channel 1 brought 0")), "{per_round}");
    }
    let ledger = ledger(Some(1));
    open(&ledger, 0);
    ledger.flush();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(SOON);
            sync(&ledger, 0, 1);
        });
        assert_eq!(ledger.settle(Duration::from_secs(20)), None);
    });
}

/// A source that is not asked for its number of channels can be done before its last channel was accepted: what
/// tells of it are the packet numbers, and, if it is the only one, that no page has come.
#[test]
fn a_channel_that_nobody_announced_is_waited_for() {
    let numbers = |range| Delivered { syncs: 1, numbers: 3, range: Some(range) };
    let second = ledger(None);
    open(&second, 0);
    second.flush();
    second.channel_sync(0, numbers((0, 4)));
    let only = ledger(None);
    only.eos();
    for (ledger, number) in [(&second, 1), (&only, 0)] {
        std::thread::scope(|scope| {
            let settled = scope.spawn(|| ledger.settle(Duration::from_secs(20)));
            std::thread::sleep(SOON);
            assert!(!settled.is_finished());
            open(ledger, number);
            ledger.channel_sync(number, numbers((1, 3)));
            assert_eq!(settled.join().unwrap(), None);
        });
    }
    let never = ledger(None);
    open(&never, 0);
    never.flush();
    never.channel_sync(0, numbers((0, 4)));
    assert!(never.settle(SOON).is_some_and(|f| f.message.contains("a channel is missing")));
}

#[test]
fn a_channel_that_ended_is_not_waited_for() {
    let ledger = ledger(None);
    open(&ledger, 0);
    ledger.flush();
    ledger.channel_ended(0);
    assert!(ledger.settle(Duration::from_secs(1000)).is_some());
}

#[test]
fn a_wrong_number_of_channels_is_a_failure() {
    let few = ledger(Some(2));
    open(&few, 0);
    few.check_missing(Duration::ZERO);
    assert_eq!(few.failure(), None, "the main channel does not wait yet");
    few.flush();
    std::thread::sleep(SOON);
    few.check_missing(SOON / 2);
    assert!(few.failure().is_some_and(|f| f.message.starts_with("1 of 2")));

    let unexpected = ledger(Some(0));
    unexpected.flush();
    unexpected.check_missing(Duration::from_secs(1000));
    assert!(unexpected.failure().is_some_and(|f| f.message.contains("none is expected")));
    let gap = ledger(None);
    open(&gap, 1);
    assert!(gap.settle(SOON).is_some());
    let silent = ledger(None);
    silent.flush();
    assert!(silent.settle(SOON).is_some());
}

/// A channel that was turned away was a stranger's if the migration is whole without it.
#[test]
fn a_refused_channel_ends_only_a_migration_that_lacks_it() {
    for (expected, number, reason) in [(Some(1), 1, "multifd-channels is 1"), (None, 0, "second connection")] {
        let whole = ledger(expected);
        open(&whole, 0);
        let refused = whole.admit(&Init::new(Uuid::default(), number)).unwrap_err();
        assert!(refused.contains(reason), "{refused}");
        assert!(whole.admit(&Init::new(Uuid([1; 16]), 0)).is_err());
        whole.flush();
        whole.channel_sync(0, Delivered { syncs: 1, numbers: 2, range: Some((0, 1)) });
        assert_eq!(whole.settle(SOON), None);

        let lacking = ledger(expected);
        open(&lacking, 0);
        lacking.admit(&Init::new(Uuid::default(), number)).unwrap_err();
        lacking.flush();
        lacking.channel_sync(0, Delivered { syncs: 1, numbers: 2, range: Some((0, 3)) });
        assert!(lacking.settle(SOON).is_some_and(|f| f.message.contains(reason)));
    }
    for pages in [false, true] {
        let ledger = ledger(Some(0));
        ledger.admit(&Init::new(Uuid::default(), 0)).unwrap_err();
        ledger.eos();
        if pages {
            ledger.main_page();
        }
        assert_eq!(ledger.settle(Duration::from_secs(1000)).is_none(), pages);
    }
}

#[test]
fn a_channel_that_left_before_the_migration_leaves_its_number() {
    let ledger = ledger(None);
    open(&ledger, 0);
    ledger.forget(0);
    open(&ledger, 0);
}

#[test]
fn a_failure_wakes_who_waits() {
    let ledger = ledger(Some(1));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| ledger.settle(Duration::from_secs(1000)));
        ledger.fail(Failure::mismatch("main", 0, "", "broken"));
        assert!(waiting.join().unwrap().is_some());
    });
}
