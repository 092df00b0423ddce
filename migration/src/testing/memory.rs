//! A guest that is memory, and its dirty log.

use super::Random;
use qevm_returnpath::requests::{PageFaults, RequestBlock, RequestBlocks};
use qevm_wire::CountedString;
use std::ops::Range;

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
/// Names of the RAM blocks, in the order of the stream.
pub(super) const BLOCKS: [&str; 2] = ["microvm.ram", "pc.bios"];

/// The memory of a guest, and a log of the pages that it has written to. Pages are numbered through all blocks.
///
/// The log is that of KVM with `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: reading it tells what was written to, and resetting
/// takes out what was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    pages: Vec<Vec<u8>>,
    /// Pages of each block.
    blocks: Vec<usize>,
    /// Written to since the bit was reset.
    written: Vec<bool>,
    /// Told by the last reading of the log.
    told: Vec<bool>,
}

impl Memory {
    /// Blocks of this many pages of zeroes, all of which are in the log.
    pub fn new(blocks: &[usize]) -> Self {
        let pages = blocks.iter().sum();
        let (written, told) = (vec![true; pages], vec![false; pages]);
        Memory { pages: vec![vec![0; PAGE]; pages], blocks: blocks.to_vec(), written, told }
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Bytes of a block; `None` if there is none of this number.
    pub fn block_len(&self, block: usize) -> Option<u64> {
        self.blocks.get(block).map(|pages| (pages * PAGE) as u64)
    }

    /// The number of a page of a block, which lies in it.
    pub fn index(&self, block: usize, page: u64) -> usize {
        self.blocks[..block].iter().sum::<usize>() + page as usize
    }

    /// The block of a page, and its number in it.
    pub fn place(&self, mut page: usize) -> (usize, usize) {
        for (block, pages) in self.blocks.iter().enumerate() {
            if page < *pages {
                return (block, page);
            }
            page -= pages;
        }
        (self.blocks.len(), page)
    }

    /// The book of the pages that are waited for, by the numbers of the blocks here.
    pub(super) fn faults(&self) -> Option<PageFaults> {
        let blocks = BLOCKS.iter().zip(&self.blocks);
        let block = |(name, pages): (&&str, &usize)| {
            let (used_length, page_size) = ((pages * PAGE) as u64, PAGE as u64);
            CountedString::new(name).map(|name| RequestBlock { name, used_length, page_size })
        };
        RequestBlocks::new(blocks.filter_map(block).collect()).ok().map(PageFaults::new)
    }

    /// The content of a page.
    pub fn page(&self, page: usize) -> &[u8] {
        &self.pages[page]
    }

    /// The content of a page, to be written by others than the guest.
    pub fn page_mut(&mut self, page: usize) -> &mut [u8] {
        &mut self.pages[page]
    }

    /// The guest writes to a page somewhere, and clears one of five.
    pub fn work(&mut self, random: &mut Random) {
        let page = random.below(self.pages.len() as u64) as usize;
        self.written[page] = true;
        if random.once_in(5) {
            self.pages[page].fill(0);
        } else {
            let at = random.below(PAGE as u64 / 8) as usize * 8;
            self.pages[page][at..at + 8].copy_from_slice(&random.number().to_le_bytes());
        }
    }

    /// Reads the log: block, number of the word and the word, as [`DirtyLog::read`](crate::DirtyLog::read).
    pub fn read_log(&mut self, mut found: impl FnMut(usize, usize, u64)) {
        self.told.clone_from(&self.written);
        let mut first = 0;
        for (block, pages) in self.blocks.iter().enumerate() {
            for (number, word) in self.told[first..first + pages].chunks(64).enumerate() {
                found(block, number, word.iter().rev().fold(0, |bits, bit| bits << 1 | u64::from(*bit)));
            }
            first += pages;
        }
    }

    /// Takes what was told of these pages of a block out of the log.
    pub fn reset(&mut self, block: usize, pages: Range<u64>) {
        for page in self.index(block, pages.start)..self.index(block, pages.end) {
            self.written[page] &= !self.told[page];
        }
    }

    /// The pages in which `other` differs.
    pub fn differences(&self, other: &Memory) -> Vec<usize> {
        (0..self.pages.len()).filter(|page| self.pages[*page] != other.pages[*page]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_after_a_reading_stays_in_the_log() {
        let mut memory = Memory::new(&[70, 3]);
        let words = |memory: &mut Memory| {
            let mut words = Vec::new();
            memory.read_log(|block, number, word| words.push((block, number, word)));
            words
        };
        assert_eq!(words(&mut memory), [(0, 0, u64::MAX), (0, 1, 63), (1, 0, 7)]);
        memory.reset(0, 0..70);
        assert_eq!(words(&mut memory), [(0, 0, 0), (0, 1, 0), (1, 0, 7)]);
        let at = memory.index(1, 2);
        assert_eq!(at, 72);
        memory.written[65] = true;
        memory.reset(0, 0..70);
        memory.reset(1, 2..3);
        assert_eq!(words(&mut memory), [(0, 0, 0), (0, 1, 2), (1, 0, 3)]);
    }
}
