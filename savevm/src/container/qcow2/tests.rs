use super::*;
use crate::ErrorKind;
use proptest::prelude::*;
use qevm_wire::{Fault, Writer};

const CLUSTER: u64 = 512;
/// What one L2 table of 512-byte clusters maps.
const PER_L2: u64 = 512 * 64;

fn header(version: u32, cluster_bits: u32, features: u64) -> Vec<u8> {
    let mut w = Writer::new();
    w.bytes(QCOW2).be32(version).zeroes(12).be32(cluster_bits).be64(PER_L2 + 1).be32(0);
    w.zeroes(24).be32(1).be64(0x4000).be64(features).zeroes(24);
    w.into_bytes()
}

fn snapshot(vm_state_size: u64, l1_entries: u32) -> Vec<u8> {
    let mut w = Writer::new();
    w.be64(0x8000).be32(l1_entries).be16(1).be16(5).be32(1_700_000_000).be32(7).be64(42).be32(0).be32(24);
    w.be64(vm_state_size).be64(PER_L2 + 1).be64(u64::MAX);
    w.bytes(b"1hello");
    w.into_bytes()
}

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> (u64, ContainerError) {
    let error = result.unwrap_err();
    match error.kind {
        ErrorKind::Container(kind) => (error.offset, kind),
        other => panic!("{other:?}"),
    }
}

#[test]
fn header_and_table_are_read() {
    let parsed = Header::parse(&header(3, 9, KNOWN_FEATURES & !FEATURE_EXTENDED_L2)).unwrap();
    let (cluster_bits, extended_l2) = (9, false);
    assert_eq!(
        parsed,
        Header { cluster_bits, extended_l2, disk_size: PER_L2 + 1, snapshots: 1, snapshots_offset: 0x4000 }
    );
    let bytes = snapshot(1000, 4);
    let mut reader = Reader::at(&bytes, 0x4000);
    let entry = Snapshot::parse(&mut reader).unwrap();
    assert!(reader.is_empty());
    assert_eq!((&entry.id[..], &entry.name[..]), (&b"1"[..], &b"hello"[..]));
    assert_eq!((entry.vm_state_size, entry.disk_size, entry.l1_len), (1000, Some(PER_L2 + 1), 32));
    for end in 0..bytes.len() {
        let error = Snapshot::parse(&mut Reader::at(&bytes[..end], 0)).unwrap_err();
        assert_eq!(error.fault(), Fault::Truncated, "{end}");
    }
}

#[test]
fn state_is_found_behind_the_rounded_end_of_the_disk() {
    let image = Header::parse(&header(2, 9, 0)).unwrap();
    let entry = Snapshot::parse(&mut Reader::new(&snapshot(CLUSTER + 10, 3))).unwrap();
    let l1 = Writer::new().be64(0).be64(0).be64(1 << 63 | 0x1000).as_bytes().to_vec();
    let state = VmState::new(&image, &entry, &l1).unwrap();
    assert_eq!((state.len(), state.contiguous(0), state.contiguous(500), state.contiguous(512)), (522, 512, 12, 10));
    assert_eq!(state.l2_table(0).unwrap(), Some(0x1000));
    let l2 =
        Writer::new().be64(1 << 63 | 0x2000).be64(L2_ZERO).be64(L2_COMPRESSED).be64(0x2200 | 0x100).as_bytes().to_vec();
    assert_eq!(state.cluster(3, &l2, 0x1000).unwrap(), Cluster::At(0x2000));
    assert_eq!(state.cluster(CLUSTER, &l2, 0x1000).unwrap(), Cluster::Zero);
    let compressed = kind(state.cluster(2 * CLUSTER, &l2, 0x1000));
    assert!(matches!(compressed, (0x1010, ContainerError::Feature { .. })));
    assert_eq!(state.cluster(4 * CLUSTER, &l2, 0x1000).unwrap_err().fault(), Fault::Truncated);
}

#[test]
fn what_is_not_supported_is_named() {
    assert!(matches!(kind(Header::parse(b"QFI\0....")), (0, ContainerError::Magic { .. })));
    assert!(matches!(kind(Header::parse(&header(4, 16, 0))), (4, ContainerError::Version { found: 4, .. })));
    assert!(matches!(kind(Header::parse(&header(3, 22, 0))), (20, ContainerError::Field { found: 22, .. })));
    for features in [FEATURE_CORRUPT, FEATURE_EXTERNAL_DATA, 1 << 40] {
        assert!(matches!(kind(Header::parse(&header(3, 16, features))), (72, ContainerError::Feature { .. })));
    }
    let mut encrypted = header(3, 16, 0);
    encrypted[35] = 1;
    assert!(matches!(kind(Header::parse(&encrypted)), (32, ContainerError::Feature { .. })));

    let image = Header::parse(&header(3, 9, 0)).unwrap();
    let no_state = Snapshot::parse(&mut Reader::new(&snapshot(0, 3))).unwrap();
    assert!(matches!(kind(VmState::new(&image, &no_state, &[0; 24])), (0x8000, ContainerError::Feature { .. })));
    let long = Snapshot::parse(&mut Reader::new(&snapshot(u64::MAX, 3))).unwrap();
    assert!(matches!(kind(VmState::new(&image, &long, &[0; 24])), (0x8000, ContainerError::Field { found: 3, .. })));
    let many = Header { snapshots: MAX_SNAPSHOTS + 1, ..image };
    assert_eq!(many.check_snapshots(&Limits::default()).unwrap_err().fault(), Fault::Limit);
}

/// QEMU pads between the entries of the table and not after the last one: names of every length.
#[test]
fn a_table_ends_with_its_last_entry() {
    for len in 0..40 {
        let mut w = Writer::new();
        for id in [b'1', b'2', b'3'] {
            w.zeroes(w.as_bytes().len().next_multiple_of(8) - w.as_bytes().len());
            w.be64(0x8000).be32(3).be16(1).be16(len).be32(0).be32(0).be64(0).be32(9).be32(0).bytes(&[id]);
            w.bytes(&vec![b'n'; len.into()]);
        }
        let bytes = w.into_bytes();
        let mut reader = Reader::at(&bytes, 0x1_0000);
        for id in [b"1", b"2", b"3"] {
            let entry = Snapshot::parse(&mut reader).unwrap();
            assert_eq!((&entry.id[..], entry.name.len()), (&id[..], usize::from(len)), "{len}");
        }
        assert!(reader.is_empty(), "{len}");
    }
}

/// The layout is that of the public format description: 16-byte entries, whose second word has a bit for each 32nd of a
/// cluster.
#[test]
fn extended_entries_tell_of_parts_of_clusters() {
    const CLUSTER: u64 = 1 << 14;
    let per_l2 = CLUSTER * (CLUSTER / 16);
    assert!(matches!(kind(Header::parse(&header(3, 13, FEATURE_EXTENDED_L2))), (20, ContainerError::Field { .. })));
    let image = Header::parse(&header(3, 14, FEATURE_EXTENDED_L2)).unwrap();
    assert!(image.extended_l2);
    let mut entry = Snapshot::parse(&mut Reader::new(&snapshot(CLUSTER + 10, 2))).unwrap();
    entry.disk_size = Some(per_l2);
    let l1 = Writer::new().be64(0).be64(1 << 63 | 0x4000).as_bytes().to_vec();
    let state = VmState::new(&image, &entry, &l1).unwrap();
    assert_eq!(state.l2_table(0).unwrap(), Some(0x4000));
    let part = CLUSTER / 32;
    assert_eq!((state.contiguous(0), state.contiguous(part + 1), state.contiguous(CLUSTER)), (part, part - 1, 10));
    let l2 = Writer::new().be64(1 << 63 | 0x8000).be64(1 << 33 | 0b101).be64(0).be64(1 << 32).as_bytes().to_vec();
    let at = |position| state.cluster(position, &l2, 0x4000).unwrap();
    assert_eq!((at(0), at(part), at(2 * part + 5)), (Cluster::At(0x8000), Cluster::Zero, Cluster::At(0x8000)));
    assert_eq!(at(CLUSTER), Cluster::Zero);
}

#[test]
fn a_misaligned_table_is_refused_where_its_entry_is() {
    let image = Header::parse(&header(3, 16, 0)).unwrap();
    let mut entry = Snapshot::parse(&mut Reader::new(&snapshot(100, 3))).unwrap();
    entry.disk_size = Some(0);
    let state = VmState::new(&image, &entry, &(0x1000u64).to_be_bytes()).unwrap();
    assert!(matches!(kind(state.l2_table(0)), (0x8000, ContainerError::Field { found: 0x1000, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_image_can_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), position: u64) {
        let _ = Header::parse(&bytes);
        let _ = Snapshot::parse(&mut Reader::new(&bytes));
        let image = Header::parse(&header(3, 9, 0)).unwrap();
        let entry = Snapshot::parse(&mut Reader::new(&snapshot(CLUSTER * 3, 3))).unwrap();
        if let Ok(state) = VmState::new(&image, &entry, &bytes) {
            prop_assert!(state.contiguous(position % state.len()) > 0);
            let _ = state.l2_table(position);
            let _ = state.cluster(position, &bytes, 0);
        }
    }
}
