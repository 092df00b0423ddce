//! Sets of pages of one RAM block.

use std::ops::Range;

/// A bit for every page of a RAM block, and how many are set.
///
/// ```
/// use qevm_migration::bitmap::PageBitmap;
///
/// let mut dirty = PageBitmap::new(100);
/// dirty.set_range(62..67);
/// assert_eq!(dirty.next_run(0..100, 1000), Some(62..67));
/// assert_eq!(dirty.next_run(64..100, 2), Some(64..66));
/// dirty.clear_range(62..66);
/// assert_eq!((dirty.count(), dirty.next_run(0..100, 1000)), (1, Some(66..67)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

const BITS: u64 = u64::BITS as u64;

impl PageBitmap {
    /// An empty set for a block of `pages` pages.
    pub fn new(pages: u64) -> Self {
        PageBitmap { words: vec![0; pages.div_ceil(BITS) as usize], pages, count: 0 }
    }

    /// The set of all pages of a block of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut bitmap = Self::new(pages);
        bitmap.set_range(0..pages);
        bitmap
    }

    /// How many pages the block has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether `page` is in the set; pages outside the block are not.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / BITS) as usize).is_some_and(|word| word >> (page % BITS) & 1 != 0)
    }

    /// Adds the pages of `word`, bit 0 of which is page `64 * index`, and says how many were new. Bits after the end
    /// of the block are ignored.
    pub fn merge_word(&mut self, index: usize, word: u64) -> u64 {
        let Some(slot) = self.words.get_mut(index) else { return 0 };
        let new = word & !*slot & in_block(index, self.pages);
        *slot |= new;
        let added = u64::from(new.count_ones());
        self.count += added;
        added
    }

    /// Takes the pages of `word`, bit 0 of which is page `64 * index`, out.
    pub fn clear_word(&mut self, index: usize, word: u64) {
        let Some(slot) = self.words.get_mut(index) else { return };
        self.count -= u64::from((*slot & word).count_ones());
        *slot &= !word;
    }

    /// Adds the pages of `other`, which is empty afterwards, and says how many were new.
    pub fn take_all(&mut self, other: &mut PageBitmap) -> u64 {
        if other.count == 0 {
            return 0;
        }
        other.count = 0;
        let words = other.words.iter_mut().enumerate();
        words.map(|(index, word)| self.merge_word(index, std::mem::take(word))).sum()
    }

    /// Adds a range of pages, cut at the end of the block.
    pub fn set_range(&mut self, pages: Range<u64>) {
        for (index, mask) in masks(pages, self.pages) {
            self.merge_word(index, mask);
        }
    }

    /// Takes a range of pages out.
    pub fn clear_range(&mut self, pages: Range<u64>) {
        for (index, mask) in masks(pages, self.pages) {
            self.clear_word(index, mask);
        }
    }

    /// The first run of pages in the set within a range, cut to at most `limit` pages.
    pub fn next_run(&self, within: Range<u64>, limit: u64) -> Option<Range<u64>> {
        let within = within.start..within.end.min(self.pages);
        let start = self.next_where(within.clone(), |word| word)?;
        let end = start.saturating_add(limit).min(within.end);
        Some(start..self.next_where(start..end, |word| !word).unwrap_or(end))
    }

    /// The first page of a range within the block whose bit `view` sets.
    fn next_where(&self, within: Range<u64>, view: impl Fn(u64) -> u64) -> Option<u64> {
        let first = (within.start / BITS) as usize;
        let words = self.words.get(first..within.end.div_ceil(BITS) as usize)?;
        let page = words.iter().enumerate().find_map(|(i, word)| {
            let word = view(*word) & if i == 0 { u64::MAX << (within.start % BITS) } else { u64::MAX };
            (word != 0).then(|| (first + i) as u64 * BITS + u64::from(word.trailing_zeros()))
        });
        page.filter(|page| *page < within.end)
    }
}

/// The bits of word `index` that are pages of a block of `pages` pages.
fn in_block(index: usize, pages: u64) -> u64 {
    match pages.saturating_sub(index as u64 * BITS) {
        left if left >= BITS => u64::MAX,
        left => (1 << left) - 1,
    }
}

/// The words that `range` touches and which bits of them.
fn masks(range: Range<u64>, pages: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = range.end.min(pages);
    let start = range.start.min(end);
    (start / BITS..end.div_ceil(BITS))
        .map(move |index| {
            let low = u64::MAX << start.saturating_sub(index * BITS).min(BITS - 1);
            let keep = (end - index * BITS).min(BITS);
            (index as usize, low & (u64::MAX >> (BITS - keep)))
        })
        .filter(move |_| start < end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn it_behaves_as_a_set(pages in 1u64..300, steps in prop::collection::vec((any::<bool>(), 0u64..310, 0u64..200), 0..20), within in (0u64..310, 0u64..320), limit in 1u64..100, word in (0usize..6, any::<u64>())) {
            let (mut bitmap, mut set) = (PageBitmap::new(pages), BTreeSet::new());
            for (add, start, len) in steps {
                if add {
                    bitmap.set_range(start..start + len);
                    set.extend((start..start + len).filter(|page| *page < pages));
                } else {
                    bitmap.clear_range(start..start + len);
                    set.retain(|page| !(start..start + len).contains(page));
                }
            }
            prop_assert_eq!(bitmap.count(), set.len() as u64);
            for page in 0..320 {
                prop_assert_eq!(bitmap.contains(page), set.contains(&page));
            }
            let (from, to) = (within.0.min(within.1), within.1);
            let run = set.range(from..to).next().map(|start| {
                let end = (*start..).find(|page| !set.contains(page)).unwrap();
                *start..end.min(start + limit).min(to)
            });
            prop_assert_eq!(bitmap.next_run(from..to, limit), run);

            bitmap.clear_word(word.0, word.1);
            set.retain(|page| page / 64 != word.0 as u64 || word.1 >> (page % 64) & 1 == 0);
            prop_assert_eq!((bitmap.count(), (0..320).filter(|page| bitmap.contains(*page)).collect()), (set.len() as u64, set));
        }

        #[test]
        fn a_set_takes_over_another(pages in 1u64..300, words in prop::collection::vec(any::<[u64; 2]>(), 5)) {
            let (mut into, mut other) = (PageBitmap::new(pages), PageBitmap::new(pages));
            for (index, word) in words.iter().enumerate() {
                into.merge_word(index, word[0]);
                other.merge_word(index, word[1]);
            }
            let (mut expected, before) = (into.clone(), into.count());
            for (index, word) in words.iter().enumerate() {
                expected.merge_word(index, word[1]);
            }
            prop_assert_eq!(into.take_all(&mut other), expected.count() - before);
            prop_assert_eq!((into, other), (expected, PageBitmap::new(pages)));
        }

        #[test]
        fn merging_words_counts_what_is_new(words in prop::collection::vec(any::<u64>(), 1..6), pages in 1u64..400) {
            let mut bitmap = PageBitmap::new(pages);
            let added: u64 = words.iter().enumerate().map(|(i, word)| bitmap.merge_word(i, *word)).sum();
            prop_assert_eq!(added, bitmap.count());
            prop_assert!((0..pages).all(|p| bitmap.contains(p) == words.get((p / 64) as usize).is_some_and(|w| w >> (p % 64) & 1 == 1)));
            prop_assert_eq!(words.iter().enumerate().map(|(i, word)| bitmap.merge_word(i, *word)).sum::<u64>(), 0);
        }
    }

    #[test]
    fn full_is_every_page_and_none_behind_the_end() {
        for pages in [1, 63, 64, 65, 128, 1000] {
            let full = PageBitmap::full(pages);
            assert_eq!((full.count(), full.next_run(0..pages, u64::MAX)), (pages, Some(0..pages)));
        }
    }
}
