//! A set of page numbers that costs memory only around its members.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Words of one chunk of the set: 4096 pages.
const WORDS: usize = 64;
const CHUNK: u64 = WORDS as u64 * 64;

#[derive(Debug, Clone, Default)]
pub(super) struct PageSet {
    /// No chunk is empty.
    chunks: BTreeMap<u64, [u64; WORDS]>,
    len: u64,
}

impl PageSet {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Adds `count` pages from `first`, and says how many of them are new.
    pub(super) fn insert(&mut self, first: u64, count: u64) -> u64 {
        let before = self.len;
        let (mut page, end) = (first, first.saturating_add(count));
        while page < end {
            let chunk = self.chunks.entry(page / CHUNK).or_insert([0; WORDS]);
            let chunk_end = (page / CHUNK + 1).saturating_mul(CHUNK).min(end);
            while page < chunk_end {
                let word_end = (page / 64 + 1).saturating_mul(64).min(chunk_end);
                let mask = mask(page, word_end);
                let word = &mut chunk[(page % CHUNK / 64) as usize];
                self.len += u64::from((mask & !*word).count_ones());
                *word |= mask;
                page = word_end;
            }
        }
        self.len - before
    }

    /// Removes `count` pages from `first`, and says how many of them were there.
    pub(super) fn remove(&mut self, first: u64, count: u64) -> u64 {
        let (before, end) = (self.len, first.saturating_add(count));
        let numbers: Vec<u64> = self.chunks.range(first / CHUNK..=end / CHUNK).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(chunk) = self.chunks.get_mut(&number) else { continue };
            let mut page = first.max(number * CHUNK);
            let chunk_end = (number + 1).saturating_mul(CHUNK).min(end);
            while page < chunk_end {
                let word_end = (page / 64 + 1).saturating_mul(64).min(chunk_end);
                let mask = mask(page, word_end);
                let word = &mut chunk[(page % CHUNK / 64) as usize];
                self.len -= u64::from((mask & *word).count_ones());
                *word &= !mask;
                page = word_end;
            }
            if chunk.iter().all(|word| *word == 0) {
                self.chunks.remove(&number);
            }
        }
        before - self.len
    }

    /// The first member among `count` pages from `first`.
    pub(super) fn first_of(&self, first: u64, count: u64) -> Option<u64> {
        let end = first.saturating_add(count);
        self.chunks.range(first / CHUNK..=end / CHUNK).find_map(|(number, chunk)| {
            let base = number * CHUNK;
            let mut page = first.max(base);
            let chunk_end = end.min(base.saturating_add(CHUNK));
            while page < chunk_end {
                let word_end = (page / 64 + 1).saturating_mul(64).min(chunk_end);
                let members = chunk[(page % CHUNK / 64) as usize] & mask(page, word_end);
                if members != 0 {
                    return Some(page / 64 * 64 + u64::from(members.trailing_zeros()));
                }
                page = word_end;
            }
            None
        })
    }

    /// All members in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.chunks.iter().flat_map(|(number, chunk)| {
            (0..).zip(chunk).flat_map(move |(i, word)| {
                (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| number * CHUNK + i * 64 + bit)
            })
        })
    }
}

/// The bits of the pages from `first` to before `end`, which lie in one word.
fn mask(first: u64, end: u64) -> u64 {
    let low = u64::MAX << (first % 64);
    match end % 64 {
        0 => low,
        bits => low & !(u64::MAX << bits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn ranges_cross_chunks() {
        let mut set = PageSet::default();
        assert_eq!(set.insert(100, 20_000), 20_000);
        assert_eq!(set.insert(0, 20_200), 200);
        assert_eq!(
            (set.len(), set.first_of(0, 1), set.first_of(20_199, 9), set.first_of(20_200, 9)),
            (20_200, Some(0), Some(20_199), None)
        );
        assert!(set.iter().eq(0..20_200));
    }

    // Around the border of two chunks.
    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 3_900u64..4_300, 1u64..250), 1..10)) {
            let (mut set, mut model) = (PageSet::default(), BTreeSet::new());
            for (insert, first, count) in steps {
                if insert {
                    let new = (first..first + count).filter(|page| model.insert(*page)).count() as u64;
                    prop_assert_eq!(set.insert(first, count), new);
                } else {
                    let gone = (first..first + count).filter(|page| model.remove(page)).count() as u64;
                    prop_assert_eq!(set.remove(first, count), gone);
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert_eq!(set.first_of(first, count), model.range(first..first + count).next().copied());
            }
            prop_assert!(set.iter().eq(model.iter().copied()));
            model.iter().for_each(|page| assert_eq!(set.remove(*page, 1), 1));
            prop_assert!(set.chunks.is_empty());
        }
    }
}
