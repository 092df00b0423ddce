//! A guest that runs before its memory has come.

use super::memory::PAGE;
use super::{Memory, Random};
use std::time::Duration;

/// Most that the guest writes to between two steps.
const WRITES: u64 = 20;

/// Which pages are there, and what the guest has done since it runs.
pub(super) struct Early {
    /// Pages that are here in their newest version, as far as is known.
    present: Vec<bool>,
    /// A thread that touches a missing page waits for it.
    pub(super) listens: bool,
    /// What the guest has written: page, place in it and value.
    writes: Vec<(usize, usize, u64)>,
    /// The page that the guest waits for, and since when.
    waiting: Option<(usize, Duration)>,
    /// The longest that it has waited.
    pub(super) longest: Duration,
    worked: Duration,
    random: Random,
}

impl Early {
    pub(super) fn new(pages: usize, seed: u64) -> Self {
        Early {
            present: vec![false; pages],
            listens: false,
            writes: Vec::new(),
            waiting: None,
            longest: Duration::ZERO,
            worked: Duration::ZERO,
            random: Random::new(seed ^ 0xea),
        }
    }

    /// A page has come, or some of it.
    pub(super) fn came(&mut self, page: usize) {
        self.present[page] = true;
    }

    /// A page is dropped.
    pub(super) fn discard(&mut self, page: usize) {
        self.present[page] = false;
    }

    /// Whether a page is here.
    pub(super) fn is_present(&self, page: usize) -> bool {
        self.present[page]
    }

    /// A page is filled in. False if it was there: `userfaultfd` refuses that.
    pub(super) fn place(&mut self, page: usize, now: Duration) -> bool {
        if let Some((_, since)) = self.waiting.take_if(|(waiting, _)| *waiting == page) {
            self.longest = self.longest.max(now - since);
        }
        !std::mem::replace(&mut self.present[page], true)
    }

    /// The guest works until now, or until it touches a page that is not there: that one.
    pub(super) fn works(&mut self, now: Duration, interval: Duration, memory: &mut Memory) -> Option<usize> {
        let writes = (now - self.worked).as_micros() / interval.as_micros().max(1);
        if writes == 0 || self.waiting.is_some() {
            return None;
        }
        self.worked = now;
        for _ in 0..WRITES.min(writes as u64) {
            let page = self.random.below(memory.pages() as u64) as usize;
            if !self.present[page] {
                self.waiting = Some((page, now));
                return Some(page);
            }
            let (at, value) = (self.random.below(PAGE as u64 / 8) as usize * 8, self.random.number());
            memory.page_mut(page)[at..at + 8].copy_from_slice(&value.to_le_bytes());
            self.writes.push((page, at, value));
        }
        None
    }

    /// When the guest works next.
    pub(super) fn wake(&self, interval: Duration) -> Option<Duration> {
        self.waiting.is_none().then(|| self.worked + interval)
    }

    /// Does to the source's memory what the guest has done here.
    pub(super) fn follow(&self, memory: &mut Memory) {
        for (page, at, value) in &self.writes {
            memory.page_mut(*page)[*at..*at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}
