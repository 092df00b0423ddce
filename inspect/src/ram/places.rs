//! Where the content of each page lies: an index of runs, which costs what was told of pages and not how large the
//! guest is.

use std::collections::BTreeMap;

/// Pages in one chunk of the index.
const CHUNK_PAGES: u64 = 512;
/// With this many runs a chunk is larger than a list of all its pages.
const MOST_RUNS: usize = 256;
/// Bits of a place that are the offset: files of up to 256 TiB.
const OFFSET_BITS: u32 = 48;
/// A page of zeroes, in a list.
const NONE: u64 = u64::MAX;

/// The place of a page's first byte: which store, and where in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(u64);

impl Place {
    /// Byte `offset` of store number `store`; `None` if that is too far away.
    pub(super) fn new(store: u16, offset: u64) -> Option<Self> {
        let fits = store < u16::MAX && offset >> OFFSET_BITS == 0;
        fits.then_some(Place(u64::from(store) << OFFSET_BITS | offset))
    }

    pub(super) fn store(self) -> usize {
        (self.0 >> OFFSET_BITS) as usize
    }

    pub(super) fn offset(self) -> u64 {
        self.0 & ((1 << OFFSET_BITS) - 1)
    }
}

/// A run of pages with a place, or of pages that have none, which are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    /// How many pages.
    pub(super) pages: u64,
    /// Where the first of them is.
    pub(super) place: Option<Place>,
    /// Bytes between one page and the next.
    pub(super) gap: u64,
}

/// Pages of one chunk, one after the other in one store, with the same number of bytes between each two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    place: u64,
    slot: u16,
    pages: u16,
    gap: u16,
}

impl Run {
    fn end(&self) -> u16 {
        self.slot + self.pages
    }

    /// Where the page at `slot` is.
    fn at(&self, slot: u16, page_size: u64) -> u64 {
        self.place + u64::from(slot - self.slot) * (page_size + u64::from(self.gap))
    }

    /// The part from `slot` on, if there is any.
    fn from(&self, slot: u16, page_size: u64) -> Option<Run> {
        let slot = slot.max(self.slot);
        let pages = self.end().checked_sub(slot).filter(|pages| *pages > 0)?;
        Some(Run { place: self.at(slot, page_size), slot, pages, ..*self })
    }

    /// The part before `slot`, if there is any.
    fn before(&self, slot: u16) -> Option<Run> {
        let pages = slot.min(self.end()).checked_sub(self.slot).filter(|pages| *pages > 0)?;
        Some(Run { pages, ..*self })
    }

    /// Takes `next` over, if it goes on where this ends.
    fn join(&mut self, next: &Run, page_size: u64) -> bool {
        let Some(gap) =
            next.place.checked_sub(self.at(self.end() - 1, page_size)).and_then(|d| d.checked_sub(page_size))
        else {
            return false;
        };
        let Ok(gap) = u16::try_from(gap) else { return false };
        let same = |run: &Run| run.pages == 1 || run.gap == gap;
        let follows = self.end() == next.slot && self.place >> OFFSET_BITS == next.place >> OFFSET_BITS;
        if follows && same(self) && same(next) {
            (self.gap, self.pages) = (gap, self.pages + next.pages);
            return true;
        }
        false
    }
}

#[derive(Debug)]
enum Chunk {
    /// In order, none of them empty.
    Runs(Vec<Run>),
    /// The place of each page, or [`NONE`].
    Each(Box<[u64]>),
}

/// The places of pages, by a page number that counts through all RAM blocks. A page that has none is zero.
#[derive(Debug)]
pub(super) struct Places {
    page_size: u64,
    chunks: BTreeMap<u64, Chunk>,
}

impl Places {
    /// An index of pages of `page_size` bytes, all of them zero.
    pub(super) fn new(page_size: u64) -> Self {
        Places { page_size, chunks: BTreeMap::new() }
    }

    /// `count` pages from `first` on are at `place`, one after the other with `gap` bytes between each two.
    pub(super) fn put(&mut self, first: u64, count: u64, place: Place, gap: u16) {
        let (page_size, mut done) = (self.page_size, 0);
        while done < count {
            let page = first + done;
            let (number, slot) = (page / CHUNK_PAGES, (page % CHUNK_PAGES) as u16);
            let pages = (count - done).min(CHUNK_PAGES - u64::from(slot)) as u16;
            let run = Run { place: place.0 + done * (page_size + u64::from(gap)), slot, pages, gap };
            self.chunks.entry(number).or_insert_with(|| Chunk::Runs(Vec::new())).put(run, page_size);
            done += u64::from(pages);
        }
    }

    /// `count` pages from `first` on are zero.
    pub(super) fn clear(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count);
        let mut next = first;
        while next < end {
            let Some((&number, chunk)) = self.chunks.range_mut(next / CHUNK_PAGES..).next() else { return };
            let start = number * CHUNK_PAGES;
            if start >= end {
                return;
            }
            let (from, to) = (next.saturating_sub(start) as u16, (end - start).min(CHUNK_PAGES) as u16);
            chunk.cut(from, to, self.page_size);
            if chunk.is_empty() {
                self.chunks.remove(&number);
            }
            next = start + CHUNK_PAGES;
        }
    }

    /// What starts at `page`, and ends at `end` at the latest.
    pub(super) fn stretch(&self, page: u64, end: u64) -> Stretch {
        let (number, slot) = (page / CHUNK_PAGES, (page % CHUNK_PAGES) as u16);
        let most = end.saturating_sub(page).max(1);
        let zero_up_to = |next: u64| Stretch { pages: next.saturating_sub(page).clamp(1, most), place: None, gap: 0 };
        let next_chunk = || self.chunks.range(number + 1..).next().map_or(u64::MAX, |(next, _)| next * CHUNK_PAGES);
        let Some(chunk) = self.chunks.get(&number) else { return zero_up_to(next_chunk()) };
        match chunk {
            Chunk::Runs(runs) => match runs.get(runs.partition_point(|run| run.end() <= slot)) {
                Some(run) if run.slot <= slot => Stretch {
                    pages: u64::from(run.end() - slot).min(most),
                    place: Some(Place(run.at(slot, self.page_size))),
                    gap: run.gap.into(),
                },
                Some(run) => zero_up_to(number * CHUNK_PAGES + u64::from(run.slot)),
                None => zero_up_to(next_chunk()),
            },
            Chunk::Each(places) => {
                let rest = &places[usize::from(slot)..];
                if rest[0] != NONE {
                    return Stretch { pages: 1, place: Some(Place(rest[0])), gap: 0 };
                }
                match rest.iter().position(|place| *place != NONE) {
                    Some(zeroes) => zero_up_to(page + zeroes as u64),
                    None => zero_up_to(next_chunk()),
                }
            }
        }
    }
}

impl Chunk {
    fn put(&mut self, run: Run, page_size: u64) {
        match self {
            Chunk::Each(places) => {
                (run.slot..run.end()).for_each(|slot| places[usize::from(slot)] = run.at(slot, page_size));
            }
            Chunk::Runs(runs) => {
                // Pages mostly come in order.
                if runs.last().is_some_and(|last| last.end() > run.slot) {
                    cut(runs, run.slot, run.end(), page_size);
                }
                let at = runs.partition_point(|other| other.slot < run.slot);
                let joined = at.checked_sub(1).is_some_and(|before| runs[before].join(&run, page_size));
                let last = if joined {
                    at - 1
                } else {
                    runs.insert(at, run);
                    at
                };
                if let Some(next) = runs.get(last + 1).copied()
                    && runs[last].join(&next, page_size)
                {
                    runs.remove(last + 1);
                }
                if runs.len() > MOST_RUNS {
                    let mut places = vec![NONE; CHUNK_PAGES as usize].into_boxed_slice();
                    for run in runs {
                        (run.slot..run.end()).for_each(|slot| places[usize::from(slot)] = run.at(slot, page_size));
                    }
                    *self = Chunk::Each(places);
                }
            }
        }
    }

    fn cut(&mut self, from: u16, to: u16, page_size: u64) {
        match self {
            Chunk::Runs(runs) => cut(runs, from, to, page_size),
            Chunk::Each(places) => places[usize::from(from)..usize::from(to)].fill(NONE),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Chunk::Runs(runs) => runs.is_empty(),
            Chunk::Each(places) => places.iter().all(|place| *place == NONE),
        }
    }
}

/// Takes the pages from `from` up to `to` out of `runs`.
fn cut(runs: &mut Vec<Run>, from: u16, to: u16, page_size: u64) {
    let first = runs.partition_point(|run| run.end() <= from);
    let end = first + runs[first..].partition_point(|run| run.slot < to);
    let before = runs[first..end].first().and_then(|run| run.before(from));
    let after = runs[first..end].last().and_then(|run| run.from(to, page_size));
    runs.splice(first..end, before.into_iter().chain(after));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 4096;

    fn place(store: u16, offset: u64) -> Place {
        Place::new(store, offset).unwrap()
    }

    /// The places of pages, as a list.
    fn all(places: &Places, pages: u64) -> Vec<u64> {
        let mut list = Vec::new();
        while (list.len() as u64) < pages {
            let Stretch { pages: count, place, gap } = places.stretch(list.len() as u64, pages);
            list.extend((0..count).map(|n| place.map_or(NONE, |place| place.0 + n * (SIZE + gap))));
        }
        assert_eq!(list.len() as u64, pages);
        list
    }

    fn bytes(places: &Places) -> usize {
        let chunk = |chunk: &Chunk| match chunk {
            Chunk::Runs(runs) => runs.capacity() * size_of::<Run>(),
            Chunk::Each(places) => size_of_val(&**places),
        };
        places.chunks.values().map(|c| size_of::<(u64, Chunk)>() + chunk(c)).sum()
    }

    #[test]
    fn a_page_costs_no_more_than_sixteen_bytes_and_next_to_nothing_in_order() {
        let pages = 100 * CHUNK_PAGES;
        let mut in_order = Places::new(SIZE);
        // As a plain stream has them: a record of eight bytes before each.
        (0..pages).for_each(|page| in_order.put(page, 1, place(1, 100 + page * (SIZE + 8)), 0));
        assert!(bytes(&in_order) < pages as usize, "{}", bytes(&in_order));
        assert_eq!(in_order.stretch(5, pages), Stretch { pages: 507, place: Some(place(1, 100 + 5 * 4104)), gap: 8 });
        let mut scattered = Places::new(SIZE);
        for page in 0..pages {
            let page = page * 7919 % pages;
            scattered.put(page, 1, place(1, (pages - page) * (SIZE + 8)), 0);
        }
        assert!(bytes(&scattered) <= 16 * pages as usize, "{}", bytes(&scattered));
        let mut area = Places::new(SIZE);
        area.put(0, 1 << 28, place(0, 1 << 20), 0);
        assert_eq!(all(&area, 2000)[1999], (1 << 20) + 1999 * SIZE);
        area.clear(0, 1 << 28);
        assert!(area.chunks.is_empty());
        area.clear(0, u64::MAX);
        assert_eq!(area.stretch(7, 1 << 40), Stretch { pages: (1 << 40) - 7, place: None, gap: 0 });
    }

    #[test]
    fn a_place_that_is_too_far_away_is_none() {
        assert_eq!(Place::new(3, 1 << 48), None);
        let far = place(7, (1 << 48) - 1);
        assert_eq!((far.store(), far.offset()), (7, (1 << 48) - 1));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put { first: u64, count: u64, store: u16, at: u64, gap: u16 },
        Clear(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let pages = 3 * CHUNK_PAGES;
        let range = (0..pages, prop_oneof![4 => 1..3u64, 1 => 1..pages]);
        let gap = prop_oneof![Just(0u16), Just(8), any::<u16>()];
        let put = (range.clone(), 0..3u16, 0..1000u64, gap).prop_map(move |((first, count), store, at, gap)| {
            Step::Put { first, count: count.min(pages - first), store, at: at * (SIZE + 8), gap }
        });
        let clear = range.prop_map(move |(first, count)| Step::Clear(first, count.min(pages - first)));
        prop::collection::vec(prop_oneof![5 => put, 1 => clear], 1..600)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn an_index_is_a_list_of_places(steps in steps()) {
            let (pages, mut places) = (3 * CHUNK_PAGES, Places::new(SIZE));
            let mut expected = vec![NONE; pages as usize];
            for step in steps {
                match step {
                    Step::Put { first, count, store, at, gap } => {
                        places.put(first, count, place(store, at), gap);
                        let offset = |n| at + n * (SIZE + u64::from(gap));
                        (0..count).for_each(|n| expected[(first + n) as usize] = place(store, offset(n)).0);
                    }
                    Step::Clear(first, count) => {
                        places.clear(first, count);
                        expected[first as usize..(first + count) as usize].fill(NONE);
                    }
                }
            }
            prop_assert!(all(&places, pages) == expected);
        }
    }
}
