//! The limits and what is measured for them: what the vCPUs' threads look at, and the one that keeps the limits.

use super::bucket::{Bucket, Verdict};
use super::pauses::Pauses;
use crate::dirty_log::DirtyLog;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::Duration;

/// The limits, as the vCPUs' threads and the one that keeps them have them in common.
pub(crate) struct Limits {
    pub(super) log: Arc<DirtyLog>,
    pub(crate) pauses: Pauses,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
}

pub(super) struct State {
    /// Of those that have a limit, by vCPU.
    pub(super) buckets: Vec<Option<Bucket>>,
    pub(super) period: Duration,
    pub(super) end: bool,
}

impl State {
    pub(super) fn is_limited(&self) -> bool {
        self.buckets.iter().any(Option::is_some)
    }
}

impl Limits {
    pub(super) fn new(vcpus: usize, log: Arc<DirtyLog>) -> Limits {
        let state = State { buckets: vec![None; vcpus], period: Duration::from_secs(1), end: false };
        Limits { log, pauses: Pauses::new(vcpus), state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn set(&self, vcpu: Option<usize>, limit: Option<u64>) {
        let mut state = self.state.lock();
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

    /// Called by the thread of a vCPU whose ring was full, or whose pause is over, so that it need not wait until the
    /// other thread comes to look.
    pub(crate) fn look(&self, vcpu: usize) {
        self.look_at(vcpu, self.state.lock().buckets[vcpu].as_mut());
    }

    pub(super) fn look_at(&self, vcpu: usize, bucket: Option<&mut Bucket>) -> Option<Verdict> {
        let verdict = bucket.map(|bucket| bucket.look(self.pauses.now(), self.log.written(vcpu)));
        self.pauses.set(vcpu, verdict.and_then(|verdict| verdict.pause_until));
        verdict
    }
}
