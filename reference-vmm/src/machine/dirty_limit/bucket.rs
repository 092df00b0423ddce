//! The rule that keeps a vCPU to its limit: a token bucket. It does no I/O and asks no clock: it is told what the vCPU
//! had written to by when, and says until when the vCPU pauses.
//!
//! Credit grows with time, as fast as the limit allows, up to that of one period; what the vCPU writes is taken from
//! it. Below zero the vCPU pauses for as long as it takes to come back to zero. So
//!
//! * in any time it writes at most the limit times that time, one period's worth, and what it wrote between two looks;
//! * a vCPU that never writes more than the limit allows in a period never pauses;
//! * nothing is fed back from a measured rate, so nothing can swing; what one pause is too long or too short, the next
//!   one makes up.

use crate::memory::PAGE_SIZE;
use std::time::Duration;

pub(super) const MIB: f64 = (1 << 20) as f64;

/// The shortest time from one look to the next: it says how much a fast vCPU writes between two pauses, and so how long
/// those are.
pub(super) const SOONEST: Duration = Duration::from_millis(1);
/// The longest.
const LATEST: Duration = Duration::from_millis(10);
/// The speed, in bytes per second, that a vCPU is expected to have at most; a faster one pays for more at once.
const FAST: f64 = 2048.0 * MIB;
/// A debt that is paid sooner is not worth leaving the guest.
pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// A rate is measured over at least this many pauses.
const PAUSES: u32 = 3;

/// Keeps the account of a vCPU that has a limit. Times are from any fixed moment on.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    /// MiB per second.
    limit: u64,
    period: Duration,
    /// Bytes; negative: a debt.
    credit: f64,
    /// The last look, and the pages written to by then.
    seen: (Duration, u64),
    /// The last pause: from, until.
    pause: (Duration, Duration),
    window: Window,
    /// The window before.
    last: Option<Window>,
}

/// What was measured over some time.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    since: Duration,
    time: Duration,
    paused: Duration,
    longest_pause: Duration,
    bytes: f64,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The vCPU pauses until then.
    pub(super) pause_until: Option<Duration>,
    /// When to look again, at the latest.
    pub(super) look_at: Duration,
}

/// What was measured of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Measured {
    /// Bytes per second; 0 before it was measured.
    pub(super) rate: f64,
    /// Bytes per second of the time that it ran; 0 before it was measured.
    pub(super) speed: f64,
    /// Whether it paused of late.
    pub(super) slowed: bool,
}

impl Bucket {
    /// A limit in MiB per second, kept in every `period`, of a vCPU that has written to this many pages by `now`.
    pub(super) fn new(limit: u64, period: Duration, now: Duration, written: u64) -> Bucket {
        let mut bucket = Bucket {
            limit,
            period,
            credit: 0.0,
            seen: (now, written),
            pause: (now, now),
            window: Window { since: now, ..Window::default() },
            last: None,
        };
        bucket.credit = bucket.depth();
        bucket
    }

    /// The limit changes; a debt that there is will be paid at the new rate.
    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
        self.credit = self.credit.min(self.depth());
    }

    pub(super) fn set_period(&mut self, period: Duration) {
        self.period = period;
        self.credit = self.credit.min(self.depth());
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// In bytes per second.
    fn rate(&self) -> f64 {
        self.limit.max(1) as f64 * MIB
    }

    /// The most credit that there can be, in bytes.
    fn depth(&self) -> f64 {
        self.rate() * self.period.as_secs_f64()
    }

    /// To be told how many pages the vCPU has written to by `now`.
    pub(super) fn look(&mut self, now: Duration, written: u64) -> Verdict {
        let (before, pages) = self.seen;
        let now = now.max(before);
        let (time, bytes) = (now - before, (written.saturating_sub(pages) * PAGE_SIZE) as f64);
        self.seen = (now, pages.max(written));
        let paused = now.min(self.pause.1).saturating_sub(before);
        self.measure(now, paused, bytes);
        let rate = self.rate();
        self.credit = (self.credit + rate * time.as_secs_f64()).min(self.depth()) - bytes;
        let debt = Duration::from_secs_f64((-self.credit / rate).max(0.0));
        let pauses = now < self.pause.1;
        if debt >= SHORTEST_PAUSE || (pauses && !debt.is_zero()) {
            self.pause = (if pauses { self.pause.0 } else { now }, now + debt);
            self.window.longest_pause = self.window.longest_pause.max(self.pause.1 - self.pause.0);
            return Verdict { pause_until: Some(self.pause.1), look_at: self.pause.1 };
        }
        self.pause.1 = self.pause.1.min(now);
        self.close_window();
        let lasts = (self.credit + rate * SHORTEST_PAUSE.as_secs_f64()) / FAST;
        let next = lasts.clamp(SOONEST.as_secs_f64(), LATEST.as_secs_f64());
        Verdict { pause_until: None, look_at: now + Duration::from_secs_f64(next) }
    }

    fn measure(&mut self, now: Duration, paused: Duration, bytes: f64) {
        self.window.time = now - self.window.since;
        self.window.paused += paused;
        self.window.bytes += bytes;
    }

    /// Begins the next measurement if this one holds enough. No pause is due, so it holds pauses as a whole only.
    fn close_window(&mut self) {
        if self.window.time >= self.period.max(self.window.longest_pause * PAUSES) {
            self.last = Some(self.window);
            self.window = Window { since: self.seen.0, ..Window::default() };
        }
    }

    pub(super) fn measured(&self) -> Measured {
        let runs = [Some(self.window), self.last].into_iter().flatten().find(|w| w.time - w.paused >= SOONEST);
        Measured {
            rate: self.last.map_or(0.0, |window| window.bytes / window.time.as_secs_f64()),
            speed: runs.map_or(0.0, |window| window.bytes / (window.time - window.paused).as_secs_f64()),
            slowed: [Some(self.window), self.last].into_iter().flatten().any(|w| !w.longest_pause.is_zero()),
        }
    }
}
