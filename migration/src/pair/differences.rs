//! Pages as differences (capability `xbzrle`).

use super::*;
use crate::XbzrleStatistics;
use proptest::prelude::*;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How many differences there are before the guest may go.
const ENOUGH: u64 = 40;
/// After how many rounds it goes all the same.
const ROUNDS: u64 = 100;

impl Pair {
    /// A guest that is kept until enough of it has gone as differences.
    fn differing(pages: usize, cache: u64, per_step: u64) -> Self {
        let pair = Pair::new(pages);
        pair.source.pages_per_step.store(per_step, Ordering::Relaxed);
        pair.job.set_capabilities(pair.job.capabilities().with([("xbzrle", true)]).unwrap()).unwrap();
        let limits = Parameters { downtime_limit_ms: 0, xbzrle_cache_size: cache, ..pair.job.parameters() };
        pair.job.set_parameters(limits);
        pair
    }

    fn go_when_enough(&self, enough: impl Fn(&XbzrleStatistics, u64) -> bool + Send + 'static) -> Outcome {
        let job = self.job.clone();
        let operator = std::thread::spawn(move || {
            loop {
                let statistics = job.statistics();
                if statistics.xbzrle.is_some_and(|told| enough(&told, statistics.ram.dirty_sync_count)) {
                    job.set_parameters(Parameters { downtime_limit_ms: 10_000, ..job.parameters() });
                    return;
                }
                if statistics.total_time >= Duration::from_secs(60) {
                    job.cancel().unwrap();
                    panic!("{statistics:?}");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let outcome = self.run(Faults::default());
        operator.join().unwrap();
        outcome
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 8, ..ProptestConfig::default() })]
    /// Whatever the cache keeps and forgets, the guest arrives as it was.
    #[test]
    fn a_guest_arrives_by_differences(pages in 8usize..300, cache in 12u32..21, per_step in 1u64..60) {
        let pair = Pair::differing(pages, 1 << cache, per_step);
        // A cache of one page among 300 may never have the one that is written to.
        let outcome = pair.go_when_enough(|told, rounds| told.pages >= ENOUGH || rounds >= ROUNDS);
        pair.assert_moved(&outcome);
        let (told, ram) = (outcome.statistics.xbzrle.unwrap(), outcome.statistics.ram);
        prop_assert_eq!(told.cache_size, 1 << cache);
        // The guest writes eight numbers to a page: that is less than 200 bytes.
        prop_assert!(told.bytes <= told.pages * 200, "{told:?}");
        prop_assert_eq!(ram.remaining, 0);
        prop_assert_eq!(outcome.destination.unwrap().bytes, outcome.written);
    }
}

/// A cache of another size is taken while the guest is on its way.
#[test]
fn the_cache_may_be_resized_meanwhile() {
    let pair = Pair::differing(100, 1 << 20, 20);
    let job = pair.job.clone();
    let outcome = pair.go_when_enough(move |told, _| {
        if told.pages >= ENOUGH {
            job.set_parameters(Parameters { xbzrle_cache_size: 1 << 16, ..job.parameters() });
        }
        told.cache_size == 1 << 16 && told.pages >= 2 * ENOUGH
    });
    pair.assert_moved(&outcome);
}

/// What fails, the guest survives; the next migration knows nothing of what the first has sent.
#[test]
fn a_guest_that_stays_goes_the_next_time() {
    let mut pair = Pair::differing(100, 1 << 20, 20);
    let outcome = pair.run(Faults { cut_at: Some(1_000_000), ..Faults::default() });
    pair.assert_stayed(&outcome);
    assert!(outcome.statistics.xbzrle.unwrap().pages > 0);
    pair.renew_destination();
    pair.assert_moved(&pair.go_when_enough(|told, _| told.pages >= ENOUGH));
}

#[test]
fn a_cache_that_is_larger_than_memory_leaves_the_guest() {
    let pair = Pair::differing(100, 1 << 63, 20);
    let outcome = pair.run(Faults::default());
    pair.assert_stayed(&outcome);
    let why = outcome.source.unwrap_err().to_string();
    assert!(why.contains("xbzrle-cache-size 9223372036854775808"), "{why}");
}
