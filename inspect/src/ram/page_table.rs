//! Facts about every page of the guest: what they cost follows what was told of pages, and not how large the guest says
//! it is.

use super::chunk::{Chunk, PAGES as CHUNK_PAGES, Tally};
use crate::bounds::Spool;
use std::collections::{BTreeMap, HashMap};
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

/// Full chunks held in memory (16 MiB, the pages of a 15 GiB guest); the others rest in an unlinked temporary file.
const RESIDENT_CHUNKS: usize = 240;
/// How often a chunk may come back from the file, on average, before no more are put there: pages that come in the
/// worst order must not cost a chunk's reading and writing each.
const RETURNS: u64 = 4;

/// CRC-32 and [`PageState`] of each page, by a page number that counts through all RAM blocks.
///
/// Pages come almost in order, so a chunk that is pushed out to the file is rarely needed again soon.
#[derive(Debug)]
pub(super) struct PageTable {
    chunks: BTreeMap<u64, Chunk>,
    /// The full chunks in memory, and when each was used last.
    full: HashMap<u64, u64>,
    spool: Spool,
    file: Option<File>,
    /// Places in the file, all of them and those that are free again.
    places: u64,
    free: Vec<u64>,
    returns: u64,
    clock: u64,
    current: u64,
}

impl PageTable {
    /// A table of absent pages; what it pushes out to a file comes out of `spool`.
    pub(super) fn new(spool: Spool) -> Self {
        PageTable {
            chunks: BTreeMap::new(),
            full: HashMap::new(),
            spool,
            file: None,
            places: 0,
            free: Vec::new(),
            returns: 0,
            clock: 0,
            current: u64::MAX,
        }
    }

    /// The first page number at or above `page` that starts a chunk. RAM blocks start there, so that a block's digest
    /// is a matter of whole chunks.
    pub(super) fn align(page: u64) -> u64 {
        page.checked_next_multiple_of(CHUNK_PAGES).unwrap_or(u64::MAX)
    }

    /// Notes state and CRC of one page and returns its state so far.
    pub(super) fn set(&mut self, page: u64, state: PageState, crc: u32) -> io::Result<PageState> {
        let (number, slot) = (page / CHUNK_PAGES, (page % CHUNK_PAGES) as u16);
        self.bring_back(number)?;
        let chunk = self.chunks.entry(number).or_default();
        let before = chunk.set(slot, state, crc);
        if chunk.is_full_form() {
            self.used(number)?;
        }
        Ok(before)
    }

    /// Gives `count` pages from `first` on a content of zeroes ([`PageState::Zero`]) or none, and tells how many pages
    /// had which before. Whole chunks cost one step.
    pub(super) fn fill(&mut self, first: u64, count: u64, state: PageState) -> io::Result<Tally> {
        let end = first.saturating_add(count);
        let mut before = Tally::default();
        let mut page = first;
        while page < end {
            let number = page / CHUNK_PAGES;
            let chunk_end = (number + 1).saturating_mul(CHUNK_PAGES);
            if state == PageState::Absent && !self.chunks.contains_key(&number) {
                // Nothing was told of what lies up to the next chunk.
                let next = self.chunks.range(number..).next().map_or(end, |(next, _)| next * CHUNK_PAGES);
                page = next.min(end);
                continue;
            }
            if page.is_multiple_of(CHUNK_PAGES) && end >= chunk_end {
                before += self.tally(number)?;
                self.forget(number);
                if state == PageState::Zero {
                    self.chunks.insert(number, Chunk::Zeroes);
                }
            } else {
                self.bring_back(number)?;
                let chunk = self.chunks.entry(number).or_default();
                let (from, to) = (page % CHUNK_PAGES, end.min(chunk_end) - number * CHUNK_PAGES);
                before += chunk.fill(from as u16, to as u16, state);
                if chunk.is_full_form() {
                    self.used(number)?;
                } else if chunk.is_empty() {
                    self.forget(number);
                }
            }
            page = chunk_end.min(end);
        }
        Ok(before)
    }

    /// The state of one page.
    pub(super) fn state(&mut self, page: u64) -> io::Result<PageState> {
        Ok(self.run_at(page, page.saturating_add(1))?.state)
    }

    /// The run that starts at `page` and ends at `end` at the latest: pages that are absent or zero, or a single page.
    pub(super) fn run_at(&mut self, page: u64, end: u64) -> io::Result<Run> {
        let number = page / CHUNK_PAGES;
        if !self.chunks.contains_key(&number) {
            // All that follows up to the next chunk is one run: a block may claim 2^40 pages.
            let next = self.chunks.range(number..).next().map_or(end, |(next, _)| next * CHUNK_PAGES);
            return Ok(Run { state: PageState::Absent, pages: next.min(end).saturating_sub(page).max(1), crc: 0 });
        }
        self.bring_back(number)?;
        let left = end.saturating_sub(page).max(1);
        let run = self.chunks.get(&number).map(|chunk| chunk.run_at((page % CHUNK_PAGES) as u16));
        let run = run.ok_or_else(lost)?;
        self.used(number)?;
        Ok(Run { pages: run.pages.min(left), ..run })
    }

    /// Calls `visit` for all `count` pages from `first` in order, as runs of absent pages, runs of pages of zeroes, and
    /// single pages.
    pub(super) fn walk(
        &mut self,
        first: u64,
        count: u64,
        mut visit: impl FnMut(Run) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = first.saturating_add(count);
        let mut page = first;
        // Runs go on over the ends of chunks.
        let mut open = Run { state: PageState::Absent, pages: 0, crc: 0 };
        while page < end {
            let run = self.run_at(page, end)?;
            page += run.pages;
            if run.state != PageState::Data && run.state == open.state {
                open.pages += run.pages;
                continue;
            }
            if open.pages > 0 {
                visit(open)?;
            }
            open = run;
        }
        if open.pages > 0 { visit(open) } else { Ok(()) }
    }

    /// How many pages of a chunk have which content.
    fn tally(&mut self, number: u64) -> io::Result<Tally> {
        match self.chunks.get(&number) {
            None => Ok(Tally::default()),
            Some(Chunk::Spilled(place)) => Ok(self.read_back(*place)?.tally()),
            Some(chunk) => Ok(chunk.tally()),
        }
    }

    fn forget(&mut self, number: u64) {
        self.full.remove(&number);
        if let Some(Chunk::Spilled(place)) = self.chunks.remove(&number) {
            self.free.push(place);
        }
        self.current = u64::MAX;
    }

    fn bring_back(&mut self, number: u64) -> io::Result<()> {
        if let Some(Chunk::Spilled(place)) = self.chunks.get(&number) {
            let place = *place;
            let chunk = self.read_back(place)?;
            self.free.push(place);
            self.returns += 1;
            self.chunks.insert(number, chunk);
            self.used(number)?;
        }
        Ok(())
    }

    fn read_back(&self, place: u64) -> io::Result<Chunk> {
        let mut bytes = vec![0; Chunk::FULL_BYTES].into_boxed_slice();
        let file = self.file.as_ref().ok_or_else(lost)?;
        file.read_exact_at(&mut bytes, place * Chunk::FULL_BYTES as u64)?;
        Ok(Chunk::Full(bytes))
    }

    /// A chunk in its full form is used: makes room for it if it was not in memory.
    fn used(&mut self, number: u64) -> io::Result<()> {
        if number == self.current || !self.chunks.get(&number).is_some_and(Chunk::is_full_form) {
            return Ok(());
        }
        self.current = number;
        self.clock += 1;
        self.full.insert(number, self.clock);
        let may_spill = self.returns <= RETURNS * self.places.max(1);
        if self.full.len() <= RESIDENT_CHUNKS || !may_spill {
            return Ok(());
        }
        let oldest = self.full.iter().min_by_key(|(_, last_use)| **last_use).map(|(number, _)| *number);
        let Some(oldest) = oldest else { return Ok(()) };
        self.full.remove(&oldest);
        let Some(Chunk::Full(bytes)) = self.chunks.get(&oldest) else { return Err(lost()) };
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.spool.take(Chunk::FULL_BYTES as u64)?;
                self.places += 1;
                self.places - 1
            }
        };
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile()?),
        };
        file.write_all_at(bytes, place * Chunk::FULL_BYTES as u64)?;
        self.chunks.insert(oldest, Chunk::Spilled(place));
        Ok(())
    }
}

/// A run of absent pages or of pages of zeroes, or one page with another content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// State of all pages of the run.
    pub(super) state: PageState,
    /// How many pages; 1 for [`PageState::Data`].
    pub(super) pages: u64,
    /// CRC-32 of the page; meaningless for other states.
    pub(super) crc: u32,
}

fn lost() -> io::Error {
    io::Error::other("page table lost a chunk")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table() -> PageTable {
        PageTable::new(Spool::unlimited())
    }

    fn pages_of(table: &mut PageTable, count: u64) -> Vec<(PageState, u32)> {
        let mut pages = Vec::new();
        let visit = |run: Run| {
            let crc = if run.state == PageState::Data { run.crc } else { 0 };
            pages.extend((0..run.pages).map(|_| (run.state, crc)));
            Ok(())
        };
        table.walk(0, count, visit).unwrap();
        pages
    }

    #[test]
    fn pages_survive_being_pushed_out_to_the_file() {
        let mut table = table();
        let chunks = RESIDENT_CHUNKS as u64 + 60;
        // Every eighth page: the full form of a chunk, and many runs in it.
        for page in (0..chunks * CHUNK_PAGES).step_by(4) {
            assert_eq!(table.set(page, PageState::Data, page as u32).unwrap(), PageState::Absent);
        }
        assert!(table.full.len() <= RESIDENT_CHUNKS && table.places > 0);
        let (mut next, mut seen) = (0, 0);
        table
            .walk(0, 1 << 40, |run| {
                if run.state == PageState::Data {
                    assert_eq!((run.crc, run.pages, next % 4), (next as u32, 1, 0));
                    seen += 1;
                }
                next += run.pages;
                Ok(())
            })
            .unwrap();
        assert_eq!((next, seen), (1 << 40, chunks * CHUNK_PAGES / 4));
    }

    #[test]
    fn a_page_alone_in_its_chunk_costs_a_step_and_no_chunk() {
        let mut table = table();
        for chunk in 0..10_000 {
            table.set(chunk * CHUNK_PAGES + chunk % 7, PageState::Zero, 0).unwrap();
        }
        assert!(table.full.is_empty() && table.file.is_none());
        let mut runs = 0;
        table
            .walk(0, 1 << 40, |_| {
                runs += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(runs, 20_000);
    }

    #[test]
    fn pages_in_the_worst_order_do_not_cost_a_chunk_each() {
        let mut table = table();
        let chunks = RESIDENT_CHUNKS as u64 * 2;
        for page in 0..chunks * CHUNK_PAGES / 4 {
            table.set(page * 4, PageState::Data, 1).unwrap();
        }
        for round in 0..100 {
            for chunk in 0..chunks {
                table.set(chunk * CHUNK_PAGES + round * 4 + 1, PageState::Data, 2).unwrap();
            }
        }
        assert!(table.returns <= (RETURNS + 2) * chunks, "{} returns", table.returns);
    }

    #[test]
    fn the_last_content_of_a_page_wins() {
        let mut table = table();
        table.set(5, PageState::Data, 7).unwrap();
        assert_eq!(table.set(5, PageState::Absent, 0).unwrap(), PageState::Data);
        assert_eq!(table.state(5).unwrap(), PageState::Absent);
        assert_eq!(table.state(1 << 50).unwrap(), PageState::Absent);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Set(u64, PageState, u32),
        Fill(u64, u64, PageState),
    }

    fn step(pages: u64) -> impl Strategy<Value = Step> {
        let state = prop_oneof![Just(PageState::Absent), Just(PageState::Zero), Just(PageState::Data)];
        let fill = prop_oneof![Just(PageState::Absent), Just(PageState::Zero)];
        prop_oneof![
            (0..pages, state, any::<u32>()).prop_map(|(page, state, crc)| Step::Set(page, state, crc)),
            (0..pages, 0..pages, fill).prop_map(|(a, b, state)| Step::Fill(a.min(b), a.abs_diff(b), state)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_table_is_a_list_of_pages(steps in prop::collection::vec(step(3 * CHUNK_PAGES), 1..40)) {
            let mut table = table();
            let mut pages = vec![(PageState::Absent, 0); 3 * CHUNK_PAGES as usize];
            for step in steps {
                match step {
                    Step::Set(page, state, crc) => {
                        let crc = if state == PageState::Data { crc } else { 0 };
                        prop_assert_eq!(table.set(page, state, crc).unwrap(), pages[page as usize].0);
                        pages[page as usize] = (state, crc);
                    }
                    Step::Fill(first, count, state) => {
                        let range = &mut pages[first as usize..(first + count) as usize];
                        let of = |state| range.iter().filter(|page| page.0 == state).count() as u64;
                        let before = Tally { zero: of(PageState::Zero), data: of(PageState::Data) };
                        prop_assert_eq!(table.fill(first, count, state).unwrap(), before);
                        range.fill((state, 0));
                    }
                }
            }
            prop_assert!(pages_of(&mut table, pages.len() as u64) == pages);
        }
    }
}
