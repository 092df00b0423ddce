//! How long the guest waits for its memory (capability `postcopy-blocktime`).

use crate::atomic_page_set::AtomicPageSet;
use std::collections::HashMap;
use std::time::Duration;

/// How long faults took: fault `n` of the distribution between 2^n and 2^(n+1) microseconds, those of the last and
/// longer.
const BUCKETS: usize = 24;

/// How long a guest has waited for its memory in postcopy: from the moment when a page is touched that has not
/// come to the moment when it is there. Of pages that are still waited for nothing is counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockTimes {
    /// The time in which all vCPUs waited at once.
    pub all_vcpus: Duration,
    /// The time in which each vCPU waited, for one page or several.
    pub vcpus: Vec<Duration>,
    /// What a wait took on average; zero before the first.
    pub latency: Duration,
    /// The same for each vCPU.
    pub vcpu_latency: Vec<Duration>,
    /// The same for all others, such as devices that the monitor emulates.
    pub other_latency: Duration,
    /// How many waits took 2^n microseconds or more, and less than 2^(n+1); the first has those below, and the last
    /// those above.
    pub distribution: [u64; BUCKETS],
}

/// Who waits, for a page or several.
#[derive(Default, Clone)]
struct Waiter {
    /// Pages.
    waits_for: u64,
    /// Since when, if it does.
    since: Duration,
    /// How long it has waited.
    waited: Duration,
    waits: Waits,
}

/// Waits that are over.
#[derive(Default, Clone, Copy)]
struct Waits {
    count: u64,
    sum: Duration,
}

impl Waits {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.sum += took;
    }

    fn mean(self) -> Duration {
        let nanos = self.sum.as_nanos().checked_div(self.count.into()).unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// A vCPU that waits, or another thread, and since when.
type Open = (Option<usize>, Duration);

/// Keeps account of it. Times are counted from any moment on.
pub(super) struct Account {
    vcpus: Vec<Waiter>,
    others: Waits,
    /// vCPUs that wait.
    waiting: usize,
    /// All vCPUs wait, since then.
    all_since: Duration,
    all_vcpus: Duration,
    distribution: [u64; BUCKETS],
    /// For each page of a block who waits for it.
    open: HashMap<(usize, u64), Vec<Open>>,
    /// For each block the pages that are there.
    here: Vec<AtomicPageSet>,
}

impl Account {
    /// For a guest with `vcpus` vCPUs and, for each RAM block, its number of pages.
    pub(super) fn new(vcpus: usize, blocks: impl IntoIterator<Item = u64>) -> Self {
        Account {
            vcpus: vec![Waiter::default(); vcpus],
            others: Waits::default(),
            waiting: 0,
            all_since: Duration::ZERO,
            all_vcpus: Duration::ZERO,
            distribution: [0; BUCKETS],
            open: HashMap::new(),
            here: blocks.into_iter().map(|pages| AtomicPageSet::new(pages, false)).collect(),
        }
    }

    /// A page is waited for, since about now. It may be there already, or be waited for by the same: that changes
    /// nothing.
    pub(super) fn touched(&mut self, vcpu: Option<usize>, block: usize, page: u64, now: Duration) {
        if self.here.get(block).is_none_or(|here| here.contains(page)) {
            return;
        }
        let vcpu = vcpu.filter(|vcpu| *vcpu < self.vcpus.len());
        let waiting = self.open.entry((block, page)).or_default();
        if waiting.iter().any(|(who, _)| *who == vcpu) {
            return;
        }
        waiting.push((vcpu, now));
        let Some(waiter) = vcpu.and_then(|vcpu| self.vcpus.get_mut(vcpu)) else { return };
        waiter.waits_for += 1;
        if waiter.waits_for == 1 {
            waiter.since = now;
            self.waiting += 1;
            if self.waiting == self.vcpus.len() {
                self.all_since = now;
            }
        }
    }

    /// A page is there, since about now.
    pub(super) fn placed(&mut self, block: usize, page: u64, now: Duration) {
        self.here.iter().skip(block).take(1).for_each(|here| here.mark(page..page + 1));
        for (vcpu, since) in self.open.remove(&(block, page)).unwrap_or_default() {
            let took = now.saturating_sub(since);
            let bucket = (took.as_micros() as u64).checked_ilog2().unwrap_or(0) as usize;
            self.distribution[bucket.min(BUCKETS - 1)] += 1;
            let Some(waiter) = vcpu.and_then(|vcpu| self.vcpus.get_mut(vcpu)) else {
                self.others.add(took);
                continue;
            };
            waiter.waits.add(took);
            waiter.waits_for -= 1;
            if waiter.waits_for == 0 {
                waiter.waited += now.saturating_sub(waiter.since);
                if self.waiting == self.vcpus.len() {
                    self.all_vcpus += now.saturating_sub(self.all_since);
                }
                self.waiting -= 1;
            }
        }
    }

    pub(super) fn report(&self) -> BlockTimes {
        let mut all = self.others;
        for waiter in &self.vcpus {
            (all.count, all.sum) = (all.count + waiter.waits.count, all.sum + waiter.waits.sum);
        }
        BlockTimes {
            all_vcpus: self.all_vcpus,
            vcpus: self.vcpus.iter().map(|waiter| waiter.waited).collect(),
            latency: all.mean(),
            vcpu_latency: self.vcpus.iter().map(|waiter| waiter.waits.mean()).collect(),
            other_latency: self.others.mean(),
            distribution: self.distribution,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn waits_are_counted_for_each_and_for_all_at_once() {
        let mut account = Account::new(2, [10, 20]);
        assert_eq!(account.report().latency, Duration::ZERO);
        account.touched(Some(0), 0, 3, micros(100));
        // Told of again.
        account.touched(Some(0), 0, 3, micros(150));
        account.touched(Some(1), 1, 3, micros(200));
        account.touched(None, 1, 3, micros(250));
        account.touched(Some(7), 1, 4, micros(250));
        account.placed(0, 3, micros(300));
        // It was there before it was told of.
        account.touched(Some(0), 0, 3, micros(310));
        account.placed(1, 3, micros(2450));
        account.placed(1, 4, micros(251));
        account.placed(1, 5, micros(9999));
        let report = account.report();
        assert_eq!(report.all_vcpus, micros(100));
        assert_eq!(report.vcpus, [micros(200), micros(2250)]);
        assert_eq!(report.vcpu_latency, [micros(200), micros(2250)]);
        assert_eq!(report.other_latency, Duration::from_nanos((2_200_000 + 1_000) / 2));
        assert_eq!(report.latency, Duration::from_nanos((200 + 2250 + 2200 + 1) * 1000 / 4));
        let mut distribution = [0; BUCKETS];
        (distribution[7], distribution[11], distribution[0]) = (1, 2, 1);
        assert_eq!(report.distribution, distribution);
    }

    /// With asynchronous page faults a vCPU runs another task of the guest's meanwhile, which may wait, too.
    #[test]
    fn a_vcpu_that_waits_for_two_pages_waits_once() {
        let mut account = Account::new(1, [10]);
        account.touched(Some(0), 0, 1, micros(100));
        account.touched(Some(0), 0, 2, micros(200));
        account.placed(0, 1, micros(300));
        assert_eq!(account.report().vcpus, [Duration::ZERO]);
        account.placed(0, 2, micros(500));
        let report = account.report();
        assert_eq!((report.vcpus[0], report.all_vcpus, report.latency), (micros(400), micros(400), micros(250)));
        // Longer than the last bucket begins.
        account.touched(Some(0), 0, 4, micros(0));
        account.placed(0, 4, micros(1 << 40));
        assert_eq!(account.report().distribution[BUCKETS - 1], 1);
    }
}
