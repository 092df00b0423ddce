//! Which pages of a RAM block a destination has written to.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// A bit for every page, which any thread may set. Who sets one and who asks for it are kept in order by the synchronisation of
/// the channels.
#[derive(Debug)]
pub(crate) struct Touched(Vec<AtomicU64>);

const BITS: u64 = u64::BITS as u64;

impl Touched {
    /// For a block of `pages` pages, all of which count as written to if `all` says so.
    pub(crate) fn new(pages: u64, all: bool) -> Self {
        let word = if all { u64::MAX } else { 0 };
        Touched((0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(word)).collect())
    }

    /// Adds pages; those behind the end are left out.
    pub(crate) fn mark(&self, pages: Range<u64>) {
        for (word, bits) in (pages.start / BITS..).zip(self.0.iter().skip((pages.start / BITS) as usize)) {
            let first = word * BITS;
            if first >= pages.end {
                return;
            }
            let low = u64::MAX << pages.start.saturating_sub(first);
            let high = u64::MAX >> (BITS - (pages.end - first).min(BITS));
            bits.fetch_or(low & high, Ordering::Relaxed);
        }
    }

    /// Whether a page was written to.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.0.get((page / BITS) as usize).is_some_and(|word| word.load(Ordering::Relaxed) >> (page % BITS) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_what_was_marked_is_there() {
        for range in [0..1, 5..64, 63..65, 64..128, 1..199, 190..300, 7..7] {
            let touched = Touched::new(200, false);
            touched.mark(range.clone());
            for page in 0..200 {
                assert_eq!(touched.contains(page), range.contains(&page), "{page} of {range:?}");
            }
        }
        assert!(Touched::new(3, true).contains(2));
        assert!(!Touched::new(3, true).contains(64));
    }
}
