//! The payload guest notices what it must notice.

use crate::Test;
use crate::guest::Guest;
use reference_vmm::memory::PAGE_SIZE;
use reference_vmm::payload::Reads;

pub(crate) const TESTS: &[Test] = &[
    ("payload_runs_on_one_to_four_vcpus", runs_on_one_to_four_vcpus),
    ("payload_works_on_ram_above_4_gib", works_on_ram_above_4_gib),
    ("payload_keeps_its_rate", keeps_its_rate),
    ("payload_sees_a_stale_hot_page", sees_a_stale_hot_page),
    ("payload_sees_one_stale_word", sees_one_stale_word),
    ("payload_sees_a_changed_background_page", sees_a_changed_background_page),
    ("payload_sees_stale_control_data", sees_stale_control_data),
    ("payload_sees_the_tsc_go_back", sees_the_tsc_go_back),
    ("payload_reads_at_random", reads_at_random),
    ("payload_refuses_a_bad_configuration", refuses_a_bad_configuration),
];

const MIB: u64 = 1 << 20;
const BASE_PAGE: u64 = 4 * MIB / PAGE_SIZE;
/// 1 MiB hot, then 1 MiB hold, then 1 MiB zero.
const SMALL: &str = "dirty=1M hold=1M zero=1M report=20";

fn runs_on_one_to_four_vcpus() {
    for cpus in 1..=4 {
        let guest = Guest::boot(32 * MIB, cpus, SMALL);
        guest.assert_healthy();
        let banner = guest.console.wait_for_line("qevm-payload start");
        let dirty = 256 / cpus * cpus * 4096;
        assert!(banner.contains(&format!(" cpus={cpus} ram={} base=4194304 dirty={dirty} ", 32 * MIB)), "{banner}");
    }
}

fn works_on_ram_above_4_gib() {
    let guest = Guest::boot((3 << 30) + 16 * MIB, 1, &format!("base=4G {SMALL}"));
    guest.assert_healthy();
    assert!(!guest.machine.memory().blocks()[0].page_is_zero((3 << 30) / PAGE_SIZE).unwrap());
}

fn keeps_its_rate() {
    // 256 pages per second on two vCPUs.
    let guest = Guest::boot(32 * MIB, 2, "dirty=1M rate=1M report=20");
    let start = guest.wait_until(|_| true);
    let end = guest.wait_until(|progress| progress.ms >= start.ms + 2000);
    let rate = (end.written - start.written) * 1000 / (end.ms - start.ms);
    // It may fall behind on a loaded machine, but it never runs ahead by more than its batches of 16 pages.
    assert!((1..=300).contains(&rate), "{rate} pages per second");
}

/// Spoils the paused guest's memory until it has `seen` that. A guest that is paused between the check of a word and
/// the moment at which it writes there itself sees nothing: it gets it again then.
fn spoiled<T>(guest: &Guest, spoil: impl Fn(), seen: impl Fn() -> Option<T>) -> T {
    for _ in 0..10 {
        guest.machine.pause();
        spoil();
        guest.machine.resume().unwrap();
        guest.wait_for_passes();
        // It says what it sees before it says how far it is.
        guest.wait_until(|_| true);
        if let Some(seen) = seen() {
            return seen;
        }
    }
    panic!("nothing seen: {}", guest.console.text());
}

/// The line that begins so, if the guest has printed it.
fn says(guest: &Guest, start: &str) -> Option<String> {
    guest.console.lines().into_iter().find(|line| line.starts_with(start))
}

fn sees_a_stale_hot_page() {
    let guest = Guest::boot(32 * MIB, 1, SMALL);
    let block = &guest.machine.memory().blocks()[0];
    guest.machine.pause();
    let mut old = [0; PAGE_SIZE as usize];
    block.read((BASE_PAGE + 17) * PAGE_SIZE, &mut old).unwrap();
    guest.machine.resume().unwrap();
    let now = guest.wait_until(|_| true);
    guest.wait_until(|progress| progress.pass > now.pass + 2);
    let spoil = || block.write((BASE_PAGE + 17) * PAGE_SIZE, &old).unwrap();
    let line = spoiled(&guest, spoil, || says(&guest, "qevm-payload stale-page"));
    assert!(line.starts_with("qevm-payload stale-page kind=hot cpu=0 page=17 word=0 expected=00000011"), "{line}");
    assert_eq!(guest.wait_until(|progress| progress.stale > 0).stale, 1, "it is rewritten and counted once");
}

fn sees_one_stale_word() {
    let guest = Guest::boot(32 * MIB, 1, SMALL);
    let block = &guest.machine.memory().blocks()[0];
    // The last word of an ordinary page, any word of each 32nd.
    for (page, word) in [(5, 511), (64, 100)] {
        let before = guest.wait_until(|_| true).stale;
        let spoil = || {
            let offset = (BASE_PAGE + page) * PAGE_SIZE + word * 8;
            let mut bytes = [0; 8];
            block.read(offset, &mut bytes).unwrap();
            bytes[3] ^= 0x10;
            block.write(offset, &bytes).unwrap();
        };
        let line = format!("qevm-payload stale-page kind=hot cpu=0 page={page} word={word} expected=");
        spoiled(&guest, spoil, || says(&guest, &line));
        assert_eq!(guest.wait_until(|progress| progress.stale > before).stale, before + 1);
    }
}

fn sees_a_changed_background_page() {
    let guest = Guest::boot(32 * MIB, 1, SMALL);
    let block = &guest.machine.memory().blocks()[0];
    for (kind, start) in [("hold", 5 * MIB), ("zero", 6 * MIB)] {
        guest.machine.pause();
        let offset = start + 200 * PAGE_SIZE + 8 * 33;
        let mut bytes = [0; 8];
        block.read(offset, &mut bytes).unwrap();
        assert_eq!(bytes == [0; 8], kind == "zero");
        bytes[0] ^= 1;
        block.write(offset, &bytes).unwrap();
        guest.machine.resume().unwrap();
        let line = format!("qevm-payload stale-page kind={kind} cpu=0 page=200 word=33 expected=");
        guest.console.wait_for_line(&line);
    }
}

fn sees_stale_control_data() {
    // The page with the guest's own counters, taken back to an earlier pass.
    let guest = Guest::boot(32 * MIB, 1, SMALL);
    let block = &guest.machine.memory().blocks()[0];
    guest.machine.pause();
    let mut old = [0; PAGE_SIZE as usize];
    block.read(0x5000, &mut old).unwrap();
    guest.machine.resume().unwrap();
    let now = guest.wait_until(|_| true);
    guest.wait_until(|progress| progress.pass > now.pass + 2);
    let spoil = || block.write(0x5000, &old).unwrap();
    spoiled(&guest, spoil, || says(&guest, "qevm-payload stale-page kind=control cpu=0"));
}

fn sees_the_tsc_go_back() {
    // The last TSC that vCPU 0 remembers is set to the far future: a paravirtual KVM does not let us move the TSC
    // itself.
    let guest = Guest::boot(32 * MIB, 1, SMALL);
    let spoil = || guest.machine.memory().write(0x5028 + 7, &[0x7f]).unwrap();
    let progress = spoiled(&guest, spoil, || Some(guest.wait_until(|_| true)).filter(|progress| progress.tsc_back > 0));
    assert_eq!((progress.tsc_back, progress.stale), (1, 0));
}

fn reads_at_random() {
    // Only the reader looks at these pages.
    let guest = Guest::boot(32 * MIB, 1, "dirty=1M rate=1M hold=1M zero=0 verify=0 reader=1 report=20");
    let line = guest.console.wait_for_line("qevm-payload reads");
    let reads = Reads::parse(&line).unwrap_or_else(|| panic!("{line}"));
    assert!(reads.count() <= reads.total, "{line}");
    let block = &guest.machine.memory().blocks()[0];
    // It meets each page.
    for page in [0, 77, 255] {
        guest.machine.pause();
        let offset = 5 * MIB + page * PAGE_SIZE;
        let mut bytes = [0; 8];
        block.read(offset, &mut bytes).unwrap();
        bytes[0] ^= 1;
        block.write(offset, &bytes).unwrap();
        guest.machine.resume().unwrap();
        guest.console.wait_for_line(&format!("qevm-payload stale-page kind=hold cpu=0 page={page} word=0 expected="));
        bytes[0] ^= 1;
        block.write(offset, &bytes).unwrap();
    }
}

fn refuses_a_bad_configuration() {
    for (payload, line) in [
        (
            "dirty=1M wrong=1",
            "qevm-payload error: not understood, want KEY=NUMBER[K|M|G] with a known key, at: wrong=1",
        ),
        ("dirty=1Mx", "qevm-payload error: not understood, want KEY=NUMBER[K|M|G] with a known key, at: dirty=1Mx"),
        ("dirty=64M", "qevm-payload error: base + dirty + hold + zero must lie within one piece of RAM, from 4M"),
        ("base=1M", "qevm-payload error: base + dirty + hold + zero must lie within one piece of RAM, from 4M"),
        ("dirty=4K cpus=0", "qevm-payload error: cpus must not be 0"),
    ] {
        let guest = Guest::new(32 * MIB, 1, payload);
        guest.machine.resume().unwrap();
        assert_eq!(guest.console.wait_for_line("qevm-payload"), line, "{payload}");
    }
}
