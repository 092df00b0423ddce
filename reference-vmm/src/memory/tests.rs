use super::*;

const MIB: u64 = 1 << 20;

fn bios() -> Vec<u8> {
    (0..64 << 10).map(|i| (i >> 8) as u8).collect()
}

#[test]
fn microvm_has_the_blocks_of_qemu() {
    let memory = GuestMemory::microvm(128 * MIB, &bios()).unwrap();
    let blocks: Vec<_> = memory.blocks().iter().map(|b| (b.name(), b.used_length(), b.max_length())).collect();
    // `info ramblock` of QEMU 11.1.3 with a firmware of 64 KiB.
    assert_eq!(
        blocks,
        [
            ("microvm.ram", 128 * MIB, 128 * MIB),
            ("/rom@etc/acpi/tables", 4096, 2 * MIB),
            ("pc.bios", 0x10000, 0x10000),
            ("/rom@etc/table-loader", 4096, 0x10000),
            ("/rom@etc/acpi/rsdp", 4096, 4096),
        ]
    );
}

#[test]
fn microvm_puts_ram_beyond_3_gib_at_4_gib() {
    let memory = GuestMemory::microvm(4096 * MIB, &bios()).unwrap();
    let seen: Vec<_> = memory.mappings().iter().map(|m| (m.gpa, m.block, m.offset, m.len)).collect();
    // `info mtree -f` of QEMU 11.1.3 with -m 4G and a firmware of 64 KiB.
    assert_eq!(
        seen,
        [
            (0, 0, 0, 0xf0000),
            (0xf0000, 2, 0, 0x10000),
            (0x100000, 0, 0x100000, 0xbff00000),
            (0xffff0000, 2, 0, 0x10000),
            (0x100000000, 0, 0xc0000000, 0x40000000),
        ]
    );
}

#[test]
fn an_access_may_cross_mappings() {
    let memory = GuestMemory::microvm(8 * MIB, &bios()).unwrap();
    memory.write(0xeffff, &[1; 0x10002]).unwrap();
    let mut byte = [0];
    for (gpa, want) in [(0xefffe, 0), (0xeffff, 1), (0x100000, 1), (0x100001, 0), (0xffff0000, 1)] {
        memory.read(gpa, &mut byte).unwrap();
        assert_eq!(byte[0], want, "{gpa:#x}");
    }
}

#[test]
fn outside_of_ram_is_an_error() {
    let memory = GuestMemory::microvm(8 * MIB, &bios()).unwrap();
    for gpa in [8 * MIB - 1, 8 * MIB, 1 << 32, u64::MAX, u64::MAX - 1] {
        assert!(matches!(memory.read(gpa, &mut [0; 2]), Err(Error::OutOfRange { .. })), "{gpa:#x}");
    }
    let block = &memory.blocks()[0];
    for (offset, len) in [(8 * MIB, 1), (8 * MIB - 1, 2), (u64::MAX, 2)] {
        assert!(matches!(block.slice(offset, len), Err(Error::OutOfRange { .. })));
    }
}

#[test]
fn the_unused_part_of_a_block_is_out_of_range() {
    let block = RamBlock::new(ACPI_TABLES, 4096, 8192).unwrap();
    assert!(block.write(4096, &[1]).is_err());
    block.resize(8192).unwrap();
    block.write(4096, &[1]).unwrap();
    assert!(matches!(block.resize(12288), Err(Error::State(_))));
    assert!(matches!(RamBlock::new(RAM, 8192, 8192).unwrap().resize(4096), Err(Error::State(_))));
}

#[test]
fn impossible_machines_are_refused() {
    for ram in [0, 1 << 20, 128 * MIB + 1, 1 << 50] {
        assert!(matches!(GuestMemory::microvm(ram, &bios()), Err(Error::Config(_))), "{ram}");
    }
    for len in [0, 1, 65535, 65537, MAX_BIOS + 65536] {
        assert!(matches!(GuestMemory::microvm(128 * MIB, &vec![0; len]), Err(Error::Config(_))), "{len}");
    }
}

#[test]
fn the_monitors_writes_are_recorded() {
    let memory = GuestMemory::microvm(8 * MIB, &bios()).unwrap();
    memory.write(0x1fff, &[1, 2]).unwrap();
    let writes = memory.blocks()[0].take_vmm_writes();
    assert_eq!(writes[0], 0b110);
    assert!(writes[1..].iter().all(|w| *w == 0));
    assert!(memory.blocks()[0].take_vmm_writes().iter().all(|w| *w == 0));
    assert!(memory.blocks()[2].take_vmm_writes().iter().all(|w| *w == 0), "loading the firmware does not count");
}
