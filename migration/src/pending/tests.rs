use super::*;
use crate::switchover::{Decision, Remaining, Round, Switchover, expected_downtime};

const MS: Duration = Duration::from_millis(1);
const MB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_millis(300);
const BANDWIDTH: u64 = 100 * MB;

/// A device with nothing to send while the guest runs, and that much when it has stopped, which it tells only exactly.
struct Hiding<F>(F, u64);

impl<F: Fn(Duration) -> u64> Hiding<F> {
    fn new(size: F) -> Self {
        Hiding(size, 0)
    }

    fn asked(&self) -> u64 {
        self.1
    }

    fn exact(&mut self, now: Duration) -> [DeviceSize; 1] {
        self.1 += 1;
        let exact = Some(Pending { stopcopy: (self.0)(now), ..Pending::default() });
        [DeviceSize { exact, ..DeviceSize::default() }]
    }
}

const ESTIMATES: [DeviceSize; 1] =
    [DeviceSize { estimate: Pending { precopy: 0, stopcopy: 0 }, initial: 0, exact: None }];

/// Runs rounds of 20 ms that leave 1 MB of RAM for up to `time`, and says when the guest could be stopped.
fn play<F: Fn(Duration) -> u64>(device: &mut Hiding<F>, time: Duration) -> Option<Duration> {
    let (mut account, mut switchover) = (Account::new(1), Switchover::default());
    for round in 1.. {
        let now = 20 * MS * round;
        if now > time {
            return None;
        }
        let round = |remaining| Round {
            remaining,
            took: 20 * MS,
            overhead: MS,
            bandwidth: Some(BANDWIDTH),
            switchover_bandwidth: None,
            downtime_limit: LIMIT,
        };
        let fits = |bytes| expected_downtime(MB + bytes, &round(&[])).unwrap() <= LIMIT;
        let parts = |pending: &[Pending]| {
            let stopcopy = pending[0].stopcopy;
            [Remaining::ram("ram", MB), Remaining { name: "hiding/vfio", bytes: 0, stopcopy }]
        };
        let asked = account.is_due(&ESTIMATES, now, fits);
        let pending = if asked { account.answered(&device.exact(now), now, now) } else { account.estimate(&ESTIMATES) };
        let remaining = parts(&pending);
        let mut decision = switchover.decide(&round(&remaining));
        if let (Decision::SwitchOver(reason), false) = (&decision, asked) {
            let remaining = parts(&account.answered(&device.exact(now), now, now));
            decision = switchover.confirm(*reason, &round(&remaining));
        }
        if let Decision::SwitchOver(_) = decision {
            assert!((device.0)(now) <= 30 * MB, "stopped though the device does not fit");
            return Some(now);
        }
    }
    unreachable!()
}

#[test]
fn a_device_that_fits_is_asked_once_and_the_guest_stopped() {
    let mut device = Hiding::new(|_| 5 * MB);
    assert!(play(&mut device, Duration::from_secs(5)).unwrap() < Duration::from_secs(1));
    assert_eq!(device.asked(), 1);
}

#[test]
fn a_device_that_never_shrinks_is_asked_seldom_and_the_guest_never_stopped() {
    let mut device = Hiding::new(|_| 200 * MB);
    assert_eq!(play(&mut device, Duration::from_secs(60)), None);
    assert!(device.asked() < 130, "asked {} times in 3000 rounds", device.asked());
}

#[test]
fn a_device_that_shrinks_late_is_noticed_soon() {
    for late in [Duration::from_secs(1), Duration::from_secs(30)] {
        let mut device = Hiding::new(move |now| if now < late { 200 * MB } else { 10 * MB });
        let stopped = play(&mut device, Duration::from_secs(60)).unwrap();
        assert!(stopped >= late && stopped <= late + LONGEST_WAIT + 20 * MS, "{late:?}: {stopped:?}");
        assert!(device.asked() < 80, "asked {} times", device.asked());
        assert!(stopped < late + Duration::from_secs(1));
    }
}

#[test]
fn a_device_that_shrinks_steadily_is_asked_more_often_than_one_that_does_not() {
    let mut device = Hiding::new(|now| (200 * MB) >> (now.as_secs() / 2));
    let stopped = play(&mut device, Duration::from_secs(60)).unwrap();
    // 25 MB fit from the sixth second on.
    assert!(stopped >= Duration::from_secs(6) && stopped < Duration::from_secs(8), "{stopped:?}");
}

#[test]
fn a_device_that_grows_is_not_stopped_for() {
    let mut device = Hiding::new(|now| MB * now.as_millis() as u64);
    let stopped = play(&mut device, Duration::from_secs(20));
    // At first it fits, if it is asked at once; later never more.
    assert!(stopped.is_none_or(|at| at <= 40 * MS), "{stopped:?}");
}

#[test]
fn a_device_that_is_slow_to_answer_is_asked_a_seventh_of_the_time() {
    let mut device = Hiding::new(|_| 200 * MB);
    let (mut account, mut now) = (Account::new(1), Duration::ZERO);
    while now < Duration::from_secs(80) {
        if device.asked() == 0 || account.is_due(&ESTIMATES, now, |_| true) {
            // Asking takes a second.
            let begin = now;
            now += Duration::from_secs(1);
            account.answered(&device.exact(now), begin, now);
        }
        now += 20 * MS;
    }
    assert!((11..=12).contains(&device.asked()), "{}", device.asked());
}

#[test]
fn a_device_that_takes_a_while_to_answer_is_noticed_within_a_second_too() {
    let mut device = Hiding::new(|_| 200 * MB);
    let (mut account, mut now, mut ends) = (Account::new(1), Duration::ZERO, Vec::new());
    while now < Duration::from_secs(30) {
        if device.asked() == 0 || account.is_due(&ESTIMATES, now, |_| true) {
            let begin = now;
            now += 100 * MS;
            account.answered(&device.exact(now), begin, now);
            ends.push(now);
        }
        now += 20 * MS;
    }
    // It shrinks at any moment: the next answer says so.
    assert!(ends.windows(2).all(|pair| pair[1] - pair[0] < Duration::from_secs(1)), "{ends:?}");
}

#[test]
fn what_was_hidden_counts_until_the_next_answer() {
    let mut device = Hiding::new(|_| 7);
    let mut account = Account::new(1);
    assert_eq!(account.estimate(&ESTIMATES), [Pending::default()]);
    assert!(!account.is_due(&ESTIMATES, LIMIT, |_| true), "nothing is hidden as far as is known");
    account.answered(&device.exact(Duration::ZERO), Duration::ZERO, Duration::ZERO);
    assert_eq!(account.estimate(&ESTIMATES), [Pending { precopy: 0, stopcopy: 7 }]);
    assert!(account.is_due(&ESTIMATES, LIMIT, |bytes| bytes == 0));
    assert!(!account.is_due(&ESTIMATES, LIMIT, |_| false));
    assert!(!account.is_due(&ESTIMATES, Duration::ZERO, |_| true));
}
