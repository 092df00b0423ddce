//! The rule plays against vCPUs of every kind: from 10 MiB/s to 2 GiB/s, constant, bursty and changing, under limits
//! from 1 to 100 MiB/s, on a host that is late now and then.

use super::MIB;
use super::bucket::{Bucket, Measured, SHORTEST_PAUSE, SOONEST};
use crate::memory::PAGE_SIZE;
use std::time::Duration;

const SPEEDS: [f64; 6] = [10.0, 30.0, 100.0, 300.0, 800.0, 2048.0];
const LIMITS: [u64; 5] = [1, 3, 10, 30, 100];
/// Entries of the ring, milliseconds of a period, and whether the host is busy.
const HOSTS: [(u64, u64, bool); 4] = [(1024, 200, false), (65536, 1000, false), (1024, 1000, true), (65536, 200, true)];
/// Simulated times.
const LONG: f64 = 15.0;
const LONGER: f64 = 50.0;

/// How late threads are.
struct Host {
    seed: u64,
    /// Whether they are late at all.
    busy: bool,
}

impl Host {
    /// Seconds: at most 0.2 ms, one time in a hundred 20 ms.
    fn delay(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = (self.seed >> 40) as f64 / (1_u64 << 24) as f64;
        match self.busy {
            false => 0.0,
            true if random > 0.99 => 0.020,
            true => random * 0.0002,
        }
    }
}

/// A vCPU under a limit, in seconds and MiB.
struct Play {
    limit: u64,
    period: f64,
    bucket: Bucket,
    ring: f64,
    now: f64,
    written: f64,
    /// When the ring was last emptied.
    harvested: f64,
    /// When the other thread looks next.
    look: f64,
    host: Host,
    pauses: Vec<f64>,
    /// Time and what was written by then: when each pause was over, or after a look without one.
    course: Vec<(f64, f64)>,
    /// The most that was written from one look to the next.
    most: f64,
    measured: Vec<Measured>,
}

impl Play {
    fn new(limit: u64, period_ms: u64, ring: u64, busy: bool) -> Play {
        let period = Duration::from_millis(period_ms);
        Play {
            limit,
            period: period.as_secs_f64(),
            bucket: Bucket::new(limit, period, Duration::ZERO, 0),
            ring: (ring * PAGE_SIZE) as f64 / MIB,
            now: 0.0,
            written: 0.0,
            harvested: 0.0,
            look: SOONEST.as_secs_f64(),
            host: Host { seed: limit * ring + period_ms, busy },
            pauses: Vec::new(),
            course: vec![(0.0, 0.0)],
            most: 0.0,
            measured: Vec::new(),
        }
    }

    /// Up to a time, and to the end of the pause that it falls into.
    fn run(&mut self, until: f64, speed: impl Fn(f64) -> f64) {
        // The vCPU looks by itself when its pause is over.
        let mut paused = false;
        while self.now < until || paused {
            let before = self.written;
            let rate = speed(self.now);
            // Until the thread looks, or the ring is full.
            let fills =
                if rate > 0.0 { self.now + (self.harvested + self.ring - self.written) / rate } else { f64::MAX };
            let full = fills <= self.look;
            let next = fills.min(self.look).max(self.now);
            self.written += rate * (next - self.now);
            self.now = next;
            if full {
                self.harvested = self.written;
            }
            let pages = (self.written * MIB / PAGE_SIZE as f64 + 1e-6) as u64;
            let verdict = self.bucket.look(Duration::from_secs_f64(self.now), pages);
            paused = verdict.pause_until.is_some();
            self.look = match verdict.pause_until.map(|end| end.as_secs_f64()) {
                Some(end) => {
                    // It leaves the guest at once only when the ring is full.
                    let leaves = if full { 0.0 } else { self.host.delay() };
                    let leaves = leaves.min((self.harvested + self.ring - self.written) / rate.max(1.0)).max(0.0);
                    self.written += rate * leaves;
                    let end = end.max(self.now + leaves) + self.host.delay();
                    self.pauses.push(end - self.now);
                    self.now = end;
                    end
                }
                None => {
                    let measured = self.bucket.measured();
                    if self.measured.last().is_none_or(|last| last.rate != measured.rate) && measured.rate > 0.0 {
                        self.measured.push(measured);
                    }
                    verdict.look_at.as_secs_f64() + self.host.delay()
                }
            };
            self.most = self.most.max(self.written - before);
            self.course.push((self.now, self.written));
        }
    }

    /// The most that was written in any stretch beyond what the limit allows in it.
    fn excess(&self) -> f64 {
        let (mut least, mut excess) = (0.0_f64, 0.0_f64);
        for (time, written) in &self.course {
            let beyond = written - self.limit as f64 * time;
            excess = excess.max(beyond - least);
            least = least.min(beyond);
        }
        excess
    }

    /// What the rule promises of every stretch.
    fn assert_limited(&self, what: &str) {
        let allowed = self.limit as f64 * (self.period + SHORTEST_PAUSE.as_secs_f64()) + self.most * 2.0 + 0.01;
        assert!(self.excess() <= allowed, "{what}: {} MiB beyond the limit, {allowed} allowed", self.excess());
    }

    /// MiB per second from the end of a pause on.
    fn rate_since(&self, from: f64) -> f64 {
        let (time, written) = self.course.iter().find(|(time, _)| *time >= from).expect("it played that long");
        (self.written - written) / (self.now - time)
    }
}

/// Every combination, on an idle and on a busy host.
fn each(mut test: impl FnMut(&str, f64, u64, &mut dyn FnMut() -> Play)) {
    for speed in SPEEDS {
        for limit in LIMITS {
            for (ring, period, busy) in HOSTS {
                let what = format!("{speed} MiB/s, limit {limit}, ring {ring}, period {period}, busy {busy}");
                test(&what, speed, limit, &mut || Play::new(limit, period, ring, busy));
            }
        }
    }
}

/// After the first second, which has a period's credit to spend, the long-run rate is the limit to 5 per cent.
#[test]
fn a_constant_vcpu_writes_as_much_as_it_may() {
    each(|what, speed, limit, new| {
        let mut play = new();
        play.run(LONGER, |_| speed);
        play.assert_limited(what);
        if speed <= limit as f64 {
            assert!(play.pauses.is_empty(), "{what}: it is slowed down: {:?}", &play.pauses[..1]);
            assert!((play.written / (speed * play.now) - 1.0).abs() < 1e-6, "{what}");
            return;
        }
        let rate = play.rate_since(5.0) / limit as f64;
        assert!((0.95..1.05).contains(&rate), "{what}: {rate} of the limit");
    });
}

/// Rates as they are told, and pauses, come to one value and stay there.
#[test]
fn nothing_swings() {
    each(|what, speed, limit, new| {
        if speed <= limit as f64 {
            return;
        }
        let mut play = new();
        play.run(LONGER, |_| speed);
        // A host that is late makes pauses of half a minute out of a limit of 1 MiB/s.
        assert!(play.measured.len() >= 2 || play.host.busy, "{what}: {:?}", play.measured);
        for measured in play.measured.iter().skip(1) {
            let rate = measured.rate / MIB / limit as f64;
            assert!((0.75..1.25).contains(&rate), "{what}: it tells of {rate} of the limit: {:?}", play.measured);
            assert!(measured.slowed, "{what}");
            let told = measured.speed / MIB / speed;
            assert!(play.host.busy || (0.9..1.1).contains(&told), "{what}: a speed of {told} of the true one");
        }
        if !play.host.busy {
            // What it writes from one look to the next, and no more, is paid for at once.
            let most = SHORTEST_PAUSE.as_secs_f64() + SOONEST.as_secs_f64() * speed / limit as f64 + 1e-3;
            let longest = play.pauses[1..].iter().copied().fold(0.0, f64::max);
            assert!(longest <= most, "{what}: a pause of {longest} s, {most} expected");
        }
    });
}

/// A tenth of a second in each second.
#[test]
fn a_bursty_vcpu_is_slowed_down_when_it_writes_too_much_and_only_then() {
    each(|what, speed, limit, new| {
        let mut play = new();
        play.run(LONG, |now| if now.fract() < 0.1 { speed } else { 0.0 });
        play.assert_limited(what);
        // A burst, or half of one, is what a period may hold.
        let mean = speed * 0.1;
        if mean < 0.95 * limit as f64 * play.period && !play.host.busy {
            assert!(play.pauses.is_empty(), "{what}: {:?}", play.pauses);
        }
        assert!(play.written <= limit as f64 * (LONG + play.period) * 1.05 + play.most, "{what}: {}", play.written);
    });
}

/// Five seconds as fast as it can, five at half of the limit, and again.
#[test]
fn a_vcpu_that_becomes_slow_by_itself_is_let_alone_when_it_has_paid() {
    each(|what, speed, limit, new| {
        let mut play = new();
        for _ in 0..4 {
            let start = play.now;
            play.run(start + 5.0, |_| speed);
            let pauses = play.pauses.len();
            play.run(play.now + 5.0, |_| limit as f64 / 2.0);
            // What it wrote between the last look and the change is paid for.
            let late = play.pauses.len() - pauses;
            assert!(late <= 1, "{what}: {late} pauses of a slow vCPU");
            if speed > 2.0 * limit as f64 {
                assert!(pauses > 0, "{what}");
            }
        }
        play.assert_limited(what);
    });
}

/// A new limit holds from then on, also for what is owed.
#[test]
fn a_limit_that_changes_holds_at_once() {
    let mut play = Play::new(1, 200, 65536, false);
    play.run(10.0, |_| 2048.0);
    let owed = play.bucket.look(Duration::from_secs_f64(play.now + 0.001), (play.written * 256.0) as u64 + 256);
    play.bucket.set_limit(100);
    let now = Duration::from_secs_f64(play.now + 0.001);
    let pays = play.bucket.look(now, (play.written * 256.0) as u64 + 256);
    let (owed, pays) = (owed.pause_until.unwrap() - now, pays.pause_until.map_or(Duration::ZERO, |end| end - now));
    assert!(owed > Duration::from_millis(900) && pays < Duration::from_millis(15), "{owed:?}, then {pays:?}");
    play.limit = 100;
    play.written += 1.0;
    let since = play.now + 1.0;
    play.run(20.0, |_| 2048.0);
    let rate = play.rate_since(since);
    assert!((95.0..105.0).contains(&rate), "{rate}");
}

/// Looks that come twice, late, or before the last one change nothing; more was never written than is paid for.
#[test]
fn looks_may_come_at_any_time() {
    let mut bucket = Bucket::new(1, Duration::from_secs(1), Duration::from_secs(5), 100);
    let at = |millis: u64| Duration::from_millis(5000 + millis);
    // 2 MiB, of which one was credit; what was gained meanwhile goes off.
    let verdict = bucket.look(at(100), 100 + 512);
    assert_eq!(verdict.pause_until, Some(at(1100)));
    assert_eq!(bucket.look(at(100), 100 + 512), verdict);
    assert_eq!(bucket.look(at(50), 100), verdict);
    assert_eq!(bucket.look(at(600), 100 + 512), verdict);
    assert_eq!(bucket.look(at(1100), 100 + 512).pause_until, None);
    // A vCPU that left late pays for that too.
    let verdict = bucket.look(at(1200), 100 + 512 + 256);
    assert_eq!(verdict.pause_until, Some(at(2100)));
}
