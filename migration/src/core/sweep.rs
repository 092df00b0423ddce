//! Which pages are sent in which order, and which wait. Knows nothing of their content.
//!
//! A sweep takes every page that was dirty at its beginning. The first takes all there are, and long: what the guest
//! writes meanwhile must be sent again, so a page that it has written to since the beginning waits for the next sweep
//! instead of being sent twice. [`Sweep::defer`] finds those. It can know only of pages whose log was reset, so
//! [`Sweep::reset_lead`] resets the log far ahead; and stretches of memory are taken in turns, so that not all of what
//! the guest is busy with comes first, while nothing is known.

use super::source::BlockRange;
use crate::PAGE_SIZE;
use crate::bitmap::PageBitmap;
use qevm_returnpath::requests::PageRequest;
use std::ops::Range;
use std::time::Duration;

/// The least whose log is reset in one call, in pages.
const RESET_PAGES: u64 = 256;
/// The most that is reset in one call, in `RESET_PAGES`: 16 MiB (QEMU's `x-clear-bitmap-shift` of 18 is 1 GiB).
const MAX_RESET: u64 = 16;
/// How long a page may wait for its turn after its log was reset. What the guest writes meanwhile is sent and then sent
/// again, so little is reset at a time when the link is slow; when it is fast, calls would cost more than that.
const RESET_AHEAD: Duration = Duration::from_millis(5);
/// In the first sweep the log is reset this many times as fast as pages are sent…
const LEAD: u64 = 8;
/// …from this many pages on.
const FIRST_LEAD: u64 = 16 << 10;
/// Pages that the first sweep sends one after another: a huge page.
const STRETCH: u64 = 512;
/// In how many turns the first sweep goes through a block: in each, one stretch of this many is sent.
const TURNS: u64 = 16;

/// The pages to send, by block, and where the sweep over them is.
#[derive(Debug)]
pub(super) struct Sweep {
    blocks: Vec<Block>,
    place: Place,
    first: bool,
    /// How much is reset in one call, in [`RESET_PAGES`].
    reset_ahead: u64,
    /// Pages that were taken so far.
    taken: u64,
    /// Pages that were reset ahead so far, and where to go on.
    lead: (u64, (usize, u64)),
}

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    block: usize,
    /// In the first sweep, the stretch whose turn it is.
    stretch: u64,
    page: u64,
}

#[derive(Debug)]
struct Block {
    /// Pages to send in this sweep.
    dirty: PageBitmap,
    /// Pages to send in the next: not in `dirty`.
    later: PageBitmap,
    /// Chunks of [`RESET_PAGES`] in which pages were found dirty whose log was not reset since.
    to_reset: PageBitmap,
}

impl Sweep {
    /// Over blocks of this many pages, all of which are to be sent.
    pub(super) fn new(pages: impl Iterator<Item = u64>) -> Self {
        let block = |pages: u64| Block {
            dirty: PageBitmap::full(pages),
            later: PageBitmap::new(pages),
            to_reset: PageBitmap::new(pages.div_ceil(RESET_PAGES)),
        };
        let blocks = pages.map(block).collect();
        Sweep { blocks, place: Place::default(), first: true, reset_ahead: MAX_RESET, taken: 0, lead: (0, (0, 0)) }
    }

    /// Says how many pages per second go out.
    pub(super) fn expect(&mut self, pages: u64) {
        let steps = u128::from(pages) * RESET_AHEAD.as_nanos() / 1_000_000_000 / u128::from(RESET_PAGES);
        self.reset_ahead = u64::try_from(steps).unwrap_or(MAX_RESET).clamp(1, MAX_RESET);
    }

    /// Pages of each block that are to be sent, in this sweep or later.
    pub(super) fn remaining(&self) -> impl Iterator<Item = u64> {
        self.blocks.iter().map(|block| block.dirty.count() + block.later.count())
    }

    /// Adds a word of the dirty log to what is to be sent. Says how many pages of it were not to be sent already.
    pub(super) fn add(&mut self, block: usize, word_number: usize, word: u64) -> u64 {
        let Some(block) = self.blocks.get_mut(block).filter(|block| block.has_word(word_number)) else { return 0 };
        if word != 0 {
            block.to_reset.set_range(chunks_of(word_number));
        }
        block.dirty.merge_word(word_number, word)
    }

    /// Starts a new sweep, when the whole log was [added](Self::add). Says how many pages of it waited for that.
    pub(super) fn begin(&mut self) -> u64 {
        let new = self.blocks.iter_mut().map(|block| block.dirty.take_all(&mut block.later)).sum();
        (self.place, self.first) = (Place::default(), self.taken == 0);
        new
    }

    /// Leaves what the guest has written to since the beginning of the sweep, by this word of the dirty log, for the
    /// next one.
    pub(super) fn defer(&mut self, block: usize, word_number: usize, word: u64) {
        let Some(block) = self.blocks.get_mut(block).filter(|block| block.has_word(word_number)) else { return };
        // Where the log was not reset it has what was known, and perhaps more: there is time for that in this sweep.
        if block.to_reset.contains(chunks_of(word_number).start) {
            block.dirty.merge_word(word_number, word);
        } else {
            block.dirty.clear_word(word_number, word);
            block.later.merge_word(word_number, word);
        }
    }

    /// What to reset in the log ahead of the sweep, which is the first.
    pub(super) fn reset_lead(&mut self) -> Vec<BlockRange> {
        let goal = self.taken.saturating_mul(LEAD).saturating_add(FIRST_LEAD);
        let mut resets = Vec::new();
        while self.lead.0 < goal {
            let (done, (index, from)) = self.lead;
            let Some(block) = self.blocks.get_mut(index) else { break };
            let to = (from + MAX_RESET).min(block.to_reset.pages());
            while let Some(chunks) = block.to_reset.next_run(from..to, MAX_RESET) {
                resets.push(block.reset(index, chunks));
            }
            let next = if to == block.to_reset.pages() { (index + 1, 0) } else { (index, to) };
            self.lead = (done + (to - from) * RESET_PAGES, next);
        }
        resets
    }

    /// Whether the sweep has come to its end.
    pub(super) fn is_over(&mut self) -> bool {
        self.next_run(1).is_none()
    }

    /// Takes the next pages, at most `limit`, out of what is to be sent. What is to be reset in the log before they are
    /// read goes to `resets`; without, the guest is paused. They must be read after this: what changes from here on
    /// turns up in the log.
    pub(super) fn take(&mut self, limit: u64, resets: Option<&mut Vec<BlockRange>>) -> Option<BlockRange> {
        let (index, run) = self.next_run(limit)?;
        let block = &mut self.blocks[index];
        if let Some(resets) = resets {
            let (first, end) = (run.start / RESET_PAGES, run.end.div_ceil(RESET_PAGES));
            let next = |block: &Block| block.to_reset.next_run(first..block.to_reset.pages(), self.reset_ahead);
            while let Some(chunks) = next(block).filter(|chunks| chunks.start < end) {
                resets.push(block.reset(index, chunks));
            }
        }
        block.dirty.clear_range(run.clone());
        self.place.page = run.end;
        self.taken += run.end - run.start;
        Some(BlockRange { block: index, pages: run })
    }

    /// Takes these pages of a block that are still to be sent, whose turn it is not: the first run of them.
    pub(super) fn take_at(&mut self, block: usize, pages: Range<u64>) -> Option<BlockRange> {
        let dirty = &mut self.blocks.get_mut(block)?.dirty;
        let run = dirty.next_run(pages.start..pages.end.min(dirty.pages()), u64::MAX)?;
        dirty.clear_range(run.clone());
        self.taken += run.end - run.start;
        Some(BlockRange { block, pages: run })
    }

    /// Takes what is still to be sent of a request. What was sent before is on its way, or there.
    pub(super) fn take_request(&mut self, request: PageRequest) -> Option<BlockRange> {
        let pages = request.offset / PAGE_SIZE..(request.offset + request.len) / PAGE_SIZE;
        self.take_at(request.block, pages)
    }

    /// Of this block everything is to be sent but what the bitmap has: bit `i` of byte `n` is page `8 * n + i`. The
    /// sweep begins anew.
    pub(super) fn received(&mut self, block: usize, bitmap: &[u8]) {
        let Some(block) = self.blocks.get_mut(block) else { return };
        let pages = block.dirty.pages();
        (block.dirty, block.later) = (PageBitmap::new(pages), PageBitmap::new(pages));
        let mut words = bitmap.chunks(8);
        for index in 0..pages.div_ceil(u64::from(u64::BITS)) as usize {
            let mut word = [0; 8];
            let some = words.next().unwrap_or_default();
            word[..some.len()].copy_from_slice(some);
            block.dirty.merge_word(index, !u64::from_le_bytes(word));
        }
        self.place = Place::default();
    }

    /// All runs of pages to send in this sweep, from the first page on.
    pub(super) fn runs(&self) -> impl Iterator<Item = BlockRange> {
        self.blocks.iter().enumerate().flat_map(|(index, block)| {
            let mut from = 0;
            std::iter::from_fn(move || {
                let pages = block.dirty.next_run(from..block.dirty.pages(), u64::MAX)?;
                from = pages.end;
                Some(BlockRange { block: index, pages })
            })
        })
    }

    /// All runs of pages that are not to be sent, from the first page on; nothing waits for the next sweep.
    pub(super) fn gone(&self) -> impl Iterator<Item = BlockRange> {
        self.blocks.iter().enumerate().flat_map(|(index, block)| {
            let (mut from, end) = (0, block.dirty.pages());
            std::iter::from_fn(move || {
                while from < end {
                    let next = block.dirty.next_run(from..end, u64::MAX).unwrap_or(end..end);
                    let pages = from..next.start;
                    from = next.end;
                    if !pages.is_empty() {
                        return Some(BlockRange { block: index, pages });
                    }
                }
                None
            })
        })
    }

    /// The block of the next page to send.
    pub(super) fn next_block(&mut self) -> Option<usize> {
        self.next_page().map(|(index, _)| index)
    }

    /// The next page to send, and its block.
    pub(super) fn next_page(&mut self) -> Option<(usize, u64)> {
        self.next_run(1).map(|(index, run)| (index, run.start))
    }

    /// Sends this many pages, from a multiple of that on, where one of them is to be sent in this sweep.
    pub(super) fn widen(&mut self, block: usize, unit: u64) {
        let Some(dirty) = self.blocks.get_mut(block).map(|block| &mut block.dirty).filter(|_| unit > 1) else { return };
        let mut from = 0;
        while let Some(run) = dirty.next_run(from..dirty.pages(), u64::MAX) {
            let whole = run.start / unit * unit..run.end.next_multiple_of(unit).min(dirty.pages());
            from = whole.end;
            dirty.set_range(whole);
        }
    }

    /// The next pages to send at or after the place of the sweep, in its order.
    fn next_run(&mut self, limit: u64) -> Option<(usize, Range<u64>)> {
        loop {
            let Place { block, stretch, page } = self.place;
            let dirty = &self.blocks.get(block)?.dirty;
            let end = if self.first { (stretch + 1) * STRETCH } else { dirty.pages() };
            if let Some(run) = dirty.next_run(page..end, limit) {
                return Some((block, run));
            }
            self.place = match self.first.then(|| following(stretch, dirty.pages())).flatten() {
                Some(stretch) => Place { block, stretch, page: stretch * STRETCH },
                None => Place { block: block + 1, ..Place::default() },
            };
        }
    }
}

/// The stretch after `stretch` in the order of the first sweep over a block.
fn following(stretch: u64, pages: u64) -> Option<u64> {
    let turn = stretch % TURNS + 1;
    let is_there = |stretch: &u64| *stretch * STRETCH < pages;
    Some(stretch + TURNS).filter(is_there).or(Some(turn).filter(|turn| *turn < TURNS && is_there(turn)))
}

impl Block {
    /// Whether the log of this block has such a word.
    fn has_word(&self, word_number: usize) -> bool {
        (word_number as u64) < self.dirty.pages().div_ceil(u64::from(u64::BITS))
    }

    /// What the log is to reset for these chunks.
    fn reset(&mut self, index: usize, chunks: Range<u64>) -> BlockRange {
        let pages = chunks.start * RESET_PAGES..(chunks.end * RESET_PAGES).min(self.dirty.pages());
        self.to_reset.clear_range(chunks);
        BlockRange { block: index, pages }
    }
}

/// The chunk that a word of the log belongs to.
fn chunks_of(word_number: usize) -> Range<u64> {
    let chunk = word_number as u64 * u64::from(u64::BITS) / RESET_PAGES;
    chunk..chunk + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 10_240;

    /// A guest's writes to one block, as KVM logs them.
    #[derive(Default)]
    struct Log {
        written: Vec<u64>,
        /// Reading takes out of the log, as with dirty rings; otherwise resetting does.
        consumed: bool,
        reported: Vec<u64>,
        resets: Vec<Range<u64>>,
    }

    impl Log {
        fn new(consumed: bool) -> Log {
            let all = if consumed { 0 } else { u64::MAX };
            Log { written: vec![all; PAGES as usize / 64], consumed, ..Log::default() }
        }

        fn write(&mut self, page: u64) {
            self.written[page as usize / 64] |= 1 << (page % 64);
        }
    }

    impl Log {
        fn read(&mut self, mut found: impl FnMut(usize, usize, u64)) {
            self.reported = self.written.clone();
            if self.consumed {
                self.written.fill(0);
            }
            self.reported.iter().enumerate().for_each(|(index, word)| found(0, index, *word));
        }

        fn reset(&mut self, BlockRange { pages, .. }: BlockRange) {
            for index in pages.start as usize / 64..pages.end as usize / 64 {
                self.written[index] &= if self.consumed { u64::MAX } else { !self.reported[index] };
            }
            self.resets.push(pages);
        }

        fn reset_all(&mut self, resets: Vec<BlockRange>) {
            resets.into_iter().for_each(|reset| self.reset(reset));
        }
    }

    fn begun(log: &mut Log) -> Sweep {
        let mut sweep = Sweep::new([PAGES].into_iter());
        begin(&mut sweep, log);
        sweep
    }

    fn begin(sweep: &mut Sweep, log: &mut Log) -> u64 {
        let mut new = 0;
        log.read(|block, word_number, word| new += sweep.add(block, word_number, word));
        new + sweep.begin()
    }

    fn take(sweep: &mut Sweep, limit: u64, log: &mut Log) -> Option<Range<u64>> {
        let mut resets = Vec::new();
        let run = sweep.take(limit, Some(&mut resets));
        log.reset_all(resets);
        run.map(|run| run.pages)
    }

    fn take_all(sweep: &mut Sweep, log: &mut Log) -> Vec<Range<u64>> {
        std::iter::from_fn(|| take(sweep, u64::MAX, log)).collect()
    }

    #[test]
    fn the_first_sweep_takes_huge_pages_in_turns_and_the_second_goes_straight() {
        let mut log = Log::new(false);
        let mut sweep = begun(&mut log);
        let stretches = (0..16).flat_map(|turn| (turn..20).step_by(16)).map(|at| at * 512..(at + 1) * 512);
        assert_eq!(take_all(&mut sweep, &mut log), stretches.collect::<Vec<_>>());
        assert!(sweep.is_over());
        (600..1800).for_each(|page| log.write(page));
        assert_eq!(begin(&mut sweep, &mut log), 1200);
        assert_eq!(take_all(&mut sweep, &mut log), vec![600..1800; 1]);
    }

    #[test]
    fn a_huge_page_is_sent_as_a_whole() {
        let mut sweep = Sweep::new([2048, 100].into_iter());
        sweep.received(0, &[0xff; 256]);
        sweep.received(1, &[0xff; 13]);
        // Pages 513, 1030 and 1031 of the first block, and the last of the second.
        for (block, page) in [(0, 513), (0, 1030), (0, 1031), (1, 99)] {
            sweep.add(block, page / 64, 1 << (page % 64));
        }
        sweep.widen(0, 512);
        sweep.widen(1, 512);
        let whole = |block, pages| BlockRange { block, pages };
        assert_eq!(sweep.runs().collect::<Vec<_>>(), [whole(0, 512..1536), whole(1, 0..100)]);
        sweep.widen(1, 1);
        assert_eq!(sweep.take_at(0, 512..1024), Some(whole(0, 512..1024)));
        assert_eq!(sweep.next_page(), Some((0, 1024)));
    }

    #[test]
    fn a_slow_link_resets_little_ahead_and_a_fast_one_much() {
        let steps = |step: usize| (0..PAGES).step_by(step).map(move |at| at..(at + step as u64).min(PAGES));
        for (pages_per_second, pages) in [(None, 4096), (Some(u64::MAX), 4096), (Some(1), 256), (Some(110_000), 512)] {
            let mut log = Log::new(false);
            let mut sweep = begun(&mut log);
            take_all(&mut sweep, &mut log);
            (0..PAGES).for_each(|page| log.write(page));
            begin(&mut sweep, &mut log);
            log.resets.clear();
            if let Some(pages) = pages_per_second {
                sweep.expect(pages);
            }
            take_all(&mut sweep, &mut log);
            assert_eq!(log.resets, steps(pages).collect::<Vec<_>>(), "{pages_per_second:?}");
        }
    }

    #[test]
    fn what_is_written_before_its_turn_is_sent_once() {
        for consumed in [false, true] {
            let mut log = Log::new(consumed);
            let mut sweep = begun(&mut log);
            log.reset_all(sweep.reset_lead());
            take(&mut sweep, 512, &mut log);
            // The first has had its turn, the second has not.
            [3, 5000].into_iter().for_each(|page| log.write(page));
            log.read(|block, word_number, word| sweep.defer(block, word_number, word));
            assert_eq!(sweep.remaining().sum::<u64>(), PAGES - 512 + 1);
            let taken = take_all(&mut sweep, &mut log);
            assert!(taken.iter().all(|run| !run.contains(&3) && !run.contains(&5000)), "{taken:?}");
            assert_eq!(begin(&mut sweep, &mut log), 2);
            assert_eq!(take_all(&mut sweep, &mut log), [3..4, 5000..5001]);
        }
    }

    #[test]
    fn what_was_not_received_is_sent_whatever_was_sent() {
        let mut sweep = Sweep::new([PAGES, 70].into_iter());
        while sweep.take(u64::MAX, None).is_some() {}
        // 70 pages take two words. Behind the end there is nothing, whatever the bitmap says of it.
        let mut bitmap = [0xff; 16];
        (bitmap[0], bitmap[8]) = (0b1111_1010, 0b1110_1111);
        bitmap[9..].fill(0);
        sweep.received(1, &bitmap);
        sweep.received(2, &bitmap);
        let missing = [0..1, 2..3, 68..69].map(|pages| BlockRange { block: 1, pages });
        assert_eq!(std::iter::from_fn(|| sweep.take(u64::MAX, None)).collect::<Vec<_>>(), missing);
        // What a bitmap is too short for is not there.
        sweep.received(1, &[0xff; 8]);
        assert_eq!(sweep.take(u64::MAX, None), Some(BlockRange { block: 1, pages: 64..70 }));
        assert!(sweep.is_over());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64),
        Take(u64),
        Look,
        Begin,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..PAGES).prop_map(Step::Write),
            4 => (1..2000u64).prop_map(Step::Take),
            1 => Just(Step::Look),
            1 => Just(Step::Begin),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn no_write_is_lost(consumed: bool, steps in prop::collection::vec(step(), 0..120)) {
            let (mut here, mut there) = (vec![1; PAGES as usize], vec![0; PAGES as usize]);
            let mut log = Log::new(consumed);
            let mut sweep = begun(&mut log);
            let mut send = |run: Range<u64>, here: &[u32]| {
                let run = run.start as usize..run.end as usize;
                there[run.clone()].copy_from_slice(&here[run]);
            };
            for step in steps {
                match step {
                    Step::Write(page) => {
                        here[page as usize] += 1;
                        log.write(page);
                    }
                    Step::Take(limit) => {
                        if let Some(run) = take(&mut sweep, limit, &mut log) {
                            send(run, &here);
                        }
                    }
                    Step::Look => {
                        log.read(|block, word_number, word| sweep.defer(block, word_number, word));
                        log.reset_all(sweep.reset_lead());
                    }
                    Step::Begin => {
                        begin(&mut sweep, &mut log);
                    }
                }
            }
            // The guest is paused.
            begin(&mut sweep, &mut log);
            while let Some(run) = sweep.take(u64::MAX, None) {
                send(run.pages, &here);
            }
            prop_assert_eq!(sweep.remaining().sum::<u64>(), 0);
            prop_assert!(here == there);
        }
    }
}
