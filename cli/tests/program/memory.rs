//! Guest-physical memory of machines of every target. See `streams/reported/README.md` for where the values come from.

use crate::reported::{good, reported, run};
use crate::sample::file;
use std::os::unix::fs::FileExt;
use tempfile::TempDir;

/// The eight bytes at `address` of `m.raw`.
fn word(dir: &TempDir, address: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(dir.path().join("m.raw")).unwrap().read_exact_at(&mut bytes, address).unwrap();
    u64::from_le_bytes(bytes)
}

const MARK: u64 = 0x1122_3344_5566_7788;
const OTHER_MARK: u64 = 0x8877_6655_4433_2211;

#[test]
fn memory_is_where_the_guest_has_it() {
    let dir = TempDir::new().unwrap();
    for (name, address, mark) in [
        ("membackend.q", 0x20_0000, MARK),
        ("numa.q", 0x20_0000, MARK),
        ("numa.q", 0x120_0000, OTHER_MARK),
        ("noconf.q", 0x20_0000, MARK),
        ("arm-virt.q", 0x4020_0000, MARK),
        ("riscv-virt.q", 0x8020_0000, MARK),
        ("loongarch.q", 0x20_0000, MARK),
        ("loongarch.q", 0x8020_0000, OTHER_MARK),
        ("malta.q", 0x20_0000, MARK),
        ("malta.q", 0x2020_0000, OTHER_MARK),
        ("malta.q", 0x8020_0000, MARK),
        ("malta.q", 0xa020_0000, OTHER_MARK),
        ("m68k.q", 0x20_0000, MARK),
        ("alpha.q", 0x200_0000, MARK),
    ] {
        let stream = file(&dir, name, &reported(name));
        good(&dir, "extract --force --strict --memory DIR/m.raw FILE", &stream);
        assert_eq!(word(&dir, address), mark, "{name}");
    }
}

/// `info mtree -f` of the boards; their flash is none of the guest's memory.
#[test]
fn memory_of_boards_is_where_they_have_it() {
    let dir = TempDir::new().unwrap();
    for (name, place) in [("netduino2.q", "0x20000000 to 0x20020000"), ("microbit.q", "0x20000000 to 0x20004000")] {
        let stream = file(&dir, name, &reported(name));
        let said = good(&dir, "extract --force --strict --memory DIR/m.raw FILE", &stream);
        assert!(said.contains(&format!("memory at {place} (according to the rules of the machine type)")), "{said}");
        // Their processors have no place in a core of Linux's kind, which is said.
        let ran = run(&dir, "extract --elf DIR/core.elf FILE", &stream);
        assert!(ran.code == Some(2) && ran.stderr.contains("M-profile"), "{}", ran.stderr);
    }
}

#[test]
fn a_dimm_lies_where_qemu_puts_it() {
    let dir = TempDir::new().unwrap();
    let stream = file(&dir, "dimm.q", &reported("dimm.q"));
    let said = good(&dir, "extract --force --strict --memory DIR/m.raw FILE", &stream);
    assert!(
        said.contains("DIMM 'd0' at 0x100000000: ") && said.contains("memory at 0x100000000 to 0x108000000"),
        "{said}"
    );
    assert_eq!(word(&dir, 1 << 32), OTHER_MARK);
    assert_eq!(std::fs::metadata(dir.path().join("m.raw")).unwrap().len(), 0x1_0800_0000);
    let core = good(&dir, "extract --force --json --elf DIR/core.elf FILE", &stream);
    assert!(core.contains("memory at 0x100000000 to 0x108000000"), "{core}");
}

#[test]
fn memory_that_is_left_out_is_named() {
    let dir = TempDir::new().unwrap();
    let stream = file(&dir, "dimm.q", &reported("dimm.q"));
    // A list of main memory may leave some out.
    let words = "--memory-block d0 --machine pc-q35-11.1";
    let said = good(&dir, &format!("extract --json {words} --memory DIR/m.raw FILE"), &stream);
    assert!(said.contains("left out: RAM block 'pc.ram', 16 MiB"), "{said}");
    let strict = run(&dir, &format!("extract --force --strict {words} --memory DIR/m.raw FILE"), &stream);
    assert!(strict.code == Some(2) && strict.stderr.contains("'pc.ram'"), "{}", strict.stderr);
    let placed = "--memory-block pc.ram --memory-block d0@0x140000000";
    good(&dir, &format!("extract --force --strict {placed} --memory DIR/m.raw FILE"), &stream);
    assert_eq!(word(&dir, 0x1_4000_0000), OTHER_MARK);
}
