//! Records of the iterable handlers.

use super::{HEADER, read, refused, refused_after};
use crate::pump::pump;
use crate::streams::{ATTRIBUTES, BITMAPS, DISKS, HASH_TABLE, VFIO, name, write};
use qevm_savevm::block_migration::BlockMigrationError;
use qevm_savevm::dirty_bitmap::DirtyBitmapError;
use qevm_savevm::hash_table::HashTableError;
use qevm_savevm::ram::{BlockId, PageAt, RamBlock, RamError, RamRecord};
use qevm_savevm::storage_attributes::StorageAttributesError;
use qevm_savevm::vfio::VfioError;
use qevm_savevm::{Decoder, DecoderOptions, Encoder, ErrorKind, Event, StreamError, WriteError};
use qevm_wire::{Fault, Limits, WireError, Writer};

/// A record in a PART of `ram`, and the error that it gives.
fn ram_refused(record: &[u8]) -> (RamError, u64, String) {
    let (kind, at, path) = refused(&[&b"\x02\0\0\0\x02"[..], record].concat());
    match kind {
        ErrorKind::Ram(kind) => (kind, at - 5, path),
        other => panic!("{other:?}"),
    }
}

#[test]
fn ram_records() {
    let section = || "section 2 'ram'".to_string();
    let block = || "section 2 'ram' › block 'pc.ram'".to_string();
    // FULL is obsolete; flags exclude each other; CONTINUE only goes with pages; no flag at all.
    for flags in [0x001u16, 0x00a, 0x048, 0x108, 0x030, 0x220, 0x024, 0x000, 0x020, 0x400, 0x800] {
        let word = u64::from(flags).to_be_bytes();
        assert_eq!(ram_refused(&word), (RamError::Flags { found: flags.into() }, 0, section()), "{flags:#x}");
    }
    assert_eq!(ram_refused(&0x1010u64.to_be_bytes()), (RamError::StrayAddress { found: 0x1010 }, 0, section()));
    assert_eq!(ram_refused(&0x80u64.to_be_bytes()), (RamError::Hook, 0, section()));
    assert_eq!(ram_refused(&0x1004u64.to_be_bytes()), (RamError::UnexpectedList, 0, section()));
    assert_eq!(ram_refused(b"\0\0\0\0\0\0\x10\x28"), (RamError::ContinueWithoutBlock, 0, section()));
    let unknown = RamError::UnknownBlock { name: name("pc.rom") };
    assert_eq!(ram_refused(b"\0\0\0\0\0\0\x10\x08\x06pc.rom"), (unknown, 8, section()));
    let outside = RamError::OutsideBlock { offset: 0x4_0000, used_length: 0x4_0000 };
    assert_eq!(ram_refused(b"\0\0\0\0\0\x04\0\x08\x06pc.ram"), (outside, 0, block()));
    assert_eq!(ram_refused(b"\0\0\0\0\0\0\0\x02\x06pc.ram\x01"), (RamError::Fill { found: 1 }, 15, block()));
    let encoding = RamError::XbzrleEncoding { found: 2 };
    assert_eq!(ram_refused(b"\0\0\0\0\0\0\0\x40\x06pc.ram\x02\0\0"), (encoding, 15, block()));
    let long = RamError::XbzrleLength { found: 0x1001, max: 0x1000 };
    assert_eq!(ram_refused(b"\0\0\0\0\0\0\0\x40\x06pc.ram\x01\x10\x01"), (long, 16, block()));
    let (kind, at, path) = refused(b"\x02\0\0\0\x02\0\0\0\0\0\0\x01\0\x06pc.ram\x00\x10\x00\x01");
    let limit = WireError::LimitExceeded { what: "compressed page length", found: 0x10_0001, limit: 1 << 20 };
    assert_eq!((kind, at, path), (limit.into(), 20, block()));
    let (kind, at, _) = refused(b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x08\0");
    assert_eq!((kind, at), (WireError::Empty { what: "RAM block name" }.into(), 13));
    let error = read(&[&write(None, &[], None)[..], b""].concat()[..40]).unwrap_err();
    assert_eq!(error.fault(), Fault::Truncated);
}

/// The list of RAM blocks in a START of `ram`.
fn list_refused(list: &[u8]) -> (ErrorKind, u64, String) {
    let start = [HEADER, b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"].concat();
    refused_after(&start, list)
}

#[test]
fn ram_block_lists() {
    let path = |block: &str| format!("section 2 'ram' › block '{block}'");
    let total = b"\0\0\0\0\0\0\x30\x04";
    let a = b"\x01a\0\0\0\0\0\0\x20\0";
    let list = |entries: &[u8]| list_refused(&[&total[..], entries].concat());
    let (kind, at, found) = list(b"\x01a\0\0\0\0\0\0\x40\0");
    assert_eq!((kind, at, found), (RamError::ListSum { found: 0x4000, total: 0x3000 }.into(), 10, path("a")));
    let (kind, at, found) = list(&[&a[..], b"\x01b\0\0\0\0\0\0\x20\0"].concat());
    assert_eq!((kind, at, found), (RamError::ListSum { found: 0x4000, total: 0x3000 }.into(), 20, path("b")));
    let (kind, at, _) = list(&[&a[..], b"\x01a\0\0\0\0\0\0\x10\0"].concat());
    assert_eq!((kind, at), (RamError::DuplicateBlock { name: name("a") }.into(), 18));
    let (kind, at, found) = list(b"\x01a\0\0\0\0\0\0\x20\x01");
    assert_eq!((kind, at, found), (RamError::PartialPage { found: 0x2001, page_size: 4096 }.into(), 10, path("a")));
    let (kind, at, _) = list(b"\0\0\0\0\0\0\0\x20\0");
    assert_eq!((kind, at), (WireError::Empty { what: "RAM block name" }.into(), 8));
    let (kind, at, found) = list(b"\x01a\xff\0\0\0\0\0\0\0");
    let limit = WireError::LimitExceeded { what: "RAM block length", found: 0xff << 56, limit: 1 << 52 };
    assert_eq!((kind, at, found), (limit.into(), 10, path("a")));
    let limits = Limits { ram_blocks: 1, ..Limits::default() };
    let stream = [HEADER, b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", total, a, b"\x01b\0\0\0\0\0\0\x10\0"].concat();
    let mut decoder = Decoder::new(DecoderOptions { limits, ..DecoderOptions::default() });
    let error = pump(&mut decoder, &stream, || 50).unwrap_err();
    assert_eq!(error.kind, WireError::LimitExceeded { what: "RAM block count", found: 2, limit: 1 }.into());
}

#[test]
fn vfio_records() {
    let path = || format!("section {VFIO} '0000:00:04.0/vfio'");
    let part = [&b"\x02"[..], &VFIO.to_be_bytes()].concat();
    let flag = VfioError::Flag { found: 0xffff_ffff_ef10_0007 };
    let (kind, at, found) = refused(&[&part[..], b"\xff\xff\xff\xff\xef\x10\0\x07"].concat());
    assert_eq!((kind, at, found), (flag.into(), 5, path()));
    let (kind, at, _) = refused(&[&part[..], b"\xff\xff\xff\xff\xef\x10\0\x03\xff\xff\xff\xff\xef\x10\0\x05"].concat());
    assert_eq!((kind, at), (VfioError::NotEnded { found: 0xffff_ffff_ef10_0005 }.into(), 13));
}

#[test]
fn dirty_bitmap_chunks() {
    let part = [&b"\x02"[..], &BITMAPS.to_be_bytes()].concat();
    let chunk = |bytes: &[u8]| refused(&[&part[..], bytes].concat());
    let path = "section 3 'dirty-bitmap'";
    for found in [0x00u8, 0x02, 0x0c, 0x11, 0x30, 0x12, 0x50, 0x41] {
        let (kind, at, found_path) = chunk(&[found]);
        assert_eq!((kind, at, found_path.as_str()), (DirtyBitmapError::Flags { found }.into(), 5, path));
    }
    let (kind, _, _) = chunk(&[0x81]);
    assert_eq!(kind, DirtyBitmapError::ExtraFlags { found: 0x81 }.into());
    let (kind, at, _) = chunk(b"\x24\x01b");
    assert_eq!((kind, at), (DirtyBitmapError::NoName { what: "node" }.into(), 5));
    let (kind, _, _) = chunk(b"\x28\x01n");
    assert_eq!(kind, DirtyBitmapError::NoName { what: "bitmap" }.into());
    let (kind, at, _) = chunk(b"\x1c\x01n\x01b\0\x01\0\0\x08");
    assert_eq!((kind, at), (DirtyBitmapError::StartFlags { found: 8 }.into(), 14));
}

#[test]
fn hash_table_records() {
    let part = [&b"\x02"[..], &HASH_TABLE.to_be_bytes(), &[0; 4]].concat();
    let chunk = |bytes: &[u8]| refused(&[&part[..], bytes].concat());
    let beyond = HashTableError::Beyond { index: 0x1_fffe, end: 0x2_0001, entries: 0x2_0000 };
    let path = "section 6 'spapr/htab'".to_owned();
    assert_eq!(chunk(b"\0\x01\xff\xfe\0\x01\0\x02"), (beyond.into(), 9, path));
    // The last entries of the table are in it.
    let (kind, at, _) = chunk(b"\0\x01\xff\xfe\0\0\0\x02\0\0\0\0\0\0\0\0\x7f");
    assert_eq!((kind, at), (StreamError::NoFooter { found: 0x7f }.into(), 25));
}

#[test]
fn storage_attributes_records() {
    let part = [&b"\x02"[..], &ATTRIBUTES.to_be_bytes()].concat();
    let path = "section 7 's390-storage_attributes'";
    for found in [0u64, 3, 4, 9, 0x10, 0x1001, 0x1008, 0x1006, 0x1003] {
        let (kind, at, found_path) = refused(&[&part[..], &found.to_be_bytes()].concat());
        assert_eq!((kind, at, found_path.as_str()), (StorageAttributesError::Word { found }.into(), 5, path));
    }
}

#[test]
fn block_migration_records() {
    let part = [&b"\x02"[..], &DISKS.to_be_bytes()].concat();
    let record = |word: u64| refused(&[&part[..], &word.to_be_bytes()].concat());
    for found in [0x00u64, 0x03, 0x05, 0x06, 0x08, 0x0a, 0x11, 0x100] {
        let (kind, at, path) = record(found);
        assert_eq!((kind, at, path.as_str()), (BlockMigrationError::Flags { found }.into(), 5, "section 1 'block'"));
    }
    assert_eq!(record(0x202).0, BlockMigrationError::StrayBits { found: 0x202 }.into());
}

#[test]
fn an_encoder_refuses_what_no_decoder_reads() {
    let refused = |event: Event<'_>| {
        let mut encoder = Encoder::default();
        let mut writer = Writer::new();
        encoder.encode(&Event::Ram(RamRecord::Block(RamBlock::new(name("a"), 0x2000))), &mut writer).unwrap();
        encoder.encode(&Event::Ram(RamRecord::Block(RamBlock::new(name("b"), 0x1000))), &mut writer).unwrap();
        let first = PageAt { block: BlockId(0), offset: 0, named: true };
        encoder.encode(&Event::Ram(RamRecord::Zero(first)), &mut writer).unwrap();
        let before = writer.len();
        let error = encoder.encode(&event, &mut writer).unwrap_err();
        assert_eq!((writer.len(), error.fault()), (before, Fault::Misuse));
        let kind = match error.kind {
            ErrorKind::Write(WriteError::Refused { reason }) => *reason,
            kind => kind,
        };
        match kind {
            ErrorKind::Ram(kind) => kind,
            other => panic!("{other:?}"),
        }
    };
    let page = |block, offset, named| Event::Ram(RamRecord::Page(PageAt { block: BlockId(block), offset, named }));
    assert_eq!(refused(page(2, 0, true)), RamError::NoSuchBlock { found: 2, blocks: 2 });
    assert_eq!(refused(page(1, 0, false)), RamError::ContinueElsewhere);
    assert_eq!(refused(page(0, 0x2000, false)), RamError::OutsideBlock { offset: 0x2000, used_length: 0x2000 });
    assert_eq!(refused(page(0, 0x800, false)), RamError::Unaligned { found: 0x800, page_size: 0x1000 });
    let block = RamBlock::new(name("a"), 0x1000);
    assert_eq!(refused(Event::Ram(RamRecord::Block(block))), RamError::DuplicateBlock { name: name("a") });
    let page = PageAt { block: BlockId(0), offset: 0, named: false };
    let long = RamRecord::Xbzrle { page, data: &[0; 4097] };
    assert_eq!(refused(Event::Ram(long)), RamError::XbzrleLength { found: 4097, max: 4096 });
}
