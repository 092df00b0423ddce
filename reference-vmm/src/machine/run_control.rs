//! Whether vCPUs may run: the barrier between their threads and all others.

use parking_lot::{Condvar, Mutex};
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// They are paused, or are about to be.
    Paused,
    /// The guest has stopped by itself: see [`Stop`]. A reset lets it start anew.
    Stopped,
}

/// Why a guest stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// It asked for a reset, or ran into a triple fault.
    Reset {
        /// The vCPU.
        vcpu: usize,
        /// Register or triple fault.
        cause: String,
    },
    /// It switched itself off.
    Shutdown,
    /// A vCPU cannot go on.
    Failed {
        /// The vCPU.
        vcpu: usize,
        /// KVM's exit reason and details.
        reason: String,
        /// Where the vCPU was.
        rip: u64,
    },
    /// A part of guest memory cannot be had, for this reason. No reset brings it back.
    MemoryLost(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Reset { vcpu, cause } => write!(f, "guest reset by vCPU {vcpu}: {cause}"),
            Stop::Shutdown => write!(f, "guest shutdown"),
            Stop::MemoryLost(reason) => write!(f, "guest memory is lost: {reason}"),
            Stop::Failed { vcpu, reason, rip } => write!(f, "vCPU {vcpu} failed: {reason} at rip {rip:#x}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Run,
    Pause,
    Exit,
}

struct Inner {
    phase: Phase,
    threads: usize,
    parked: usize,
    stop: Option<Stop>,
}

pub(crate) struct RunControl {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Whom to tell that the guest has stopped by itself.
    watcher: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl RunControl {
    /// For that many vCPU threads, which will park first of all.
    pub(crate) fn new(threads: usize) -> RunControl {
        let inner = Inner { phase: Phase::Pause, threads, parked: 0, stop: None };
        RunControl { inner: Mutex::new(inner), changed: Condvar::new(), watcher: OnceLock::new() }
    }

    pub(crate) fn state(&self) -> RunState {
        let inner = self.inner.lock();
        match inner.phase {
            _ if inner.stop.is_some() => RunState::Stopped,
            Phase::Run => RunState::Running,
            Phase::Pause | Phase::Exit => RunState::Paused,
        }
    }

    pub(crate) fn resume(&self) -> Result<(), Stop> {
        let mut inner = self.inner.lock();
        if let Some(stop) = &inner.stop {
            return Err(stop.clone());
        }
        inner.phase = Phase::Run;
        self.changed.notify_all();
        Ok(())
    }

    /// Asks the threads to park, wakes them with `kick` and waits for them.
    pub(crate) fn pause(&self, kick: impl Fn()) {
        let mut inner = self.inner.lock();
        if inner.phase == Phase::Run {
            inner.phase = Phase::Pause;
            self.changed.notify_all();
        }
        kick();
        while inner.parked < inner.threads {
            self.changed.wait(&mut inner);
        }
    }

    pub(crate) fn wait_parked(&self) {
        self.pause(|| ());
    }

    pub(crate) fn all_parked(&self) -> bool {
        let inner = self.inner.lock();
        inner.phase != Phase::Run && inner.parked == inner.threads
    }

    pub(crate) fn exit(&self) {
        self.inner.lock().phase = Phase::Exit;
        self.changed.notify_all();
    }

    pub(crate) fn wait_stop(&self, timeout: Duration) -> Option<Stop> {
        let deadline = Instant::now().checked_add(timeout);
        let mut inner = self.inner.lock();
        while inner.stop.is_none() {
            let left = match deadline {
                Some(deadline) => deadline.checked_duration_since(Instant::now())?,
                None => timeout,
            };
            self.changed.wait_for(&mut inner, left);
        }
        inner.stop.clone()
    }

    /// Called by a vCPU thread before it enters the guest.
    pub(crate) fn may_run(&self) -> bool {
        self.inner.lock().phase == Phase::Run
    }

    /// Called by a vCPU thread: waits until it may run (true) or must end (false).
    pub(crate) fn park(&self) -> bool {
        let mut inner = self.inner.lock();
        inner.parked += 1;
        self.changed.notify_all();
        while inner.phase == Phase::Pause {
            self.changed.wait(&mut inner);
        }
        inner.parked -= 1;
        inner.phase == Phase::Run
    }

    /// Called by a vCPU thread: waits that long, or until it may not run any more, or `enough` says so after a
    /// [`wake`](RunControl::wake).
    pub(crate) fn wait_while_running(&self, time: Duration, enough: impl Fn() -> bool) {
        let still = |inner: &mut Inner| inner.phase == Phase::Run && !enough();
        self.changed.wait_while_for(&mut self.inner.lock(), still, time);
    }

    /// Makes those who [wait](RunControl::wait_while_running) ask whether it was enough.
    pub(crate) fn wake(&self) {
        let _inner = self.inner.lock();
        self.changed.notify_all();
    }

    /// The guest has stopped, and no vCPU enters it any more when this returns. The first reason counts.
    pub(crate) fn stopped(&self, stop: Stop) {
        let mut inner = self.inner.lock();
        inner.stop.get_or_insert(stop);
        if inner.phase == Phase::Run {
            inner.phase = Phase::Pause;
        }
        self.changed.notify_all();
        drop(inner);
        self.watcher.get().into_iter().for_each(|watcher| watcher());
    }

    /// Each stop of the guest is told to `watcher`, on the thread of a vCPU. There is one watcher at most, the first.
    pub(crate) fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.watcher.get_or_init(|| Box::new(watcher));
    }

    /// Forgets why the guest stopped: it has been reset.
    pub(crate) fn forget_stop(&self) {
        self.inner.lock().stop.take_if(|stop| !matches!(stop, Stop::MemoryLost(_)));
    }

    /// Called when a vCPU thread ends, so that no thread waits for it.
    pub(crate) fn gone(&self) {
        self.inner.lock().threads -= 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_when_the_machine_is_paused() {
        let control = RunControl::new(1);
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                control.park();
                // Far longer than any test may take.
                control.wait_while_running(Duration::from_secs(1 << 30), || false);
                assert!(!control.park(), "it was told to end");
                control.gone();
            });
            control.wait_parked();
            control.resume().unwrap();
            while control.inner.lock().parked > 0 {
                std::thread::yield_now();
            }
            control.pause(|| ());
            assert!(control.all_parked());
            control.exit();
            vcpu.join().unwrap();
        });
    }
}
