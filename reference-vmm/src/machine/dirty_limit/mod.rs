//! Keeping each vCPU below a rate at which it dirties memory (capability `dirty-limit`, QMP `set-vcpu-dirty-limit`).
//!
//! A dirty ring tells how much a vCPU writes to. A thread looks at it every few milliseconds, without harvesting it, and the
//! vCPU's own thread does when the ring is full; the rule ([`Bucket`]) says whether the vCPU has to pause, and until when. A pause
//! is as long as the limit asks for: QEMU leaves a vCPU a hundredth of its time, steps towards the limit, and is content within
//! 25 MiB/s of it.

mod bucket;
#[cfg(test)]
mod simulation;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::vcpu::Vcpu;
use crate::devices::lock;
use crate::dirty_log::DirtyLog;
use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;
use bucket::{Bucket, Verdict};

const MIB: f64 = (1 << 20) as f64;

/// A limit and how it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuDirtyLimit {
    /// The vCPU.
    pub vcpu: usize,
    /// What it may write, in MiB per second.
    pub limit: u64,
    /// What it wrote over the last period, or over several pauses if those take longer, in MiB per second; 0 before that was
    /// measured.
    pub rate: u64,
    /// How long it pauses for every ring full of pages; zero if it is not slowed down.
    pub pause: Duration,
    /// How long it takes to fill its ring while it runs; zero before that was measured.
    pub ring_full: Duration,
}

/// Until when vCPUs pause: what their threads look at.
pub(crate) struct Pauses {
    start: Instant,
    /// In nanoseconds from the start on, by vCPU; 0: it does not pause.
    until: Box<[AtomicU64]>,
}

/// A vCPU pauses until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pause {
    until: u64,
    /// The time that is left of it.
    pub(crate) left: Duration,
}

impl Pauses {
    fn new(vcpus: usize) -> Pauses {
        Pauses { start: Instant::now(), until: (0..vcpus).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The pause that the vCPU is to make now.
    pub(crate) fn due(&self, vcpu: usize) -> Option<Pause> {
        let until = self.until[vcpu].load(Ordering::Relaxed);
        // Most of the time there is none, and then the clock is not read.
        if until == 0 {
            return None;
        }
        let left = Duration::from_nanos(until).checked_sub(self.now())?;
        (!left.is_zero()).then_some(Pause { until, left })
    }

    /// Whether it is not that pause any more.
    pub(crate) fn has_changed(&self, vcpu: usize, pause: Pause) -> bool {
        self.until[vcpu].load(Ordering::Relaxed) != pause.until
    }

    fn set(&self, vcpu: usize, until: Option<Duration>) {
        self.until[vcpu].store(until.map_or(0, |until| until.as_nanos() as u64), Ordering::Relaxed);
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

/// The limits of a machine's vCPUs. At first there is none.
pub(crate) struct DirtyLimit {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

pub(crate) struct Shared {
    log: Arc<DirtyLog>,
    pub(crate) pauses: Pauses,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Of those that have a limit, by vCPU.
    buckets: Vec<Option<Bucket>>,
    period: Duration,
    end: bool,
}

impl State {
    fn is_limited(&self) -> bool {
        self.buckets.iter().any(Option::is_some)
    }
}

impl DirtyLimit {
    pub(crate) fn new(vcpus: usize, log: Arc<DirtyLog>) -> DirtyLimit {
        let state = State { buckets: vec![None; vcpus], period: Duration::from_secs(1), end: false };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        DirtyLimit {
            shared: Arc::new(Shared { log, pauses: Pauses::new(vcpus), state, changed }),
            thread: Mutex::default(),
        }
    }

    /// For the vCPUs' threads.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whoever pauses is to be woken afterwards.
    pub(crate) fn set(&self, vcpu: Option<usize>, limit: Option<u64>, vcpus: &Arc<[Vcpu]>) -> Result<()> {
        if self.shared.log.ring_size() == 0 && limit.is_some() {
            return Err(Error::Config("a limit of dirty rates needs dirty rings".to_owned()));
        }
        if let Some(vcpu) = vcpu.filter(|vcpu| *vcpu >= vcpus.len()) {
            return Err(Error::Config(format!("there is no vCPU {vcpu}")));
        }
        let mut thread = lock(&self.thread);
        self.shared.set(vcpu, limit);
        if limit.is_some() && thread.is_none() {
            let (shared, vcpus) = (self.shared.clone(), vcpus.clone());
            let handle = std::thread::Builder::new()
                .name("dirty-limit".into())
                .spawn(move || shared.keep(&vcpus))
                .map_err(|cause| Error::Host { what: "start the thread that limits dirty rates", cause })?;
            *thread = Some(handle);
        }
        Ok(())
    }

    pub(crate) fn set_period(&self, period: Duration) {
        let mut state = lock(&self.shared.state);
        state.period = period;
        state.buckets.iter_mut().flatten().for_each(|bucket| bucket.set_period(period));
    }

    pub(crate) fn list(&self) -> Vec<VcpuDirtyLimit> {
        let ring = f64::from(self.shared.log.ring_size()) * PAGE_SIZE as f64;
        let report = |(vcpu, bucket): (usize, &Option<Bucket>)| {
            let bucket = bucket.as_ref()?;
            let (limit, measured) = (bucket.limit(), bucket.measured());
            let takes = |rate: f64| if rate > 0.0 { ring / rate } else { 0.0 };
            let ring_full = takes(measured.speed);
            let pause = if measured.slowed { (takes(limit as f64 * MIB) - ring_full).max(0.0) } else { 0.0 };
            Some(VcpuDirtyLimit {
                vcpu,
                limit,
                rate: (measured.rate / MIB).round() as u64,
                pause: Duration::from_secs_f64(pause),
                ring_full: Duration::from_secs_f64(ring_full),
            })
        };
        lock(&self.shared.state).buckets.iter().enumerate().filter_map(report).collect()
    }

    /// Ends its thread: afterwards no vCPU is kicked any more.
    pub(crate) fn end(&self) {
        lock(&self.shared.state).end = true;
        self.shared.changed.notify_all();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that limits dirty rates panicked");
        }
    }
}

impl Shared {
    fn set(&self, vcpu: Option<usize>, limit: Option<u64>) {
        let mut state = lock(&self.state);
        let period = state.period;
        for (index, bucket) in state.buckets.iter_mut().enumerate().filter(|(i, _)| vcpu.is_none_or(|only| only == *i))
        {
            match (&mut *bucket, limit) {
                (Some(bucket), Some(limit)) => bucket.set_limit(limit),
                (_, limit) => {
                    *bucket = limit.map(|limit| Bucket::new(limit, period, self.pauses.now(), self.log.written(index)));
                }
            }
            self.look_at(index, bucket.as_mut());
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Called by the thread of a vCPU whose ring was full, or whose pause is over, so that it need not wait until the other thread
    /// comes to look.
    pub(crate) fn look(&self, vcpu: usize) {
        self.look_at(vcpu, lock(&self.state).buckets[vcpu].as_mut());
    }

    fn look_at(&self, vcpu: usize, bucket: Option<&mut Bucket>) -> Option<Verdict> {
        let verdict = bucket.map(|bucket| bucket.look(self.pauses.now(), self.log.written(vcpu)));
        self.pauses.set(vcpu, verdict.and_then(|verdict| verdict.pause_until));
        verdict
    }

    fn keep(&self, vcpus: &[Vcpu]) {
        let idle = |state: &mut State| !state.end && !state.is_limited();
        loop {
            let state = lock(&self.state);
            let state = self.changed.wait_while(state, idle).unwrap_or_else(|poison| poison.into_inner());
            if state.end {
                return;
            }
            drop(state);
            if let Err(error) = self.serve(vcpus) {
                tracing::error!(%error, "the dirty rates are not limited any more");
                self.set(None, None);
            }
        }
    }

    /// Until there is no limit any more.
    fn serve(&self, vcpus: &[Vcpu]) -> Result<()> {
        let watch = self.log.watch()?;
        let mut harvested = self.pauses.now();
        let mut state = lock(&self.state);
        while !state.end && state.is_limited() {
            // A page that a vCPU goes on writing to counts again in every period.
            if self.pauses.now() >= harvested + state.period {
                drop(state);
                watch.written()?;
                (harvested, state) = (self.pauses.now(), lock(&self.state));
            }
            let mut next = harvested + state.period;
            for (index, (vcpu, bucket)) in vcpus.iter().zip(&mut state.buckets).enumerate() {
                let paused = self.pauses.due(index).is_some();
                let Some(verdict) = self.look_at(index, bucket.as_mut()) else { continue };
                next = next.min(verdict.look_at);
                if verdict.pause_until.is_some() && !paused {
                    vcpu.kick();
                }
            }
            let wait = next.saturating_sub(self.pauses.now());
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(|poison| poison.into_inner()).0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::machine::run_control::RunControl;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Plays a vCPU's thread into a pause of an hour, and does something about it.
    fn ends_a_pause(by: impl FnOnce(&RunControl, &Pauses)) {
        let (control, pauses) = (Arc::new(RunControl::new(1)), Arc::new(Pauses::new(1)));
        pauses.set(0, Some(Duration::from_secs(3600)));
        let (tell, told) = channel();
        let vcpu = {
            let (control, pauses) = (control.clone(), pauses.clone());
            std::thread::spawn(move || {
                assert!(control.park());
                let pause = pauses.due(0).expect("an hour");
                assert!(pause.left > Duration::from_secs(3000));
                tell.send("it pauses").unwrap();
                control.nap(pause.left, || pauses.has_changed(0, pause));
                tell.send("it goes on").unwrap();
                control.park();
            })
        };
        control.resume().unwrap();
        assert_eq!(told.recv_timeout(PATIENCE), Ok("it pauses"));
        by(&control, &pauses);
        assert_eq!(told.recv_timeout(PATIENCE), Ok("it goes on"));
        control.exit();
        vcpu.join().unwrap();
    }

    #[test]
    fn stop_and_quit_do_not_wait_for_a_pause() {
        ends_a_pause(|control, _| control.pause(|| ()));
        ends_a_pause(|control, _| control.exit());
    }

    #[test]
    fn a_limit_that_is_taken_back_or_raised_ends_its_pause() {
        for until in [None, Some(Duration::from_nanos(1))] {
            ends_a_pause(|control, pauses| {
                pauses.set(0, until);
                assert_eq!(pauses.due(0), None);
                control.wake();
            });
        }
    }
}
