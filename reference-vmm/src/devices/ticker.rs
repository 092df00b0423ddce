//! Threads that wake devices when their time comes.

use parking_lot::{Condvar, Mutex};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A device to which something happens at times of its clock.
pub(crate) trait Timed {
    /// When something happens next, in ns of its clock.
    fn next_event(&self) -> Option<i128>;
    /// Makes happen what is due.
    fn catch_up(&mut self, now: i128);
}

/// A device, its clock and what wakes its thread.
pub(crate) struct Ticker<D> {
    device: Mutex<Ticking<D>>,
    clock: Box<dyn Fn() -> i128 + Send + Sync>,
    changed: Condvar,
}

struct Ticking<D> {
    device: D,
    running: bool,
    gone: bool,
}

impl<D: Timed + Send + 'static> Ticker<D> {
    /// Starts the thread; it sleeps until the machine runs. `clock` gives ns.
    pub(crate) fn start(
        name: &str,
        device: D,
        clock: impl Fn() -> i128 + Send + Sync + 'static,
    ) -> std::io::Result<(Arc<Ticker<D>>, JoinHandle<()>)> {
        let ticking = Ticking { device, running: false, gone: false };
        let ticker = Arc::new(Ticker { device: Mutex::new(ticking), clock: Box::new(clock), changed: Condvar::new() });
        let weak = Arc::downgrade(&ticker);
        let thread = thread::Builder::new().name(name.into()).spawn(move || tick(&weak))?;
        Ok((ticker, thread))
    }

    /// Uses the device, after which its next event may be another one.
    pub(crate) fn with<T>(&self, use_it: impl FnOnce(&mut D, i128) -> T) -> T {
        let result = use_it(&mut self.device.lock().device, (self.clock)());
        self.changed.notify_all();
        result
    }

    /// Lets events come, or holds them back.
    pub(crate) fn run(&self, running: bool) {
        self.device.lock().running = running;
        self.changed.notify_all();
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        self.device.lock().gone = true;
        self.changed.notify_all();
    }
}

/// Rest after an event, for those who wait for the device: a guest can ask for events as fast as they can be made.
const REST: Duration = Duration::from_micros(50);
/// Longest sleep, so that a step of the clock does no lasting harm.
const LONGEST: Duration = Duration::from_secs(1);

fn tick<D: Timed>(ticker: &Weak<Ticker<D>>) {
    while let Some(ticker) = ticker.upgrade() {
        let mut ticking = ticker.device.lock();
        if ticking.gone {
            return;
        }
        let mut sleep = LONGEST;
        if ticking.running {
            let now = (ticker.clock)();
            match ticking.device.next_event() {
                Some(event) if event <= now => {
                    ticking.device.catch_up(now);
                    drop(ticking);
                    thread::sleep(REST);
                    continue;
                }
                Some(event) => sleep = sleep.min(Duration::from_nanos(u64::try_from(event - now).unwrap_or(u64::MAX))),
                None => {}
            }
        }
        ticker.changed.wait_for(&mut ticking, sleep);
    }
}
