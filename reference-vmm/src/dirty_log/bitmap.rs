//! A bit for each page of each RAM block.

use crate::memory::GuestMemory;

/// Pages in a word of the bitmap.
pub const PAGES_PER_WORD: u64 = 64;

/// The pages that are dirty, by RAM block.
///
/// ```
/// use reference_vmm::dirty_log::DirtyBitmap;
/// use reference_vmm::memory::GuestMemory;
/// let memory = GuestMemory::microvm(2 << 20, &[0; 64 << 10])?;
/// let mut dirty = DirtyBitmap::all(&memory);
/// assert_eq!(dirty.count_of(0), 512);
/// assert_eq!(dirty.take(0, 64, 1), [u64::MAX]);
/// assert_eq!((dirty.count_of(0), dirty.next(0, 64)), (448, Some(128)));
/// # Ok::<(), reference_vmm::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    blocks: Vec<Block>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    words: Vec<u64>,
    pages: u64,
    dirty: u64,
}

impl DirtyBitmap {
    /// No page is dirty.
    pub fn none(memory: &GuestMemory) -> DirtyBitmap {
        let block = |pages: u64| Block { words: vec![0; pages.div_ceil(PAGES_PER_WORD) as usize], pages, dirty: 0 };
        DirtyBitmap { blocks: memory.blocks().iter().map(|b| block(b.pages())).collect() }
    }

    /// Every page is dirty.
    pub fn all(memory: &GuestMemory) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::none(memory);
        for block in 0..bitmap.blocks.len() {
            let words = vec![u64::MAX; bitmap.blocks[block].words.len()];
            bitmap.add(block, 0, &words);
        }
        bitmap
    }

    /// Marks pages, 64 to a word, of which the first is `first_page`. Bits beyond the end of the block are ignored.
    /// Returns how many were clean.
    ///
    /// # Panics
    /// Never for a block of the memory it was made for and a `first_page` that is a multiple of 64.
    pub fn add(&mut self, block: usize, first_page: u64, pages: &[u64]) -> u64 {
        debug_assert!(first_page.is_multiple_of(PAGES_PER_WORD));
        let block = &mut self.blocks[block];
        let first = (first_page / PAGES_PER_WORD) as usize;
        let mut new = 0;
        for (index, (into, word)) in
            block.words.iter_mut().enumerate().skip(first).zip(pages).map(|((i, w), p)| (i, (w, p)))
        {
            let left = block.pages - index as u64 * PAGES_PER_WORD;
            let mask = if left < PAGES_PER_WORD { (1 << left) - 1 } else { u64::MAX };
            let fresh = word & mask & !*into;
            *into |= fresh;
            new += u64::from(fresh.count_ones());
        }
        block.dirty += new;
        new
    }

    /// Takes `words` words of marks away, from `first_page` (a multiple of 64) on, to be cleared and sent.
    pub fn take(&mut self, block: usize, first_page: u64, words: usize) -> Vec<u64> {
        debug_assert!(first_page.is_multiple_of(PAGES_PER_WORD));
        let block = &mut self.blocks[block];
        let first = ((first_page / PAGES_PER_WORD) as usize).min(block.words.len());
        let last = (first + words).min(block.words.len());
        let taken: Vec<u64> = block.words[first..last].iter_mut().map(std::mem::take).collect();
        block.dirty -= taken.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        taken
    }

    /// The first dirty page of a block from `page` on.
    pub fn next(&self, block: usize, page: u64) -> Option<u64> {
        let words = &self.blocks[block].words;
        let first = (page / PAGES_PER_WORD) as usize;
        let mut mask = u64::MAX << (page % PAGES_PER_WORD);
        for (index, word) in words.iter().enumerate().skip(first) {
            if word & mask != 0 {
                return Some(index as u64 * PAGES_PER_WORD + u64::from((word & mask).trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// Whether a page is marked; pages that do not exist are not.
    pub fn contains(&self, block: usize, page: u64) -> bool {
        let word = self.blocks[block].words.get((page / PAGES_PER_WORD) as usize);
        word.is_some_and(|word| word >> (page % PAGES_PER_WORD) & 1 != 0)
    }

    /// Dirty pages of a block.
    pub fn count_of(&self, block: usize) -> u64 {
        self.blocks[block].dirty
    }

    /// Dirty pages of all blocks.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::microvm(2 << 20, &[0; 64 << 10]).unwrap()
    }

    #[test]
    fn counts_what_is_new() {
        let mut bitmap = DirtyBitmap::none(&memory());
        assert_eq!(bitmap.add(0, 64, &[0b1011, 1]), 4);
        assert_eq!(bitmap.add(0, 64, &[0b1111]), 1);
        assert_eq!(bitmap.count(), 5);
        assert!(bitmap.contains(0, 67) && !bitmap.contains(0, 68) && !bitmap.contains(0, 1 << 40));
        assert_eq!(bitmap.take(0, 64, 2), [0b1111, 1]);
        assert_eq!(bitmap.count(), 0);
        assert_eq!(bitmap.take(0, 1 << 20, 2), [0; 0]);
    }

    #[test]
    fn bits_beyond_the_end_are_ignored() {
        let mut bitmap = DirtyBitmap::none(&memory());
        // pc.bios has 16 pages.
        assert_eq!(bitmap.add(2, 0, &[u64::MAX, u64::MAX]), 16);
        assert_eq!(DirtyBitmap::all(&memory()).count(), 512 + 1 + 16 + 1 + 1);
    }

    #[test]
    fn finds_the_next_page() {
        let mut bitmap = DirtyBitmap::none(&memory());
        bitmap.add(0, 0, &[1 << 5, 0, 1 << 63]);
        let mut found = Vec::new();
        let mut page = 0;
        while let Some(next) = bitmap.next(0, page) {
            found.push(next);
            page = next + 1;
        }
        assert_eq!(found, [5, 191]);
        assert_eq!(bitmap.next(0, u64::MAX), None);
    }
}
