//! The dirty log loses no page.

use crate::Test;
use crate::guest::Guest;
use reference_vmm::Error;
use reference_vmm::dirty_log::{DirtyBitmap, PAGES_PER_WORD};
use reference_vmm::memory::{GuestMemory, PAGE_SIZE};

pub(crate) const TESTS: &[Test] = &[
    ("dirty_log_reports_a_page_again_after_a_clear", reports_a_page_again_after_a_clear),
    ("dirty_log_has_the_monitors_own_writes", has_the_monitors_own_writes),
    ("dirty_log_has_every_page_that_changed", has_every_page_that_changed),
    ("dirty_log_clears_only_what_it_is_told", clears_only_what_it_is_told),
    ("dirty_log_can_be_switched_off_and_on", can_be_switched_off_and_on),
    ("dirty_log_carries_a_live_copy", carries_a_live_copy),
];

const MIB: u64 = 1 << 20;
const SMALL: &str = "dirty=1M hold=1M zero=1M report=20";
const HOT: std::ops::Range<u64> = 4 * MIB / PAGE_SIZE..5 * MIB / PAGE_SIZE;

/// Clears all marks, in the log as well.
fn drain(guest: &Guest, dirty: &mut DirtyBitmap) {
    for (block, ram) in guest.machine.memory().blocks().iter().enumerate() {
        let taken = dirty.take(block, 0, ram.pages().div_ceil(PAGES_PER_WORD) as usize);
        guest.machine.dirty_log().clear(block, 0, &taken).unwrap();
    }
    assert_eq!(dirty.count(), 0);
}

/// A paused guest with the log on and empty.
fn logged(memory: u64, cpus: usize, payload: &str) -> (Guest, DirtyBitmap) {
    let guest = Guest::boot(memory, cpus, payload);
    guest.machine.pause();
    guest.machine.dirty_log().enable().unwrap();
    let mut dirty = DirtyBitmap::none(guest.machine.memory());
    guest.machine.dirty_log().sync(&mut dirty).unwrap();
    drain(&guest, &mut dirty);
    assert_eq!(guest.machine.dirty_log().sync(&mut dirty).unwrap(), 0);
    (guest, dirty)
}

fn one_pass(guest: &Guest) {
    guest.machine.resume().unwrap();
    guest.wait_for_passes();
    guest.machine.pause();
}

fn reports_a_page_again_after_a_clear() {
    let (guest, mut dirty) = logged(32 * MIB, 2, SMALL);
    let log = guest.machine.dirty_log();
    for round in 0..3 {
        one_pass(&guest);
        let new = log.sync(&mut dirty).unwrap();
        let missing: Vec<_> = HOT.filter(|page| !dirty.contains(0, *page)).collect();
        assert_eq!(missing, [0; 0], "round {round}: pages written and not reported");
        // KVM may report pages that were only read (the background ranges), but none that was not used at all.
        assert!(new >= 256);
        assert!((8 * MIB / PAGE_SIZE..32 * MIB / PAGE_SIZE).all(|page| !dirty.contains(0, page)));
        assert_eq!(log.sync(&mut dirty).unwrap(), 0);
        drain(&guest, &mut dirty);
        assert_eq!(log.sync(&mut dirty).unwrap(), 0, "a cleared page was reported though nothing ran");
    }
}

fn has_the_monitors_own_writes() {
    let (guest, mut dirty) = logged(32 * MIB, 1, SMALL);
    let memory = guest.machine.memory();
    memory.write(20 * MIB + 4095, &[1, 2]).unwrap();
    memory.write(0xffff_0000, &[0xf4]).unwrap();
    assert_eq!(guest.machine.dirty_log().sync(&mut dirty).unwrap(), 3);
    let page = 20 * MIB / PAGE_SIZE;
    assert!(dirty.contains(0, page) && dirty.contains(0, page + 1) && dirty.contains(2, 0));
}

fn snapshot(memory: &GuestMemory) -> Vec<Vec<u8>> {
    let read = |ram: &reference_vmm::memory::RamBlock| {
        let mut bytes = vec![0; ram.used_length() as usize];
        ram.read(0, &mut bytes).unwrap();
        bytes
    };
    memory.blocks().iter().map(|ram| read(ram)).collect()
}

fn has_every_page_that_changed() {
    // RAM on both sides of the hole, the guest above it; the control block, stacks and tables below.
    for (memory, payload) in [(32 * MIB, SMALL.to_owned()), ((3 << 30) + 16 * MIB, format!("base=4G {SMALL}"))] {
        let (guest, mut dirty) = logged(memory, 2, &payload);
        if memory > 1 << 30 {
            one_pass(&guest);
            guest.machine.dirty_log().sync(&mut dirty).unwrap();
            let high = (3 << 30) / PAGE_SIZE;
            assert!((high..high + 256).all(|page| dirty.contains(0, page)));
            assert!(!dirty.contains(0, 4 * MIB / PAGE_SIZE));
            continue;
        }
        let before = snapshot(guest.machine.memory());
        one_pass(&guest);
        let after = snapshot(guest.machine.memory());
        guest.machine.dirty_log().sync(&mut dirty).unwrap();
        let mut changed = 0;
        for (block, (before, after)) in before.iter().zip(&after).enumerate() {
            let pages = before.chunks(PAGE_SIZE as usize).zip(after.chunks(PAGE_SIZE as usize));
            for (page, _) in pages.enumerate().filter(|(_, (before, after))| before != after) {
                changed += 1;
                assert!(dirty.contains(block, page as u64), "page {page} of block {block} changed unnoticed");
            }
        }
        assert!(changed > 256, "{changed}");
    }
}

fn clears_only_what_it_is_told() {
    let (guest, mut dirty) = logged(32 * MIB, 1, SMALL);
    let log = guest.machine.dirty_log();
    one_pass(&guest);
    log.sync(&mut dirty).unwrap();
    // Only page 1 of the first word of the hot range is cleared; the log goes on to report all others.
    log.clear(0, HOT.start, &[0b10]).unwrap();
    let mut again = DirtyBitmap::none(guest.machine.memory());
    log.sync(&mut again).unwrap();
    if log.manual_protect() {
        let reported: Vec<_> = HOT.filter(|page| again.contains(0, *page)).collect();
        let expected: Vec<_> = HOT.filter(|page| *page != HOT.start + 1).collect();
        assert_eq!(reported, expected);
    }
    assert!(matches!(log.clear(0, 1, &[1]), Err(Error::Config(_))));
    assert!(matches!(log.clear(9, 0, &[1]), Err(Error::Config(_))));
    // Beyond the end of the block, and the part of RAM that the firmware hides: nothing to clear, nothing breaks.
    log.clear(0, 1 << 40, &[u64::MAX; 4]).unwrap();
    log.clear(0, 192, &[u64::MAX; 2]).unwrap();
    log.clear(2, 0, &[u64::MAX]).unwrap();
}

fn can_be_switched_off_and_on() {
    let (guest, mut dirty) = logged(32 * MIB, 1, SMALL);
    let log = guest.machine.dirty_log();
    log.disable().unwrap();
    assert!(matches!(log.sync(&mut dirty), Err(Error::Config(_))));
    log.clear(0, 0, &[1]).unwrap();
    guest.machine.resume().unwrap();
    for _ in 0..5 {
        // While the guest runs, as a migration that is started and cancelled does.
        log.enable().unwrap();
        log.enable().unwrap();
        let mut dirty = DirtyBitmap::none(guest.machine.memory());
        guest.wait_for_passes();
        log.sync(&mut dirty).unwrap();
        assert!(HOT.clone().all(|page| dirty.contains(0, page)));
        log.disable().unwrap();
    }
    guest.assert_healthy();
}

/// All dirty pages, a word at a time: clear first, then copy.
fn copy_dirty(guest: &Guest, dirty: &mut DirtyBitmap, to: &GuestMemory) -> u64 {
    let mut copied = 0;
    for (block, (from, to)) in guest.machine.memory().blocks().iter().zip(to.blocks()).enumerate() {
        let mut next = 0;
        while let Some(page) = dirty.next(block, next) {
            let first = page / PAGES_PER_WORD * PAGES_PER_WORD;
            let taken = dirty.take(block, first, 1);
            guest.machine.dirty_log().clear(block, first, &taken).unwrap();
            for page in (0..PAGES_PER_WORD).filter(|bit| taken[0] >> bit & 1 != 0).map(|bit| first + bit) {
                let mut bytes = [0; PAGE_SIZE as usize];
                from.read(page * PAGE_SIZE, &mut bytes).unwrap();
                to.write(page * PAGE_SIZE, &bytes).unwrap();
                copied += 1;
            }
            next = first + PAGES_PER_WORD;
        }
    }
    copied
}

fn carries_a_live_copy() {
    for cpus in [1, 2, 4] {
        let guest = Guest::boot(64 * MIB, cpus, "dirty=8M hold=4M zero=4M report=20 rate=64M");
        let next = Guest::new(64 * MIB, cpus, "");
        let log = guest.machine.dirty_log();
        log.enable().unwrap();
        let mut dirty = DirtyBitmap::all(guest.machine.memory());
        for round in 0..6 {
            let copied = copy_dirty(&guest, &mut dirty, next.machine.memory());
            assert!(copied > 0, "round {round}: the guest dirties pages all the time");
            guest.wait_until(|_| true);
            log.sync(&mut dirty).unwrap();
        }
        guest.machine.pause();
        log.sync(&mut dirty).unwrap();
        assert!(snapshot(guest.machine.memory()) != snapshot(next.machine.memory()), "the log had nothing to tell");
        copy_dirty(&guest, &mut dirty, next.machine.memory());
        assert!(snapshot(guest.machine.memory()) == snapshot(next.machine.memory()), "the copy differs");
        next.machine.load_state(&guest.machine.save_state().unwrap()).unwrap();
        next.machine.resume().unwrap();
        next.assert_healthy();
    }
}
