use super::*;
use qevm_multifd::Uuid;
use qevm_wire::CountedString;

const SOON: Duration = Duration::from_millis(20);

fn ledger(expected: Option<u8>) -> Ledger {
    let ledger = Ledger::new("tcp:here:1".into(), expected);
    ledger.configured(None);
    ledger.block(RamBlock::new(CountedString::new(b"mem").unwrap(), 0x10000));
    ledger
}

fn open(ledger: &Ledger, number: u8) {
    ledger.admit(&Init::new(Uuid::default(), number)).unwrap();
}

/// This many packets, with these numbers, and a SYNC.
fn numbers(used: u64, range: (u64, u64)) -> Numbers {
    Numbers { used, range: Some(range) }
}

fn sync(ledger: &Ledger, number: u8) {
    ledger.channel_sync(number, Numbers::default()).unwrap();
}

#[test]
fn a_plain_migration_waits_for_no_channel() {
    for expected in [None, Some(0)] {
        let ledger = ledger(expected);
        ledger.main_page();
        ledger.eos();
        ledger.wait();
        ledger.end_of_memory();
        let started = Instant::now();
        assert_eq!(ledger.settle(Duration::from_secs(1000)), None);
        assert!(started.elapsed() < DOUBT);
        ledger.fail(Failure::mismatch("a channel", 0, "", "too late to matter"));
        assert_eq!((ledger.failure(), ledger.phase()), (None, Phase::Settled));
    }
}

/// Whether the channels are counted before or come as they come.
#[test]
fn the_main_channel_and_the_page_channels_wait_for_each_other() {
    for (expected, per_round) in [(Some(2), false), (Some(2), true), (None, false), (None, true)] {
        let ledger = ledger(expected);
        open(&ledger, 1);
        open(&ledger, 0);
        sync(&ledger, 0);
        assert!(ledger.channel_waits(0) && !ledger.channel_waits(1) && ledger.awaited().is_none());
        if per_round {
            ledger.flush();
        } else {
            ledger.eos();
        }
        assert_eq!(ledger.awaited().unwrap(), "the main channel waits for a SYNC packet on channel 1");
        std::thread::scope(|scope| {
            let main = scope.spawn(|| ledger.wait());
            sync(&ledger, 1);
            main.join().unwrap();
        });
        assert!(!ledger.channel_waits(0) && ledger.awaited().is_none());
        if per_round {
            ledger.eos(); // means nothing
            ledger.wait();
        }
        ledger.end_of_memory();
        assert_eq!(ledger.settle(SOON), None);
    }
}

/// A source that is not asked for its number of channels can be done before its last channel was accepted: what
/// tells of it are the packet numbers, and, if it is the only one, that no page has come.
#[test]
fn a_channel_that_was_not_announced_is_waited_for() {
    let second = ledger(None);
    open(&second, 0);
    second.channel_sync(0, numbers(3, (0, 4))).unwrap();
    second.flush();
    let only = ledger(None);
    only.eos();
    for (ledger, number) in [(&second, 1), (&only, 0)] {
        ledger.wait();
        ledger.end_of_memory();
        std::thread::scope(|scope| {
            let settled = scope.spawn(|| ledger.settle(Duration::from_secs(20)));
            std::thread::sleep(SOON);
            assert!(!settled.is_finished());
            open(ledger, number);
            std::thread::sleep(SOON);
            assert!(!settled.is_finished(), "its SYNC packet has not come");
            ledger.channel_sync(number, numbers(3, (1, 3))).unwrap();
            assert_eq!(settled.join().unwrap(), None);
        });
    }
    let never = ledger(None);
    open(&never, 0);
    never.channel_sync(0, numbers(3, (0, 4))).unwrap();
    never.flush();
    never.end_of_memory();
    assert!(never.settle(SOON).is_some_and(|f| f.message.contains("a channel is missing")));
    let cut = ledger(None);
    cut.eos();
    cut.end_of_memory();
    open(&cut, 0);
    assert!(cut.settle(SOON).is_some_and(|f| f.message.contains("a SYNC packet on channel 0")));
}

#[test]
fn a_channel_that_ended_is_not_waited_for() {
    let ledger = ledger(None);
    open(&ledger, 0);
    ledger.channel_ended(0).unwrap();
    ledger.flush();
    ledger.wait();
    let failure = ledger.settle(Duration::from_secs(1000)).unwrap();
    assert_eq!(failure.kind, "truncated");
    assert!(failure.message.contains("channel 0 ended before its SYNC packet"), "{failure}");
}

#[test]
fn more_sync_packets_than_the_main_channel_announced_are_a_failure() {
    let ledger = ledger(Some(1));
    open(&ledger, 0);
    sync(&ledger, 0);
    ledger.end_of_memory();
    assert!(ledger.failure().is_some_and(|f| f.kind == "malformed" && f.message.contains("SYNC packet 0")));
}

#[test]
fn a_wrong_number_of_channels_is_a_failure() {
    let few = ledger(Some(2));
    open(&few, 0);
    few.check_missing(Duration::ZERO, true);
    assert_eq!(few.failure(), None, "the main channel does not wait yet");
    few.flush();
    few.check_missing(Duration::from_secs(1000), false);
    assert_eq!(few.failure(), None, "it does not wait that long");
    few.check_missing(Duration::from_secs(1000), true);
    assert!(few.failure().is_some_and(|f| f.message.starts_with("1 of 2")));
    few.wait();

    let unexpected = ledger(Some(0));
    unexpected.flush();
    unexpected.check_missing(Duration::from_secs(1000), false);
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
        whole.channel_sync(0, numbers(2, (0, 1))).unwrap();
        whole.end_of_memory();
        assert_eq!(whole.settle(SOON), None);

        let lacking = ledger(expected);
        open(&lacking, 0);
        lacking.admit(&Init::new(Uuid::default(), number)).unwrap_err();
        lacking.flush();
        lacking.channel_sync(0, numbers(2, (0, 3))).unwrap();
        lacking.end_of_memory();
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
    let ledger = Ledger::new("tcp:here:1".into(), None);
    open(&ledger, 0);
    ledger.forget(0);
    open(&ledger, 0);
}

#[test]
fn a_failure_wakes_a_reader_that_waits() {
    let ledger = ledger(Some(1));
    std::thread::scope(|scope| {
        ledger.flush();
        let main = scope.spawn(|| ledger.wait());
        let waiting = scope.spawn(|| ledger.settle(Duration::from_secs(1000)));
        ledger.fail(Failure::mismatch("main", 0, "", "broken"));
        main.join().unwrap();
        assert!(waiting.join().unwrap().is_some());
    });
}
