//! A guest that is memory, and its dirty log.

use super::Random;

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

/// The memory of a guest, and a log of the pages that it has written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    pages: Vec<Vec<u8>>,
    /// Written to since the bit was reset.
    dirty: Vec<bool>,
}

impl Memory {
    /// So many pages of zeroes, none of them in the log.
    pub fn new(pages: usize) -> Self {
        Memory { pages: vec![vec![0; PAGE]; pages], dirty: vec![false; pages] }
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// The content of a page.
    pub fn page(&self, page: usize) -> &[u8] {
        &self.pages[page]
    }

    /// The content of a page, to be written by whoever is not the guest.
    pub fn page_mut(&mut self, page: usize) -> &mut [u8] {
        &mut self.pages[page]
    }

    /// The guest writes to a page somewhere, and clears one of five.
    pub fn work(&mut self, random: &mut Random) {
        let page = random.below(self.pages.len() as u64) as usize;
        self.dirty[page] = true;
        if random.once_in(5) {
            self.pages[page].fill(0);
        } else {
            let at = random.below(PAGE as u64 / 8) as usize * 8;
            self.pages[page][at..at + 8].copy_from_slice(&random.number().to_le_bytes());
        }
    }

    /// All pages are in the log.
    pub fn log_all(&mut self) {
        self.dirty.fill(true);
    }

    /// The pages in the log.
    pub fn dirty(&self) -> Vec<usize> {
        (0..self.pages.len()).filter(|page| self.dirty[*page]).collect()
    }

    /// Takes a page out of the log.
    pub fn reset(&mut self, page: usize) {
        self.dirty[page] = false;
    }

    /// The first page in which `other` differs.
    pub fn difference(&self, other: &Memory) -> Option<usize> {
        (0..self.pages.len()).find(|page| self.pages[*page] != other.pages[*page])
    }
}
