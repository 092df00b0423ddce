use super::*;
use crate::Error;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;

fn memory() -> GuestMemory {
    GuestMemory::microvm(8 * MIB, &[0; 64 << 10]).unwrap()
}

fn read<const N: usize>(memory: &GuestMemory, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read(gpa, &mut bytes).unwrap();
    bytes
}

fn number(memory: &GuestMemory, gpa: u64) -> u64 {
    u64::from_le_bytes(read(memory, gpa))
}

/// An ELF file with one segment for `at`, of these bytes and a length in memory, and a PVH note for `entry`.
fn elf(at: u64, bytes: &[u8], in_memory: u64, entry: u32) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, 2, 0]);
    let mut header = |index: usize, kind: u32, words: [u64; 6]| {
        let start = 64 + 56 * index;
        file[start..start + 4].copy_from_slice(&kind.to_le_bytes());
        for (i, word) in words.into_iter().enumerate() {
            file[start + 8 + 8 * i..][..8].copy_from_slice(&word.to_le_bytes());
        }
    };
    header(0, 1, [0x1000, at, at, bytes.len() as u64, in_memory, 0x1000]);
    header(1, 4, [0x800, 0, 0, 20, 20, 4]);
    file[0x800..0x814].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0, 0, 0, 0]);
    file[0x810..0x814].copy_from_slice(&entry.to_le_bytes());
    file.extend_from_slice(bytes);
    file
}

/// A bzImage of one setup sector that needs `init_size` bytes from 1 MiB on.
fn bzimage(code: &[u8], init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 0x400 + 0x200];
    file[0x1f1] = 1;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x211] = 1;
    file[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    file.extend_from_slice(code);
    file
}

fn kernel(image: Vec<u8>) -> Kernel {
    Kernel { image, ..Kernel::default() }
}

fn refused(kernel: &Kernel) -> BootError {
    match load(&memory(), kernel, 1, &[], None) {
        Err(Error::Boot(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn pvh_start_info_names_what_was_loaded() {
    let memory = memory();
    let given = Kernel {
        initrd: b"disk".to_vec(),
        command_line: "acpi=off".into(),
        ..kernel(elf(2 * MIB, b"code", 4096, 0x20_0000))
    };
    let entry = load(&memory, &given, 2, &[VirtioDevice::Rng], None).unwrap();
    assert_eq!(entry, Entry::Pvh { entry: 0x20_0000, start_info: 0x6000 });
    assert_eq!(&read(&memory, 2 * MIB), b"code");
    // Magic, version 1, no flags, one module.
    assert_eq!(read(&memory, 0x6000), [0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    let [modules, command_line, rsdp, map] = [0, 1, 2, 3].map(|i| number(&memory, 0x6010 + 8 * i));
    assert_eq!(rsdp, 0);
    assert_eq!(&read(&memory, command_line), b"acpi=off virtio_mmio.device=512@0xfeb02e00:47\0");
    assert_eq!((number(&memory, modules), number(&memory, modules + 8)), (8 * MIB - 4096, 4));
    assert_eq!(&read(&memory, 8 * MIB - 4096), b"disk");
    assert_eq!(read(&memory, 0x6030), [4, 0, 0, 0]);
    let entries = [0, 1, 2, 3].map(|i| [0, 1, 2].map(|word| number(&memory, map + 24 * i + 8 * word)));
    assert_eq!(entries, [[0, 0x9_0000, 1], [0x9_0000, 0xf000, 3], [0x9_f000, 0x6_1000, 2], [MIB, 7 * MIB, 1]]);
    assert_eq!((&read(&memory, MP_POINTER), &read(&memory, MP_TABLE)), (b"_MP_", b"PCMP"));
}

#[test]
fn the_zero_page_names_what_was_loaded() {
    let memory = memory();
    let given = Kernel { initrd: vec![7; 5000], command_line: "a=b".into(), ..kernel(bzimage(b"code", 2 << 20)) };
    let entry = load(&memory, &given, 1, &[], None).unwrap();
    assert_eq!(entry, Entry::Linux64 { entry: 0x10_0200, zero_page: 0x7000 });
    assert_eq!(&read(&memory, 0x10_0200), b"code");
    let u32_at = |at: u64| u32::from_le_bytes(read(&memory, 0x7000 + at));
    assert_eq!(&read(&memory, u32_at(0x228).into()), b"a=b\0");
    assert_eq!((u32_at(0x218), u32_at(0x21c)), (8 * MIB as u32 - 8192, 5000));
    assert_eq!(read(&memory, u32_at(0x218).into()), [7; 4]);
    assert_eq!((read(&memory, 0x71e8), read(&memory, 0x7210)), ([4], [0xff]));
    assert_eq!(&read(&memory, 0x7202), b"HdrS");
    assert_eq!((number(&memory, 0x72d0), number(&memory, 0x72d8)), (0, 0x9_0000));
    let tables = number(&memory, 0x7070);
    assert_eq!(&read(&memory, tables), b"RSD PTR ");
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    assert!(matches!(refused(&kernel(Vec::new())), BootError::UnknownFormat { .. }));
    assert!(matches!(refused(&kernel(vec![0; 4096])), BootError::UnknownFormat { .. }));
    assert!(matches!(refused(&kernel(b"\x7fELF".to_vec())), BootError::Header { .. }));
    let good = elf(2 * MIB, b"code", 4096, 0x20_0000);
    for len in (4..good.len()).step_by(97).chain([good.len() - 1]) {
        assert!(matches!(refused(&kernel(good[..len].to_vec())), BootError::Header { .. }), "{len}");
    }
    let changed = |at: usize, to: &[u8]| {
        let mut file = good.clone();
        file[at..at + to.len()].copy_from_slice(to);
        refused(&kernel(file))
    };
    assert!(matches!(changed(4, &[1]), BootError::Header { offset: 4, found: 1, .. }));
    assert!(matches!(changed(32, &[0xff; 8]), BootError::Header { offset: 32, .. }));
    assert!(matches!(changed(54, &[0]), BootError::Header { offset: 54, .. }));
    assert!(matches!(changed(56, &[0xff, 0xff]), BootError::Header { .. }));
    assert!(matches!(changed(0x808, &[17]), BootError::NoPvhEntry));
    assert!(matches!(changed(0x804, &[2]), BootError::Loader(_)));
    assert!(matches!(changed(64 + 32, &[0xff; 8]), BootError::Header { offset: 64, .. }));
}

#[test]
fn bzimages_of_other_times_are_refused() {
    let good = bzimage(b"code", 1 << 20);
    let changed = |at: usize, to: &[u8]| {
        let mut file = good.clone();
        file[at..at + to.len()].copy_from_slice(to);
        refused(&kernel(file))
    };
    assert!(matches!(changed(0x206, &[0x0b]), BootError::Header { offset: 0x206, found: 0x20b, .. }));
    assert!(matches!(changed(0x236, &[0]), BootError::Header { offset: 0x236, .. }));
    assert!(matches!(changed(0x1f1, &[200]), BootError::Header { offset: 0x1f1, found: 200, .. }));
    assert!(matches!(changed(0x211, &[0]), BootError::Loader(_)), "a zImage");
    assert!(matches!(changed(0x214, &[0; 4]), BootError::NoRoom { start: 0, .. }));
    assert!(matches!(changed(0x214, &[0xff; 4]), BootError::NoRoom { .. }));
    assert!(matches!(changed(0x258, &[0xff; 8]), BootError::NoRoom { end: u64::MAX, .. }));
    for len in (0x206..good.len() - 4).step_by(33) {
        assert!(matches!(refused(&kernel(good[..len].to_vec())), BootError::Header { .. }), "{len}");
    }
}

#[test]
fn what_has_no_room_is_named() {
    let no_room =
        |image| matches!(refused(&kernel(image)), BootError::NoRoom { ram_start: 0x10_0000, ram_end: 0x80_0000, .. });
    assert!(no_room(elf(2 * MIB, b"code", 7 * MIB, 0x20_0000)));
    assert!(no_room(elf(0x5000, b"code", 4096, 0x5000)), "where the monitor's own tables are");
    assert!(no_room(elf(u64::MAX - 8, b"code", 4096, 0x20_0000)));
    assert!(no_room(bzimage(b"code", 8 << 20)));
    let outside = refused(&kernel(elf(2 * MIB, b"code", 4096, 0x30_0000)));
    assert!(matches!(outside, BootError::NoRoom { start: 0x30_0000, ram_end: 0x20_1000, .. }));
}

#[test]
fn an_initrd_never_lies_in_the_kernel() {
    for image in [elf(2 * MIB, b"code", 4 * MIB, 0x20_0000), bzimage(b"code", 5 << 20)] {
        let kernel = |size: u64| Kernel { initrd: vec![1; size as usize], ..kernel(image.clone()) };
        load(&memory(), &kernel(2 * MIB), 1, &[], None).unwrap();
        let error = refused(&kernel(2 * MIB + 1));
        assert!(matches!(error, BootError::InitrdNoRoom { size, .. } if size == 2 * MIB + 1), "{error}");
    }
}

#[test]
fn command_lines_are_bounded() {
    let with = |command_line: String| Kernel { command_line, ..kernel(bzimage(b"code", 1 << 20)) };
    load(&memory(), &with("x".repeat(2047)), 1, &[], None).unwrap();
    assert!(matches!(refused(&with("x".repeat(2048))), BootError::CommandLineLength { found: 2048, most: 2047 }));
    assert!(matches!(refused(&with("x".repeat(1 << 20))), BootError::CommandLineLength { .. }));
    assert!(matches!(refused(&with("a\0b".into())), BootError::CommandLineZero(1)));
}

#[test]
fn firmware_finds_a_bzimage_in_parts() {
    let given =
        Kernel { initrd: vec![7; 5000], command_line: "a=b".into(), by_firmware: true, ..kernel(bzimage(b"code", 0)) };
    let (mut items, mut files) = (BTreeMap::new(), BTreeMap::new());
    add_items(&mut items, &mut files, 4096 * MIB, Some(&given)).unwrap();
    let number = |key: u16| u32::from_le_bytes(*items[&key].first_chunk().unwrap());
    assert_eq!((number(0x08) as usize, &items[&0x11]), (given.image.len() - 0x400, &given.image[0x400..].to_vec()));
    assert_eq!((number(0x17), items[&0x18].len()), (0x400, 0x400));
    assert_eq!((number(0x14), items[&0x15].as_slice()), (4, b"a=b\0".as_slice()));
    assert_eq!((number(0x0b), &items[&0x12]), (5000, &given.initrd));
    // The limit is the kernel's own: below 2 GiB.
    assert_eq!(number(0x0a), 0x7fff_e000);
    assert_eq!(items[&0x18][0x218..0x220], [&number(0x0a).to_le_bytes()[..], &5000u32.to_le_bytes()].concat());
    assert_eq!(files["etc/e820"].len(), 2 * 20);
    let elf = Kernel { by_firmware: true, ..kernel(elf(2 * MIB, b"code", 4096, 0x20_0000)) };
    for bad in [elf, Kernel { by_firmware: true, ..kernel(bzimage(b"", 0)[..0x300].to_vec()) }] {
        assert!(matches!(
            add_items(&mut items, &mut files, 128 * MIB, Some(&bad)),
            Err(Error::Boot(BootError::Header { .. }))
        ));
    }
    let small = Kernel { initrd: vec![0; 4 << 20], ..given };
    assert!(matches!(
        add_items(&mut items, &mut files, 4 * MIB, Some(&small)),
        Err(Error::Boot(BootError::InitrdNoRoom { .. }))
    ));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(1000))]

    /// Whatever a file says, it is loaded or refused.
    #[test]
    fn damaged_kernels_do_no_harm(
        is_elf in proptest::bool::ANY,
        damage in proptest::collection::vec((0..0x1010usize, proptest::num::u8::ANY), 0..12),
        header in proptest::collection::vec((0..0x278usize, proptest::num::u8::ANY), 0..6),
        cut in 0..0x1010usize,
    ) {
        let mut image = if is_elf { elf(2 * MIB, b"code", 4096, 0x20_0000) } else { bzimage(b"code", 1 << 20) };
        for (at, byte) in damage.into_iter().chain(header) {
            if let Some(into) = image.get_mut(at) {
                *into = byte;
            }
        }
        if cut < 0x400 {
            image.truncate(cut);
        }
        let given = Kernel { initrd: vec![1; 100], ..kernel(image) };
        let loaded = load(&memory(), &given, 1, &[], None);
        proptest::prop_assert!(matches!(loaded, Ok(_) | Err(Error::Boot(_))), "{loaded:?}");
        let by_firmware = Kernel { by_firmware: true, ..given };
        let found = add_items(&mut BTreeMap::new(), &mut BTreeMap::new(), 8 * MIB, Some(&by_firmware));
        proptest::prop_assert!(matches!(found, Ok(()) | Err(Error::Boot(_))), "{found:?}");
    }
}

/// The loader writes by a view of its own; a migration that is under way must learn of it all the same.
#[test]
fn a_kernel_that_is_loaded_again_is_dirty_and_as_in_its_file() {
    for (given, pages) in [
        (kernel(elf(2 * MIB, &[7; 5000], 20_000, 0x20_0000)), 2 * MIB / 4096..2 * MIB / 4096 + 5),
        (kernel(bzimage(&[7; 0x3000], 1 << 20)), 256..259),
    ] {
        let memory = memory();
        load(&memory, &given, 1, &[], None).unwrap();
        let (start, end) = (pages.start * 4096, pages.end * 4096);
        let mut before = vec![0; (end - start) as usize];
        memory.read(start, &mut before).unwrap();
        memory.write(start, &vec![0xee; (20_000).min(end - start) as usize]).unwrap();
        memory.blocks()[0].take_vmm_writes();
        load(&memory, &given, 1, &[], None).unwrap();
        let dirty = memory.blocks()[0].take_vmm_writes();
        for page in pages {
            assert!(dirty[page as usize / 64] & 1 << (page % 64) != 0, "page {page} is clean");
        }
        let mut after = vec![0; before.len()];
        memory.read(start, &mut after).unwrap();
        assert!(before == after);
    }
}
