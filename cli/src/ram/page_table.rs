//! Facts about every page of the guest, in bounded memory however large the guest is.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What is known of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageState {
    /// The stream never gave this page any content; a destination has it as zeroes.
    #[default]
    Absent,
    /// Its last content was all zeroes.
    Zero,
    /// Its last content was not all zeroes.
    Data,
}

/// Pages in one chunk of the table.
const CHUNK_PAGES: u64 = 16 * 1024;
const STATE_BYTES: usize = CHUNK_PAGES as usize / 4;
const CRC_BYTES: usize = CHUNK_PAGES as usize * 4;
const CHUNK_BYTES: usize = STATE_BYTES + CRC_BYTES;
/// Chunks held in memory (16 MiB, the pages of a 15 GiB guest); the others rest in an unlinked temporary file.
const RESIDENT_CHUNKS: usize = 240;

/// CRC-32 and [`PageState`] of each page, by a page number that counts through all RAM blocks.
///
/// Pages come almost in order, so a chunk that is pushed out to the file is rarely needed again soon.
#[derive(Debug, Default)]
pub(super) struct PageTable {
    resident: HashMap<u64, Slot>,
    spilled: HashMap<u64, ()>,
    file: Option<File>,
    clock: u64,
    current: u64,
}

#[derive(Debug)]
struct Slot {
    bytes: Box<[u8]>,
    last_use: u64,
}

impl PageTable {
    /// The first page number at or above `page` that starts a chunk. RAM blocks start there, so that a block's digest
    /// is a matter of whole chunks.
    pub(super) fn align(page: u64) -> u64 {
        page.next_multiple_of(CHUNK_PAGES)
    }

    /// Notes state and CRC of one page and returns its state so far.
    pub(super) fn set(&mut self, page: u64, state: PageState, crc: u32) -> io::Result<PageState> {
        let (chunk, slot) = (page / CHUNK_PAGES, (page % CHUNK_PAGES) as usize);
        let bytes = self.chunk(chunk)?;
        let before = state_of(bytes, slot);
        let shift = (slot % 4) * 2;
        bytes[slot / 4] = bytes[slot / 4] & !(3 << shift) | (state as u8) << shift;
        bytes[STATE_BYTES + slot * 4..][..4].copy_from_slice(&crc.to_le_bytes());
        Ok(before)
    }

    /// The state of one page.
    pub(super) fn state(&mut self, page: u64) -> io::Result<PageState> {
        let chunk = page / CHUNK_PAGES;
        if !self.exists(chunk) {
            return Ok(PageState::Absent);
        }
        Ok(state_of(self.chunk(chunk)?, (page % CHUNK_PAGES) as usize))
    }

    /// The run that starts at `page`: absent pages up to the next one that may not be, or a single page.
    pub(super) fn run_at(&mut self, page: u64, end: u64) -> io::Result<Run> {
        let chunk = page / CHUNK_PAGES;
        if !self.exists(chunk) {
            let next = self.next_existing(chunk).map_or(end, |next| end.min(next * CHUNK_PAGES));
            return Ok(Run { state: PageState::Absent, pages: next.saturating_sub(page).max(1), crc: 0 });
        }
        let slot = (page % CHUNK_PAGES) as usize;
        let bytes = self.chunk(chunk)?;
        let crc = u32::from_le_bytes(bytes[STATE_BYTES + slot * 4..][..4].try_into().unwrap_or_default());
        Ok(Run { state: state_of(bytes, slot), pages: 1, crc })
    }

    /// Calls `visit` for all `count` pages from `first` in order, as runs of absent pages or single pages.
    pub(super) fn walk(
        &mut self,
        first: u64,
        count: u64,
        mut visit: impl FnMut(Run) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = first.saturating_add(count);
        let mut page = first;
        while page < end {
            let chunk = page / CHUNK_PAGES;
            let chunk_end = end.min((chunk + 1).saturating_mul(CHUNK_PAGES));
            if !self.exists(chunk) {
                // All that follows up to the next chunk that exists is one run: a block may claim 2^40 pages.
                let next = self.next_existing(chunk).map_or(end, |next| end.min(next * CHUNK_PAGES));
                visit(Run { state: PageState::Absent, pages: next - page, crc: 0 })?;
                page = next;
                continue;
            }
            let bytes = self.chunk(chunk)?;
            for page in page..chunk_end {
                let slot = (page % CHUNK_PAGES) as usize;
                let crc = u32::from_le_bytes(bytes[STATE_BYTES + slot * 4..][..4].try_into().unwrap_or_default());
                visit(Run { state: state_of(bytes, slot), pages: 1, crc })?;
            }
            page = chunk_end;
        }
        Ok(())
    }

    fn exists(&self, chunk: u64) -> bool {
        self.resident.contains_key(&chunk) || self.spilled.contains_key(&chunk)
    }

    fn next_existing(&self, after: u64) -> Option<u64> {
        self.resident.keys().chain(self.spilled.keys()).copied().filter(|chunk| *chunk > after).min()
    }

    fn chunk(&mut self, chunk: u64) -> io::Result<&mut [u8]> {
        if chunk != self.current || !self.resident.contains_key(&chunk) {
            self.clock += 1;
            if !self.resident.contains_key(&chunk) {
                self.make_room()?;
                let mut bytes = vec![0; CHUNK_BYTES].into_boxed_slice();
                if self.spilled.remove(&chunk).is_some()
                    && let Some(file) = &self.file
                {
                    file.read_exact_at(&mut bytes, spill_offset(chunk)?)?;
                }
                self.resident.insert(chunk, Slot { bytes, last_use: 0 });
            }
            self.current = chunk;
        }
        let clock = self.clock;
        match self.resident.get_mut(&chunk) {
            Some(slot) => {
                slot.last_use = clock;
                Ok(&mut slot.bytes)
            }
            None => Err(io::Error::other("page table lost a chunk")),
        }
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.resident.len() < RESIDENT_CHUNKS {
            return Ok(());
        }
        let oldest = self.resident.iter().min_by_key(|(_, slot)| slot.last_use).map(|(chunk, _)| *chunk);
        if let Some(chunk) = oldest
            && let Some(slot) = self.resident.remove(&chunk)
        {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(tempfile::tempfile()?),
            };
            file.write_all_at(&slot.bytes, spill_offset(chunk)?)?;
            self.spilled.insert(chunk, ());
        }
        Ok(())
    }
}

/// A run of absent pages, or one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// State of all pages of the run.
    pub(super) state: PageState,
    /// How many pages; 1 unless they are absent.
    pub(super) pages: u64,
    /// CRC-32 of the page; meaningless for absent pages.
    pub(super) crc: u32,
}

fn state_of(bytes: &[u8], slot: usize) -> PageState {
    match bytes[slot / 4] >> ((slot % 4) * 2) & 3 {
        1 => PageState::Zero,
        2 => PageState::Data,
        _ => PageState::Absent,
    }
}

fn spill_offset(chunk: u64) -> io::Result<u64> {
    chunk.checked_mul(CHUNK_BYTES as u64).ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_survive_being_pushed_out_to_the_file() {
        let mut table = PageTable::default();
        let pages: Vec<u64> = (0..2 * RESIDENT_CHUNKS as u64).map(|chunk| chunk * CHUNK_PAGES + chunk % 7).collect();
        for page in &pages {
            let state = if page % 2 == 0 { PageState::Zero } else { PageState::Data };
            assert_eq!(table.set(*page, state, *page as u32).unwrap(), PageState::Absent);
        }
        assert!(table.resident.len() <= RESIDENT_CHUNKS && !table.spilled.is_empty());
        let mut seen = Vec::new();
        let mut total = 0;
        table
            .walk(0, 1 << 40, |run| {
                if run.state != PageState::Absent {
                    assert_eq!(run.crc, total as u32);
                    seen.push(total);
                }
                total += run.pages;
                Ok(())
            })
            .unwrap();
        assert_eq!(total, 1 << 40);
        assert_eq!(seen, pages);
    }

    #[test]
    fn the_last_content_of_a_page_wins() {
        let mut table = PageTable::default();
        table.set(5, PageState::Data, 7).unwrap();
        assert_eq!(table.set(5, PageState::Absent, 0).unwrap(), PageState::Data);
        assert_eq!(table.state(5).unwrap(), PageState::Absent);
        assert_eq!(table.state(1 << 50).unwrap(), PageState::Absent);
    }
}
