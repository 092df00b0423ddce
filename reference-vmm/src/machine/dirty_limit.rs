//! Keeping each vCPU below a rate at which it dirties memory (capability `dirty-limit`, QMP `set-vcpu-dirty-limit`).
//!
//! A dirty ring tells how much a vCPU writes. For every ring full of pages it stands still for a while, and the length of that
//! while is set anew in each period from the rate that was measured. QEMU steps towards the limit and is content within
//! 25 MiB/s of it; here the missing time is reckoned, which comes closer and sooner.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::vcpu::Vcpu;
use crate::devices::lock;
use crate::dirty_log::DirtyLog;
use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;

/// How often vCPUs are looked at that write and do not leave the guest, because their rings are harvested for a migration.
const TICK: Duration = Duration::from_millis(10);
/// A vCPU pauses when it owes this part of a ring, so that pauses are short.
const PART: u64 = 4;
/// The longest pause, in times that it takes to fill a ring: a vCPU keeps a hundredth of its time (QEMU 7.1 to 11.1).
const LONGEST: u32 = 99;
const MIB: f64 = (1 << 20) as f64;

/// A limit and how it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuDirtyLimit {
    /// The vCPU.
    pub vcpu: usize,
    /// What it may write, in MiB per second.
    pub limit: u64,
    /// What it wrote in the last period, in MiB per second.
    pub rate: u64,
    /// How long it stands still for every ring full of pages.
    pub pause: Duration,
    /// How long it takes to fill its ring when it is not slowed down; zero before that was measured.
    pub ring_full: Duration,
}

/// What the vCPU threads look at.
pub(crate) struct Pauses {
    log: Arc<DirtyLog>,
    /// For every ring full of pages, in microseconds, by vCPU.
    micros: Box<[AtomicU64]>,
}

impl Pauses {
    /// The pause to make now. `paid` is for the vCPU to keep: what it had written when it last made one.
    pub(crate) fn due(&self, vcpu: usize, paid: &mut Option<u64>) -> Option<Duration> {
        let micros = self.micros[vcpu].load(Ordering::Relaxed);
        if micros == 0 {
            *paid = None;
            return None;
        }
        let (written, size) = (self.log.harvested(vcpu), u64::from(self.log.ring_size()));
        let owed = written - *paid.get_or_insert(written);
        (owed >= size / PART).then(|| {
            *paid = Some(written);
            Duration::from_micros(micros.saturating_mul(owed) / size.max(1))
        })
    }

    /// Whether the vCPU may write as it likes.
    pub(crate) fn released(&self, vcpu: usize) -> bool {
        self.micros[vcpu].load(Ordering::Relaxed) == 0
    }
}

/// The limits of a machine's vCPUs. At first there is none.
pub(crate) struct DirtyLimit {
    pauses: Arc<Pauses>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    vcpus: Vec<Limited>,
    period: Duration,
    end: bool,
}

/// What is known of a vCPU.
#[derive(Clone, Copy, Default)]
struct Limited {
    /// MiB per second.
    limit: Option<u64>,
    /// Bytes per second in the last period, and the most there were since the limit was set.
    rate: f64,
    fastest: f64,
    pause: Duration,
}

impl Limited {
    /// Reckons the pause anew after a period in which so many bytes per second were written.
    fn measured(&mut self, rate: f64, ring_bytes: f64) {
        (self.rate, self.fastest) = (rate, self.fastest.max(rate));
        self.pause = match self.limit {
            Some(limit) if rate > 0.0 => {
                // From one full ring to the next, as it is and as it should be.
                let (takes, should) = (ring_bytes / rate, ring_bytes / (limit as f64 * MIB).max(1.0));
                let pause = (self.pause.as_secs_f64() + should - takes).max(0.0);
                Duration::from_secs_f64(pause.min(self.ring_full(ring_bytes).as_secs_f64() * f64::from(LONGEST)))
            }
            _ => Duration::ZERO,
        };
    }

    fn ring_full(&self, ring_bytes: f64) -> Duration {
        if self.fastest > 0.0 { Duration::from_secs_f64(ring_bytes / self.fastest) } else { Duration::ZERO }
    }
}

impl DirtyLimit {
    pub(crate) fn new(vcpus: usize, log: Arc<DirtyLog>) -> DirtyLimit {
        let state = State { vcpus: vec![Limited::default(); vcpus], period: Duration::from_secs(1), end: false };
        DirtyLimit {
            pauses: Arc::new(Pauses { log, micros: (0..vcpus).map(|_| AtomicU64::new(0)).collect() }),
            shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }),
            thread: Mutex::default(),
        }
    }

    pub(crate) fn pauses(&self) -> &Arc<Pauses> {
        &self.pauses
    }

    pub(crate) fn set(&self, vcpu: Option<usize>, limit: Option<u64>, vcpus: &Arc<[Vcpu]>) -> Result<()> {
        if self.pauses.log.ring_size() == 0 && limit.is_some() {
            return Err(Error::Config("a limit of dirty rates needs dirty rings".to_owned()));
        }
        if let Some(vcpu) = vcpu.filter(|vcpu| *vcpu >= vcpus.len()) {
            return Err(Error::Config(format!("there is no vCPU {vcpu}")));
        }
        let mut thread = lock(&self.thread);
        let mut state = lock(&self.shared.state);
        for (index, limited) in state.vcpus.iter_mut().enumerate().filter(|(i, _)| vcpu.is_none_or(|only| only == *i)) {
            match limit {
                Some(_) => limited.limit = limit,
                None => {
                    *limited = Limited::default();
                    self.pauses.micros[index].store(0, Ordering::Relaxed);
                }
            }
        }
        drop(state);
        self.shared.changed.notify_all();
        if limit.is_some() && thread.is_none() {
            let (shared, pauses, vcpus) = (self.shared.clone(), self.pauses.clone(), vcpus.clone());
            let handle = std::thread::Builder::new()
                .name("dirty-limit".into())
                .spawn(move || shared.keep(&pauses, &vcpus))
                .map_err(|cause| Error::Host { what: "start the thread that limits dirty rates", cause })?;
            *thread = Some(handle);
        }
        Ok(())
    }

    pub(crate) fn set_period(&self, period: Duration) {
        lock(&self.shared.state).period = period;
    }

    pub(crate) fn list(&self) -> Vec<VcpuDirtyLimit> {
        let ring_bytes = ring_bytes(&self.pauses.log);
        let state = lock(&self.shared.state);
        let limits = state.vcpus.iter().enumerate().filter_map(|(vcpu, limited)| {
            limited.limit.map(|limit| VcpuDirtyLimit {
                vcpu,
                limit,
                rate: (limited.rate / MIB).round() as u64,
                pause: limited.pause,
                ring_full: limited.ring_full(ring_bytes),
            })
        });
        limits.collect()
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
    fn keep(&self, pauses: &Pauses, vcpus: &[Vcpu]) {
        let idle = |state: &mut State| !state.end && state.vcpus.iter().all(|vcpu| vcpu.limit.is_none());
        loop {
            let state = lock(&self.state);
            let state = self.changed.wait_while(state, idle).unwrap_or_else(|poison| poison.into_inner());
            if state.end {
                return;
            }
            drop(state);
            if let Err(error) = self.serve(pauses, vcpus) {
                tracing::error!(%error, "the dirty rates are not limited any more");
                lock(&self.state).vcpus.fill(Limited::default());
            }
            pauses.micros.iter().for_each(|micros| micros.store(0, Ordering::Relaxed));
        }
    }

    /// Until there is no limit any more.
    fn serve(&self, pauses: &Pauses, vcpus: &[Vcpu]) -> Result<()> {
        let watch = pauses.log.watch()?;
        let (mut before, mut since) = (watch.written()?, Instant::now());
        let mut kicked = before.clone();
        let size = u64::from(pauses.log.ring_size());
        let mut state = lock(&self.state);
        while !state.end && state.vcpus.iter().any(|vcpu| vcpu.limit.is_some()) {
            let (now, period) = (since.elapsed(), state.period);
            if now >= period {
                drop(state);
                let written = watch.written()?;
                state = lock(&self.state);
                self.adjust(&mut state, pauses, &before, &written, now);
                (before, since) = (written, Instant::now());
            }
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(|poison| poison.into_inner()).0;
            for (index, vcpu) in vcpus.iter().enumerate().filter(|(index, _)| !pauses.released(*index)) {
                let written = pauses.log.harvested(index);
                if written - kicked[index] >= size / PART {
                    kicked[index] = written;
                    vcpu.kick();
                }
            }
        }
        Ok(())
    }

    fn adjust(
        &self,
        state: &mut MutexGuard<'_, State>,
        pauses: &Pauses,
        before: &[u64],
        written: &[u64],
        time: Duration,
    ) {
        let ring_bytes = ring_bytes(&pauses.log);
        for (index, limited) in state.vcpus.iter_mut().enumerate() {
            let bytes = (written[index] - before[index]) * PAGE_SIZE;
            limited.measured(bytes as f64 / time.as_secs_f64().max(1e-6), ring_bytes);
            pauses.micros[index].store(limited.pause.as_micros() as u64, Ordering::Relaxed);
        }
    }
}

fn ring_bytes(log: &DirtyLog) -> f64 {
    f64::from(log.ring_size()) * PAGE_SIZE as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: f64 = 16.0 * MIB;

    /// A vCPU that fills its ring in this time and then pauses; gives its rates in MiB/s.
    fn play(limited: &mut Limited, fills_in: f64, periods: usize) -> Vec<u64> {
        let step = |limited: &mut Limited| {
            let rate = RING / (fills_in + limited.pause.as_secs_f64());
            limited.measured(rate, RING);
            (rate / MIB).round() as u64
        };
        (0..periods).map(|_| step(limited)).collect()
    }

    #[test]
    fn a_vcpu_comes_to_its_limit_and_stays_there() {
        let mut limited = Limited { limit: Some(50), ..Limited::default() };
        // 800 MiB/s at first.
        assert_eq!(play(&mut limited, 0.02, 4), [800, 50, 50, 50]);
        assert_eq!(limited.ring_full(RING), Duration::from_millis(20));
        // It becomes slower by itself, and then faster than ever.
        assert_eq!(play(&mut limited, 0.2, 3), [32, 50, 50]);
        assert_eq!(play(&mut limited, 0.01, 3)[1..], [50, 50]);
    }

    #[test]
    fn a_vcpu_that_keeps_below_its_limit_or_has_none_is_left_alone() {
        let mut limited = Limited { limit: Some(50), ..Limited::default() };
        assert_eq!(play(&mut limited, 0.5, 3), [32, 32, 32]);
        assert_eq!(limited.pause, Duration::ZERO);
        limited.measured(0.0, RING);
        assert_eq!(limited.pause, Duration::ZERO);
        let mut free = Limited::default();
        assert_eq!(play(&mut free, 0.02, 2), [800, 800]);
    }

    #[test]
    fn a_vcpu_keeps_a_hundredth_of_its_time() {
        let mut limited = Limited { limit: Some(1), ..Limited::default() };
        play(&mut limited, 0.001, 10);
        assert_eq!(limited.pause, Duration::from_millis(99));
    }
}
