//! The thread that raises the clock's interrupts when their time comes.

use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Rtc;
use crate::devices::lock;

/// The host's time in ns since 1970.
pub(crate) fn wall_clock() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128)
}

/// A clock and what wakes its thread.
pub(crate) struct Clock {
    rtc: Mutex<Ticking>,
    changed: Condvar,
}

struct Ticking {
    rtc: Rtc,
    running: bool,
    gone: bool,
}

impl Clock {
    /// Starts the thread; it sleeps until the machine runs.
    pub(crate) fn start(rtc: Rtc) -> std::io::Result<(Arc<Clock>, JoinHandle<()>)> {
        let ticking = Ticking { rtc, running: false, gone: false };
        let clock = Arc::new(Clock { rtc: Mutex::new(ticking), changed: Condvar::new() });
        let weak = Arc::downgrade(&clock);
        let thread = thread::Builder::new().name("rtc".into()).spawn(move || tick(&weak))?;
        Ok((clock, thread))
    }

    /// Uses the device, after which its next event may be another one.
    pub(crate) fn with<T>(&self, use_it: impl FnOnce(&mut Rtc, i128) -> T) -> T {
        let result = use_it(&mut lock(&self.rtc).rtc, wall_clock());
        self.changed.notify_all();
        result
    }

    /// Lets interrupts come, or holds them back.
    pub(crate) fn run(&self, running: bool) {
        lock(&self.rtc).running = running;
        self.changed.notify_all();
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        lock(&self.rtc).gone = true;
        self.changed.notify_all();
    }
}

/// Longest sleep, so that a step of the host's clock does no lasting harm.
const LONGEST: Duration = Duration::from_secs(1);

fn tick(clock: &Weak<Clock>) {
    while let Some(clock) = clock.upgrade() {
        let mut ticking = lock(&clock.rtc);
        if ticking.gone {
            return;
        }
        let mut sleep = LONGEST;
        if ticking.running {
            let now = wall_clock();
            match ticking.rtc.next_event() {
                Some(event) if event <= now => {
                    ticking.rtc.catch_up(now);
                    continue;
                }
                Some(event) => sleep = sleep.min(Duration::from_nanos((event - now) as u64)),
                None => {}
            }
        }
        drop(clock.changed.wait_timeout(ticking, sleep));
    }
}
