//! A vCPU's dirty ring: memory shared with KVM in which it lists the pages that the vCPU writes to
//! (KVM API document, "KVM_CAP_DIRTY_LOG_RING", Linux 5.11).
//!
//! KVM fills entries in order and sets [`DIRTY`] last. The harvester takes them in the same order and sets [`RESET`];
//! `KVM_RESET_DIRTY_RINGS` then protects those pages again and clears the entries, which KVM may fill anew.

use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The entry names a page that was written to.
const DIRTY: u32 = 1;
/// The entry was harvested.
const RESET: u32 = 2;
/// Bits of `slot` that number the memory slot; those above are the address space, 1 in system management mode.
const SLOT_BITS: u32 = 0xffff;

/// An entry, laid out as the kernel's `struct kvm_dirty_gfn`.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// A page as an entry names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// The memory slot.
    pub(crate) slot: u32,
    /// The page in the slot.
    pub(crate) page: u64,
}

/// Harvests a ring.
#[derive(Debug)]
pub(crate) struct Ring<M> {
    entries: M,
    /// The entry to look at next. It counts on over the end of the ring, whose length is a power of two.
    next: u32,
    /// Entries harvested so far.
    harvested: u64,
}

impl<M: Deref<Target = [Entry]>> Ring<M> {
    /// An empty ring. Its length must be a power of two.
    pub(crate) fn new(entries: M) -> Ring<M> {
        debug_assert!(entries.len().is_power_of_two());
        Ring { entries, next: 0, harvested: 0 }
    }

    /// Takes every entry that KVM has filled, oldest first, and says how many there were. The pages are to be protected
    /// again (`KVM_RESET_DIRTY_RINGS`) after they were noted and before they are read.
    ///
    /// At most one turn: KVM, which needs the reset to go on, cannot make it endless, and memory that is not a ring
    /// cannot either.
    pub(crate) fn harvest(&mut self, mut found: impl FnMut(Written)) -> u32 {
        let len = self.entries.len() as u32;
        for taken in 0..len {
            let entry = &self.entries[(self.next & (len - 1)) as usize];
            // An entry that was harvested and not reset may keep its other bit: only DIRTY alone is news. Slot and
            // offset were written before the flag.
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return taken;
            }
            let (slot, page) = (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            entry.flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            self.harvested += 1;
            found(Written { slot: slot & SLOT_BITS, page });
        }
        len
    }

    /// Entries that KVM has filled and that were not harvested yet. All harvested ones must have been reset.
    pub(crate) fn filled(&self) -> u32 {
        // KVM fills them in order.
        let len = self.entries.len() as u32;
        let (mut filled, mut free) = (0, len);
        while filled < free {
            let middle = filled + (free - filled) / 2;
            let entry = &self.entries[(self.next.wrapping_add(middle) & (len - 1)) as usize];
            match entry.flags.load(Ordering::Relaxed) & (DIRTY | RESET) {
                DIRTY => filled = middle + 1,
                _ => free = middle,
            }
        }
        filled
    }

    /// Entries harvested since the ring was made.
    pub(crate) fn harvested(&self) -> u64 {
        self.harvested
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// KVM's side of a ring, as the API document describes it.
    struct Kernel {
        filled: u32,
        reset: u32,
        /// It keeps some entries back, and leaves the guest when only those are free.
        reserved: u32,
    }

    impl Kernel {
        fn new() -> Kernel {
            Kernel { filled: 0, reset: 0, reserved: 2 }
        }

        /// False: the ring is full, and the vCPU leaves the guest with `KVM_EXIT_DIRTY_RING_FULL`.
        fn write(&mut self, entries: &[Entry], slot: u32, page: u64) -> bool {
            if self.filled.wrapping_sub(self.reset) >= entries.len() as u32 - self.reserved {
                return false;
            }
            let entry = &entries[self.filled as usize % entries.len()];
            assert_eq!(entry.flags.load(Ordering::Acquire), 0, "an entry that is not free is filled");
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(page, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.filled = self.filled.wrapping_add(1);
            true
        }

        /// `KVM_RESET_DIRTY_RINGS`: how many entries were freed.
        fn reset(&mut self, entries: &[Entry]) -> u32 {
            let before = self.reset;
            loop {
                let entry = &entries[self.reset as usize % entries.len()];
                if entry.flags.load(Ordering::Acquire) & RESET == 0 {
                    return self.reset.wrapping_sub(before);
                }
                entry.flags.store(0, Ordering::Release);
                self.reset = self.reset.wrapping_add(1);
            }
        }
    }

    fn memory(len: usize) -> Vec<Entry> {
        (0..len).map(|_| Entry::default()).collect()
    }

    fn harvest(ring: &mut Ring<&[Entry]>) -> Vec<(u32, u64)> {
        let mut found = Vec::new();
        let count = ring.harvest(|w| found.push((w.slot, w.page)));
        assert_eq!(count as usize, found.len());
        found
    }

    #[test]
    fn an_entry_is_laid_out_as_the_kernels() {
        assert_eq!(size_of::<Entry>(), size_of::<kvm_bindings::kvm_dirty_gfn>());
        assert_eq!(std::mem::offset_of!(Entry, slot), std::mem::offset_of!(kvm_bindings::kvm_dirty_gfn, slot));
        assert_eq!(std::mem::offset_of!(Entry, offset), std::mem::offset_of!(kvm_bindings::kvm_dirty_gfn, offset));
        assert_eq!(DIRTY | RESET, kvm_bindings::KVM_DIRTY_GFN_F_MASK);
    }

    #[test]
    fn entries_come_once_and_in_order_over_the_end() {
        let (memory, mut kernel) = (memory(8), Kernel::new());
        let mut ring = Ring::new(&memory[..]);
        assert_eq!(harvest(&mut ring), []);
        for round in 0..100u64 {
            let pages: Vec<_> = (0..round % 6).map(|i| (i as u32 % 3, round * 10 + i)).collect();
            assert!(pages.iter().all(|(slot, page)| kernel.write(&memory, *slot, *page)));
            assert_eq!(ring.filled() as usize, pages.len(), "round {round}");
            assert_eq!(harvest(&mut ring), pages, "round {round}");
            assert_eq!(ring.filled(), 0, "round {round}");
            assert_eq!(harvest(&mut ring), [], "round {round}");
            assert_eq!(kernel.reset(&memory) as usize, pages.len());
        }
        assert_eq!(ring.harvested(), (0..100).map(|round| round % 6).sum::<u64>());
    }

    #[test]
    fn a_full_ring_goes_on_when_it_was_harvested_and_reset() {
        let (memory, mut kernel) = (memory(4), Kernel::new());
        let mut ring = Ring::new(&memory[..]);
        assert!(kernel.write(&memory, 0, 1) && kernel.write(&memory, 0, 2) && !kernel.write(&memory, 0, 3));
        assert_eq!(harvest(&mut ring), [(0, 1), (0, 2)]);
        assert!(!kernel.write(&memory, 0, 3), "harvesting alone frees nothing");
        kernel.reset(&memory);
        assert!(kernel.write(&memory, 0, 3));
        assert_eq!(harvest(&mut ring), [(0, 3)]);
    }

    #[test]
    fn what_was_harvested_and_not_reset_is_not_taken_again() {
        let memory = memory(4);
        for flags in [RESET, RESET | DIRTY] {
            memory.iter().for_each(|entry| entry.flags.store(flags, Ordering::Relaxed));
            assert_eq!(harvest(&mut Ring::new(&memory[..])), [], "{flags}");
        }
    }

    #[test]
    fn the_address_space_is_not_part_of_the_slot() {
        let (memory, mut kernel) = (memory(4), Kernel::new());
        kernel.write(&memory, 1 << 16 | 3, 7);
        assert_eq!(harvest(&mut Ring::new(&memory[..])), [(3, 7)]);
    }

    #[test]
    fn a_ring_filled_to_the_last_entry_is_taken_in_one_turn() {
        let (memory, mut kernel) = (memory(8), Kernel { reserved: 0, ..Kernel::new() });
        let mut ring = Ring::new(&memory[..]);
        assert!((0..8).all(|page| kernel.write(&memory, 0, page)) && !kernel.write(&memory, 0, 8));
        assert_eq!(ring.filled(), 8);
        assert_eq!(harvest(&mut ring).len(), 8);
        assert_eq!(harvest(&mut ring), []);
    }

    #[test]
    fn the_place_goes_on_where_the_counter_overflows() {
        let memory = memory(8);
        let (mut ring, mut kernel) = (Ring::new(&memory[..]), Kernel::new());
        (ring.next, kernel.filled, kernel.reset) = (u32::MAX - 2, u32::MAX - 2, u32::MAX - 2);
        assert!((0..5).all(|page| kernel.write(&memory, 0, page)));
        assert_eq!(ring.filled(), 5);
        assert_eq!(harvest(&mut ring).len(), 5);
        assert_eq!(kernel.reset(&memory), 5);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Whatever order writes, harvests and resets come in, every page that was listed is found once, in order.
        #[test]
        fn nothing_is_lost_or_found_twice(steps in prop::collection::vec(0u8..6, 0..300), bits in 2u32..7) {
            let (memory, mut kernel) = (memory(1 << bits), Kernel::new());
            let mut ring = Ring::new(&memory[..]);
            let (mut written, mut found, mut page) = (Vec::new(), Vec::new(), 0);
            for step in steps.into_iter().chain([4]) {
                match step {
                    4 => found.extend(harvest(&mut ring)),
                    5 => drop(kernel.reset(&memory)),
                    slot => {
                        page += 1;
                        if kernel.write(&memory, slot.into(), page) {
                            written.push((u32::from(slot), page));
                        }
                    }
                }
            }
            prop_assert_eq!(found, written);
        }
    }

    #[test]
    fn a_thread_that_fills_and_one_that_harvests_agree() {
        let memory = memory(64);
        let (mut ring, kernel) = (Ring::new(&memory[..]), parking_lot::Mutex::new(Kernel::new()));
        const PAGES: u64 = 20_000;
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for page in 0..PAGES {
                    while !kernel.lock().write(&memory, page as u32 & 7, page) {
                        std::thread::yield_now();
                    }
                }
            });
            while found.len() < PAGES as usize {
                found.extend(harvest(&mut ring));
                kernel.lock().reset(&memory);
            }
        });
        assert!(found.iter().enumerate().all(|(i, (slot, page))| *page == i as u64 && *slot == i as u32 & 7));
    }
}
