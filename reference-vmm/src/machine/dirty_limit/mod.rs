//! Keeping each vCPU below a rate at which it dirties memory (capability `dirty-limit`, QMP `set-vcpu-dirty-limit`).
//!
//! A dirty ring tells how much a vCPU writes to. A thread looks at it every few milliseconds, without harvesting it,
//! and the vCPU's own thread does when the ring is full; the rule ([`Bucket`]) says whether the vCPU has to pause, and
//! until when. A pause is as long as the limit asks for: QEMU leaves a vCPU a hundredth of its time, steps towards the
//! limit, and is content within 25 MiB/s of it.

mod bucket;
mod limits;
mod pauses;
#[cfg(test)]
mod simulation;

use parking_lot::Mutex;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::vcpu::Vcpu;
use crate::dirty_log::DirtyLog;
use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;
use bucket::{Bucket, MIB};
pub(super) use limits::Limits;
use limits::State;

/// A limit and how it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuDirtyLimit {
    /// The vCPU.
    pub vcpu: usize,
    /// What it may write, in MiB per second.
    pub limit: u64,
    /// What it wrote over the last period, or over several pauses if those take longer, in MiB per second; 0 before
    /// that was measured.
    pub rate: u64,
    /// How long it pauses for every ring full of pages; zero if it is not slowed down.
    pub pause: Duration,
    /// How long it takes to fill its ring while it runs; zero before that was measured.
    pub ring_full: Duration,
}

/// The limits of a machine's vCPUs. At first there is none.
pub(crate) struct DirtyLimit {
    limits: Arc<Limits>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl DirtyLimit {
    pub(crate) fn new(vcpus: usize, log: Arc<DirtyLog>) -> DirtyLimit {
        DirtyLimit { limits: Arc::new(Limits::new(vcpus, log)), thread: Mutex::default() }
    }

    /// For the vCPUs' threads.
    pub(crate) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// The thread that pauses is to be woken afterwards.
    pub(crate) fn set(&self, vcpu: Option<usize>, limit: Option<u64>, vcpus: &Arc<[Vcpu]>) -> Result<()> {
        if self.limits.log.ring_size() == 0 && limit.is_some() {
            return Err(Error::Config("a limit of dirty rates needs dirty rings".to_owned()));
        }
        if let Some(vcpu) = vcpu.filter(|vcpu| *vcpu >= vcpus.len()) {
            return Err(Error::Config(format!("there is no vCPU {vcpu}")));
        }
        let mut thread = self.thread.lock();
        self.limits.set(vcpu, limit);
        if limit.is_some() && thread.is_none() {
            let (limits, vcpus) = (self.limits.clone(), vcpus.clone());
            let handle = std::thread::Builder::new()
                .name("dirty-limit".into())
                .spawn(move || limits.keep(&vcpus))
                .map_err(|cause| Error::Host { what: "start the thread that limits dirty rates", cause })?;
            *thread = Some(handle);
        }
        Ok(())
    }

    pub(crate) fn set_period(&self, period: Duration) {
        let mut state = self.limits.state.lock();
        state.period = period;
        state.buckets.iter_mut().flatten().for_each(|bucket| bucket.set_period(period));
    }

    pub(crate) fn list(&self) -> Vec<VcpuDirtyLimit> {
        let ring = f64::from(self.limits.log.ring_size()) * PAGE_SIZE as f64;
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
        self.limits.state.lock().buckets.iter().enumerate().filter_map(report).collect()
    }

    /// Ends its thread: afterwards no vCPU is kicked any more.
    pub(crate) fn end(&self) {
        self.limits.state.lock().end = true;
        self.limits.changed.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that limits dirty rates panicked");
        }
    }
}

impl Limits {
    fn keep(&self, vcpus: &[Vcpu]) {
        let idle = |state: &mut State| !state.end && !state.is_limited();
        loop {
            let mut state = self.state.lock();
            self.changed.wait_while(&mut state, idle);
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
        let mut state = self.state.lock();
        while !state.end && state.is_limited() {
            // A page that a vCPU goes on writing to counts again in every period.
            if self.pauses.now() >= harvested + state.period {
                drop(state);
                watch.written()?;
                (harvested, state) = (self.pauses.now(), self.state.lock());
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
            self.changed.wait_for(&mut state, wait);
        }
        Ok(())
    }
}
