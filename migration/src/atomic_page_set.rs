//! Which pages of a RAM block a destination has written to.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bit for every page, which any thread may set. The thread that sets one and the thread that asks for it are kept in
/// order by the synchronisation of the channels.
#[derive(Debug)]
pub(crate) struct AtomicPageSet(Vec<AtomicU64>);

const BITS: u64 = u64::BITS as u64;

impl AtomicPageSet {
    /// For a block of `pages` pages, all of which count as written to if `all` says so.
    pub(crate) fn new(pages: u64, all: bool) -> Self {
        let word = if all { u64::MAX } else { 0 };
        AtomicPageSet((0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(word)).collect())
    }

    /// Adds pages; those after the end are left out.
    pub(crate) fn mark(&self, pages: Range<u64>) {
        for (word, bits) in words(&pages).zip(self.0.iter().skip((pages.start / BITS) as usize)) {
            bits.fetch_or(mask(word, &pages), Ordering::Relaxed);
        }
    }

    /// Adds a page; false if it was there, or lies after the end.
    pub(crate) fn claim(&self, page: u64) -> bool {
        let bit = 1 << (page % BITS);
        self.0.get((page / BITS) as usize).is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }

    /// Takes pages out; those after the end are left out.
    pub(crate) fn clear(&self, pages: Range<u64>) {
        for (word, bits) in words(&pages).zip(self.0.iter().skip((pages.start / BITS) as usize)) {
            bits.fetch_and(!mask(word, &pages), Ordering::Relaxed);
        }
    }

    /// A byte for each eight pages, the first of them in the lowest bit: whole 64-bit words.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect()
    }

    /// The runs of pages that are not there, of the first `pages`.
    pub(crate) fn gaps(&self, pages: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        // From a page on, the first that is there or is not.
        let next = move |from: u64, there: bool| {
            let flip = if there { 0 } else { u64::MAX };
            let mut mask = u64::MAX << (from % BITS);
            for (number, word) in self.0.iter().enumerate().skip((from / BITS) as usize) {
                let found = (word.load(Ordering::Relaxed) ^ flip) & mask;
                if found != 0 {
                    return pages.min(number as u64 * BITS + u64::from(found.trailing_zeros()));
                }
                mask = u64::MAX;
            }
            pages
        };
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = next(from, false);
            from = next(start, true);
            (start < pages).then_some(start..from)
        })
    }

    /// Whether a page was written to.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.0.get((page / BITS) as usize).is_some_and(|word| word.load(Ordering::Relaxed) >> (page % BITS) & 1 != 0)
    }
}

/// The words that have bits of `pages`.
fn words(pages: &Range<u64>) -> Range<u64> {
    pages.start / BITS..if pages.is_empty() { 0 } else { pages.end.div_ceil(BITS) }
}

/// The bits of one of these words.
fn mask(word: u64, pages: &Range<u64>) -> u64 {
    let first = word * BITS;
    let low = u64::MAX << pages.start.saturating_sub(first);
    let high = u64::MAX >> (BITS - (pages.end - first).min(BITS));
    low & high
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::iter;

    #[test]
    fn exactly_what_was_marked_is_there() {
        for range in [0..1, 5..64, 63..65, 64..128, 1..199, 190..300, 7..7] {
            let set = AtomicPageSet::new(200, false);
            set.mark(range.clone());
            for page in 0..200 {
                assert_eq!(set.contains(page), range.contains(&page), "{page} of {range:?}");
            }
        }
        let set = AtomicPageSet::new(200, true);
        set.clear(63..130);
        assert!((0..200).all(|page| set.contains(page) != (63..130).contains(&page)));
        let bytes = set.to_bytes();
        assert_eq!((bytes.len(), bytes[7], bytes[8], bytes[16]), (32, 0x7f, 0, 0xfc));
        assert!(
            set.gaps(200).eq(iter::once(63..130)) && AtomicPageSet::new(200, false).gaps(190).eq(iter::once(0..190))
        );
        set.mark(70..80);
        assert!(set.gaps(100).eq([63..70, 80..100]) && AtomicPageSet::new(200, true).gaps(200).eq([]));
        set.clear(70..80);
        assert!(set.claim(64) && !set.claim(64) && !set.claim(62) && !set.claim(256));
        assert!(set.contains(64) && !set.contains(65));
        assert!(AtomicPageSet::new(3, true).contains(2));
        assert!(!AtomicPageSet::new(3, true).contains(64));
    }
}
