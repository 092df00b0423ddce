//! The pages of 64 MiB of guest memory (with pages of 4 KiB), in a form that fits how much is known of them.

use super::page_table::{PageState, Run};

/// Pages in one chunk of the table.
pub(super) const PAGES: u64 = 16 * 1024;
const STATE_BYTES: usize = PAGES as usize / 4;
const CRC_BYTES: usize = PAGES as usize * 4;
/// From this many pages on a list of them is no smaller than the full form by much, and slower.
const MOST_LISTED: usize = 2048;

/// What is known of the pages of a chunk.
#[derive(Debug)]
pub(super) enum Chunk {
    /// One page; the others are absent.
    One(Entry),
    /// Some pages in order; the others are absent.
    Few(Vec<Entry>),
    /// Two bits of state for each page, then a CRC-32 for each.
    Full(Box<[u8]>),
    /// All pages are zero.
    Zeroes,
    /// In full form at this place of the table's file.
    Spilled(u64),
}

/// A page that is not absent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    slot: u16,
    state: PageState,
    crc: u32,
}

/// How many pages have which content; the others are absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally {
    /// Pages of zeroes.
    pub(super) zero: u64,
    /// Other pages.
    pub(super) data: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, more: Tally) {
        self.zero += more.zero;
        self.data += more.data;
    }
}

impl Tally {
    fn count(&mut self, state: PageState, pages: u64) {
        match state {
            PageState::Absent => {}
            PageState::Zero => self.zero += pages,
            PageState::Data => self.data += pages,
        }
    }
}

impl Default for Chunk {
    fn default() -> Self {
        Chunk::Few(Vec::new())
    }
}

impl Chunk {
    /// Bytes of the full form.
    pub(super) const FULL_BYTES: usize = STATE_BYTES + CRC_BYTES;

    pub(super) fn is_full_form(&self) -> bool {
        matches!(self, Chunk::Full(_))
    }

    /// Nothing is known of any page.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Chunk::Few(entries) if entries.is_empty())
    }

    /// Notes state and CRC of one page and returns its state so far.
    pub(super) fn set(&mut self, slot: u16, state: PageState, crc: u32) -> PageState {
        let entry = Entry { slot, state, crc };
        match self {
            Chunk::Zeroes if state == PageState::Zero => PageState::Zero,
            Chunk::Zeroes | Chunk::Spilled(_) => {
                *self = self.full_form();
                self.set(slot, state, crc)
            }
            Chunk::Full(bytes) => {
                let (before, _) = get(bytes, slot);
                put(bytes, entry);
                before
            }
            Chunk::One(only) if only.slot == slot => {
                let before = only.state;
                match state {
                    PageState::Absent => *self = Chunk::default(),
                    _ => *only = entry,
                }
                before
            }
            Chunk::One(only) => {
                if state != PageState::Absent {
                    let mut entries = vec![*only, entry];
                    entries.sort_by_key(|entry| entry.slot);
                    *self = Chunk::Few(entries);
                }
                PageState::Absent
            }
            Chunk::Few(entries) => {
                let before = match (place(entries, slot), state) {
                    (Ok(at), PageState::Absent) => entries.remove(at).state,
                    (Ok(at), _) => std::mem::replace(&mut entries[at], entry).state,
                    (Err(_), PageState::Absent) => PageState::Absent,
                    (Err(at), _) => {
                        entries.insert(at, entry);
                        PageState::Absent
                    }
                };
                match entries[..] {
                    [only] => *self = Chunk::One(only),
                    _ if entries.len() > MOST_LISTED => *self = self.full_form(),
                    _ => {}
                }
                before
            }
        }
    }

    /// Makes the pages from `from` up to `to` zero or absent, and tells what they were.
    pub(super) fn fill(&mut self, from: u16, to: u16, state: PageState) -> Tally {
        let mut before = Tally::default();
        if state == PageState::Absent {
            match self {
                Chunk::One(only) if (from..to).contains(&only.slot) => {
                    before.count(only.state, 1);
                    *self = Chunk::default();
                    return before;
                }
                Chunk::One(_) => return before,
                Chunk::Few(entries) => {
                    entries.retain(|entry| {
                        let inside = (from..to).contains(&entry.slot);
                        if inside {
                            before.count(entry.state, 1);
                        }
                        !inside
                    });
                    return before;
                }
                _ => {}
            }
        }
        if !self.is_full_form() {
            *self = self.full_form();
        }
        let mut slot = from;
        while slot < to {
            let run = self.run_at(slot);
            let end = to.min(slot + run.pages as u16);
            before.count(run.state, (end - slot).into());
            if let Chunk::Full(bytes) = self
                && run.state != state
            {
                (slot..end).for_each(|slot| put(bytes, Entry { slot, state, crc: 0 }));
            }
            slot = end;
        }
        before
    }

    /// The run of pages that starts at `slot`.
    pub(super) fn run_at(&self, slot: u16) -> Run {
        let left = PAGES - u64::from(slot);
        let absent = |next: Option<&Entry>| {
            let pages = next.map_or(left, |next| u64::from(next.slot - slot));
            Run { state: PageState::Absent, pages, crc: 0 }
        };
        let one = |entry: &Entry| Run { state: entry.state, pages: 1, crc: entry.crc };
        match self {
            Chunk::One(only) if only.slot == slot => one(only),
            Chunk::One(only) => absent(Some(only).filter(|only| only.slot > slot)),
            Chunk::Few(entries) => match place(entries, slot) {
                Ok(at) => one(&entries[at]),
                Err(at) => absent(entries.get(at)),
            },
            Chunk::Zeroes | Chunk::Spilled(_) => Run { state: PageState::Zero, pages: left, crc: 0 },
            Chunk::Full(bytes) => match get(bytes, slot) {
                (PageState::Data, crc) => Run { state: PageState::Data, pages: 1, crc },
                (state, _) => Run { state, pages: u64::from(end_of_run(bytes, slot, state) - slot), crc: 0 },
            },
        }
    }

    /// How many pages have which content.
    pub(super) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        let mut slot = 0;
        while u64::from(slot) < PAGES {
            let run = self.run_at(slot);
            tally.count(run.state, run.pages);
            slot += run.pages as u16;
        }
        tally
    }

    fn full_form(&self) -> Chunk {
        let mut bytes = vec![0; Self::FULL_BYTES].into_boxed_slice();
        match self {
            Chunk::One(only) => put(&mut bytes, *only),
            Chunk::Few(entries) => entries.iter().for_each(|entry| put(&mut bytes, *entry)),
            Chunk::Full(full) => bytes.clone_from(full),
            Chunk::Zeroes | Chunk::Spilled(_) => bytes[..STATE_BYTES].fill(ALL_ZERO),
        }
        Chunk::Full(bytes)
    }
}

/// Four pages of zeroes.
const ALL_ZERO: u8 = 0b01_01_01_01;

fn place(entries: &[Entry], slot: u16) -> Result<usize, usize> {
    match entries.last() {
        // Pages mostly come in order.
        Some(last) if last.slot < slot => Err(entries.len()),
        _ => entries.binary_search_by_key(&slot, |entry| entry.slot),
    }
}

fn get(bytes: &[u8], slot: u16) -> (PageState, u32) {
    let slot = usize::from(slot);
    let crc = bytes[STATE_BYTES + slot * 4..].first_chunk().map_or(0, |crc| u32::from_le_bytes(*crc));
    (state_of(bytes, slot), crc)
}

fn put(bytes: &mut [u8], Entry { slot, state, crc }: Entry) {
    let slot = usize::from(slot);
    let shift = (slot % 4) * 2;
    bytes[slot / 4] = bytes[slot / 4] & !(3 << shift) | (state as u8) << shift;
    bytes[STATE_BYTES + slot * 4..][..4].copy_from_slice(&crc.to_le_bytes());
}

fn state_of(bytes: &[u8], slot: usize) -> PageState {
    match bytes[slot / 4] >> ((slot % 4) * 2) & 3 {
        1 => PageState::Zero,
        2 => PageState::Data,
        _ => PageState::Absent,
    }
}

/// The first slot after `slot` whose page is in another state than `state`, absent or zero.
fn end_of_run(bytes: &[u8], slot: u16, state: PageState) -> u16 {
    let same = if state == PageState::Zero { ALL_ZERO } else { 0 };
    let mut slot = usize::from(slot);
    while slot < PAGES as usize {
        if slot.is_multiple_of(4) {
            // Four pages at a time.
            let rest = &bytes[slot / 4..STATE_BYTES];
            let alike = rest.iter().position(|byte| *byte != same).unwrap_or(rest.len());
            slot += alike * 4;
            if alike == rest.len() {
                break;
            }
        }
        if state_of(bytes, slot) != state {
            break;
        }
        slot += 1;
    }
    slot as u16
}
