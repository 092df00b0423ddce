//! Each way in which a stream can be wrong: kind, offset and path of the error.

use crate::{
    pump::pump,
    streams::{BITMAPS, DISKS, RAM, VFIO, advise, header, name, write},
};
use qevm_savevm::{
    Decoder, DecoderOptions, Encoder, Error, ErrorKind, Event, Footers, Step, StreamError, StreamWriter,
    block_migration::BlockMigrationError,
    command::CommandError,
    configuration::ConfigurationError,
    dirty_bitmap::DirtyBitmapError,
    framing::SectionKind,
    ram::{BlockId, PageAt, RamBlock, RamError, RamRecord},
    vfio::VfioError,
};
use qevm_wire::{Fault, Limits, WireError, Writer};

fn read(stream: &[u8]) -> Result<(), Error> {
    pump(&mut Decoder::new(DecoderOptions::default()), stream, || 50).map(drop)
}

/// The error of a stream that starts with `start` and goes wrong in `rest`: kind, offset in `rest`, path.
fn refused_after(start: &[u8], rest: &[u8]) -> (ErrorKind, u64, String) {
    let error = read(&[start, rest].concat()).unwrap_err();
    (error.kind, error.offset - start.len() as u64, error.path.to_string())
}

/// The same in the middle of a stream that has opened sections and listed RAM blocks.
fn refused(rest: &[u8]) -> (ErrorKind, u64, String) {
    let mut start = write(None, &[], None);
    start.pop();
    refused_after(&start, rest)
}

const HEADER: &[u8] = b"QEVM\0\0\0\x03";
const NO_PATH: &str = "";

#[test]
fn the_header() {
    assert_eq!(
        refused_after(b"", b"QEVN\0\0\0\x03"),
        (StreamError::Magic { found: 0x5145_564e }.into(), 0, NO_PATH.into())
    );
    assert_eq!(refused_after(b"", b"QEVM\0\0\0\x02"), (StreamError::Version { found: 2 }.into(), 4, NO_PATH.into()));
    assert_eq!(read(b"QEVM\0\0\0\x02").unwrap_err().fault(), Fault::Unsupported);
    let error = read(b"QEVM\0\0").unwrap_err();
    assert_eq!((error.kind, error.offset), (WireError::Truncated { needed: 4, available: 2 }.into(), 4));
}

#[test]
fn the_configuration() {
    let path = "configuration section".to_string();
    let start = [HEADER, b"\x07\0\0\0\x04none"].concat();
    let kind = ConfigurationError::UnknownSubsection { name: name("configuration/new") };
    assert_eq!(refused_after(&start, b"\x05\x11configuration/new\0\0\0\x01"), (kind.into(), 1, path.clone()));
    let name = name("configuration/uuid");
    let kind = ConfigurationError::SubsectionVersion { name, found: 2, expected: 1 };
    assert_eq!(refused_after(&start, b"\x05\x12configuration/uuid\0\0\0\x02"), (kind.into(), 20, path.clone()));
    let (kind, at, _) = refused_after(&start, b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x40");
    assert_eq!((kind, at), (ConfigurationError::PageBits { found: 64, min: 10, max: 20 }.into(), 36));
    let (kind, at, _) = refused_after(&start, b"\x05\x1aconfiguration/capabilities\0\0\0\x01\xff\xff\xff\xff");
    let limit = WireError::LimitExceeded { what: "capability count", found: 0xffff_ffff, limit: 256 };
    assert_eq!((kind, at), (limit.into(), 32));
    let (kind, at, _) = refused_after(HEADER, b"\x07\x80\0\0\0");
    let limit = WireError::LimitExceeded { what: "machine name length", found: 0x8000_0000, limit: 4096 };
    assert_eq!((kind, at), (limit.into(), 1));
}

#[test]
fn section_types() {
    for found in [0x09, 0x7e, 0xff] {
        assert_eq!(refused(&[found]), (StreamError::SectionType { found }.into(), 0, NO_PATH.into()));
    }
    for (found, what) in [(5, "subsection"), (6, "description"), (7, "configuration section")] {
        let (kind, at, _) = refused(&[found]);
        assert!(
            matches!(kind, ErrorKind::Stream(StreamError::Misplaced { found: f, what: w, .. }) if f == found && w == what)
        );
        assert_eq!(at, 0);
    }
}

#[test]
fn section_headers() {
    let (kind, at, _) = refused(b"\x04\0\0\0\x09\0\0\0\0\0\0\0\0\x01");
    assert_eq!((kind, at), (WireError::Empty { what: "section name" }.into(), 5));
    let kind = StreamError::SectionVersion { idstr: name("ram"), found: 5, expected: 4 };
    assert_eq!(refused(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x05"), (kind.into(), 13, "section 2 'ram'".into()));
    let kind = StreamError::SectionIdReused { section_id: 2, found: name("timer"), known: name("ram") };
    assert_eq!(refused(b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02"), (kind.into(), 1, NO_PATH.into()));
    let kind = StreamError::UnknownSection { kind: SectionKind::End, section_id: 77 };
    assert_eq!(refused(b"\x03\0\0\0\x4d"), (kind.into(), 1, NO_PATH.into()));
}

/// A FULL opens nothing that a PART could continue.
#[test]
fn a_part_needs_a_start() {
    let mut start = write(None, &[], None);
    start.pop();
    let mut device = StreamWriter::default();
    device.section_full(&header(9, "timer", 2), &[0; 24]).unwrap();
    start.extend(device.take());
    let (kind, at, _) = refused_after(&start, b"\x02\0\0\0\x09");
    assert_eq!((kind, at), (StreamError::UnknownSection { kind: SectionKind::Part, section_id: 9 }.into(), 1));
}

#[test]
fn sections_have_a_limit() {
    let limits = Limits { sections: 5, ..Limits::default() };
    let options = || DecoderOptions { limits: limits.clone(), ..DecoderOptions::default() };
    let mut stream = write(None, &[], None);
    pump(&mut Decoder::new(options()), &stream, || 50).unwrap();
    stream.pop();
    stream.extend(b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02");
    let error = pump(&mut Decoder::new(options()), &stream, || 50).unwrap_err();
    assert_eq!(error.kind, WireError::LimitExceeded { what: "section count", found: 6, limit: 5 }.into());
}

#[test]
fn footers() {
    let path = || "section 2 'ram'".to_string();
    let eos = b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x10";
    let (kind, at, found_path) = refused(&[&eos[..], b"\x7f\0\0\0\x02"].concat());
    assert_eq!((kind, at, found_path), (StreamError::NoFooter { found: 0x7f }.into(), 13, path()));
    let (kind, at, found_path) = refused(&[&eos[..], b"\x7e\0\0\0\x03"].concat());
    assert_eq!((kind, at, found_path), (StreamError::FooterId { found: 3, expected: 2 }.into(), 14, path()));
}

#[test]
fn commands() {
    let (kind, at, _) = refused(b"\x08\0\x0c\0\x05");
    assert_eq!((kind, at), (CommandError::Unknown { found: 12, len: 5 }.into(), 1));
    let (kind, at, _) = refused(b"\x08\0\0\0\0");
    assert_eq!((kind, at), (CommandError::Unknown { found: 0, len: 0 }.into(), 1));
    for (id, len) in
        [(1u8, 1u8), (2, 0), (2, 8), (3, 8), (4, 1), (5, 1), (6, 19), (7, 8), (8, 1), (9, 1), (10, 1), (11, 1)]
    {
        let (kind, at, _) = refused(&[8, 0, id, 0, len]);
        assert!(matches!(kind, ErrorKind::Command(CommandError::Length { found, .. }) if found == len.into()), "{id}");
        assert_eq!(at, 3);
    }
    // The name is shorter than its command.
    let (kind, at, path) = refused(b"\x08\0\x0a\0\x09\x06pc.ramXX");
    let trailing = WireError::TrailingBytes { what: "command payload", left: 2 };
    assert_eq!((kind, at, path.as_str()), (trailing.into(), 12, "command RECV_BITMAP"));
    // The name is longer than its command.
    let (kind, at, _) = refused(b"\x08\0\x0a\0\x05\x06pc.rXX");
    assert!(matches!(kind, ErrorKind::Command(CommandError::Length { found: 5, .. })));
    assert_eq!(at, 6);
    let (kind, _, _) = refused(b"\x08\0\x0a\0\x05\x04what");
    assert_eq!(kind, RamError::UnknownBlock { name: name("what") }.into());
}

#[test]
fn postcopy_advice() {
    let mut start = HEADER.to_vec();
    let mut stream = StreamWriter::default();
    stream.command(advise()).unwrap();
    let mut other = stream.take();
    other[5 + 8 + 6] = 0x20; // the target page size
    let (kind, at, _) = refused_after(&start, &other);
    assert_eq!((kind, at), (StreamError::AdvisedPageSize { found: 0x2000, expected: 0x1000 }.into(), 1));
    start.extend(other);
    assert_eq!(read(&start).unwrap_err().fault(), Fault::Mismatch);
}

#[test]
fn discard_lists() {
    let discard = |payload: &[u8]| {
        let len = (payload.len() as u16).to_be_bytes();
        refused(&[&b"\x08\0\x06"[..], &len, payload].concat())
    };
    let range = |start: u64, len: u64| {
        let payload = [&b"\0\x06pc.ram\0"[..], &start.to_be_bytes(), &len.to_be_bytes()].concat();
        discard(&payload)
    };
    let (kind, at, path) = discard(&[&b"\x01\x06pc.ram\0"[..], &[0; 16]].concat());
    assert_eq!((kind, at, path.as_str()), (CommandError::DiscardVersion { found: 1 }.into(), 5, "command RAM_DISCARD"));
    let (kind, at, _) = discard(&[&b"\0\x06pc.ram\x01"[..], &[0; 16]].concat());
    assert_eq!((kind, at), (CommandError::NoNul { found: 1 }.into(), 13));
    let (kind, at, _) = discard(&[&b"\0\x06pc.ram\0"[..], &[0; 18]].concat());
    assert_eq!((kind, at), (WireError::TrailingBytes { what: "list of discarded ranges", left: 2 }.into(), 14));
    let (kind, _, _) = discard(&[&b"\0\x04what\0"[..], &[0; 16]].concat());
    assert_eq!(kind, RamError::UnknownBlock { name: name("what") }.into());
    let long = [&b"\0\x12aaaaaaaaaaaaaaaaaa\0"[..]].concat();
    let (kind, _, _) = discard(&long);
    assert!(matches!(kind, ErrorKind::Command(CommandError::Length { .. })), "{kind:?}");
    // pc.ram has 64 pages.
    for (start, len) in
        [(0, 0), (0x800, 0x1000), (0, 0x1800), (0x4_0000, 0x1000), (0, 0x4_1000), (u64::MAX << 12, 0x1000)]
    {
        let (kind, at, path) = range(start, len);
        assert_eq!(kind, StreamError::DiscardRange { start, len, used_length: 0x4_0000 }.into());
        assert_eq!((at, path.as_str()), (1, "block 'pc.ram'"));
    }
}

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
fn device_sections() {
    let start = b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02";
    let (kind, at, path) = refused(&[&start[..], &[0x7e; 30]].concat());
    let not_found = StreamError::EndNotFound { searched: 30 };
    assert_eq!((kind, at, path.as_str()), (not_found.into(), start.len() as u64, "section 9 'timer'"));

    let limits = Limits { device_section: 100, ..Limits::default() };
    let stream = |len| {
        let mut stream = StreamWriter::default();
        stream.header(None).unwrap();
        stream.section_full(&header(9, "timer", 2), &vec![0; len]).unwrap();
        stream.eof().unwrap();
        stream.take()
    };
    for (len, ok) in [(100, true), (101, false), (5000, false)] {
        let mut decoder = Decoder::new(DecoderOptions { limits: limits.clone(), ..DecoderOptions::default() });
        let result = pump(&mut decoder, &stream(len), || 64);
        assert_eq!(result.is_ok(), ok, "{len}: {result:?}");
        if let Err(error) = result {
            assert!(matches!(error.kind, ErrorKind::Wire(WireError::LimitExceeded { limit: 100, .. })), "{error}");
        }
    }
}

/// A footer in the middle of content only counts if an item could follow it.
#[test]
fn a_footer_by_chance_is_not_taken_for_one() {
    let footer = b"\x7e\0\0\0\x09";
    for trap in [
        &b"\x00\x01"[..],
        b"\x04\0\0\0\x0a\0",
        b"\x01\0\0\0\x0a\x02\x80a",
        b"\x02\0\0\0\x63",
        b"\x08\0\x0d\0\0",
        b"\x08\0\x02\0\0",
        b"\x09",
        b"\x06",
        b"\x04\0\0\0\x02\x03rom",
    ] {
        let body = [&[1; 10][..], footer, trap, footer, &[2; 10]].concat();
        let mut stream = StreamWriter::default();
        stream.header(None).unwrap();
        stream.section_start(&header(RAM, "ram", 4)).unwrap();
        stream.ram_setup([]).unwrap();
        stream.eos().unwrap();
        stream.footer().unwrap();
        stream.section_full(&header(9, "timer", 2), &body).unwrap();
        stream.eof().unwrap();
        stream.vmdesc("{}").unwrap();
        for piece in [1, 7, 1000] {
            let pumped = pump(&mut Decoder::new(DecoderOptions::default()), stream.bytes(), || piece).unwrap();
            assert!(pumped.events.iter().any(|(_, event)| *event == format!("{:?}", Event::Body(&body))), "{trap:?}");
        }
    }
}

/// If nothing plausible follows the only footer, then what follows is at fault, not the device section.
#[test]
fn a_broken_header_behind_a_device_section_is_named() {
    let mut start = StreamWriter::default();
    start.header(None).unwrap();
    start.section_full(&header(9, "timer", 2), &[0; 24]).unwrap();
    let (kind, at, path) = refused_after(start.bytes(), b"\x44\0\0\0\x0a\x03cpu\0\0\0\0\0\0\0\x0c");
    assert_eq!((kind, at, path.as_str()), (StreamError::SectionType { found: 0x44 }.into(), 0, NO_PATH));
}

/// Who has a description can reject the first place at which the content may end.
#[test]
fn candidates_for_the_end_come_in_order() {
    let inner = [&b"ab"[..], b"\x7e\0\0\0\x09\x08\0\x0b\0\0", b"cd"].concat();
    let mut stream = StreamWriter::default();
    stream.header(None).unwrap();
    stream.section_full(&header(9, "timer", 2), &inner).unwrap();
    stream.eof().unwrap();
    let bytes = stream.take();
    let start = bytes.len() - 1 - 5 - inner.len();

    let mut decoder = Decoder::new(DecoderOptions::default());
    let mut position = 0;
    while position < start {
        let Step::Event { consumed, .. } = decoder.next(&bytes[position..]).unwrap() else { panic!() };
        position += consumed;
    }
    assert!(decoder.expects_body());
    let content = &bytes[start..];
    assert_eq!(decoder.next_body_end(&content[..3]), Ok(qevm_savevm::BodyEnd::NeedMore { at_least: 7 }));
    decoder.end_of_input();
    assert_eq!(decoder.next_body_end(content), Ok(qevm_savevm::BodyEnd::After(2)));
    assert_eq!(decoder.next_body_end(content), Ok(qevm_savevm::BodyEnd::After(inner.len() as u64)));
    let error = decoder.next_body_end(content).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Stream(StreamError::EndNotFound { .. })));
    decoder.body(inner.len() as u64).unwrap();
    let step = decoder.next(&bytes[start + inner.len()..]).unwrap();
    assert_eq!(step, Step::Event { consumed: 5, event: Event::SectionFooter { section_id: 9, present: true } });
    assert!(matches!(decoder.body(0).unwrap_err().kind, ErrorKind::Stream(StreamError::NoBody)));
}

#[test]
fn streams_without_footers() {
    let mut stream = StreamWriter::new(Encoder::default(), false);
    stream.header(None).unwrap();
    stream.section_start(&header(RAM, "ram", 4)).unwrap();
    stream.ram_setup([RamBlock::new(name("pc.ram"), 0x1000)]).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.section_end(RAM).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    let device = stream.bytes().len();
    stream.section_full(&header(9, "timer", 2), &[3; 24]).unwrap();
    stream.eof().unwrap();
    let bytes = stream.take();

    // Detected at the end of the first section; without them the length must come from elsewhere.
    let mut decoder = Decoder::new(DecoderOptions::default());
    let error = pump(&mut decoder, &bytes, || 1).unwrap_err();
    assert_eq!(error.kind, StreamError::LengthUnknown.into());
    assert_eq!(error.offset, device as u64 + 19);
    assert_eq!(decoder.footers(), Footers::Absent);
    decoder.body(24).unwrap();
    let pumped = pump(&mut decoder, &bytes[device + 19 + 24..], || 1).unwrap();
    assert_eq!(pumped.events.len(), 2);

    // Told so, it need not be detected.
    let options = DecoderOptions { footers: Footers::Present, ..DecoderOptions::default() };
    let error = pump(&mut Decoder::new(options), &bytes, || 1).unwrap_err();
    assert_eq!(error.kind, StreamError::NoFooter { found: 3 }.into());
}

#[test]
fn behind_the_end() {
    let mut stream = write(None, &[], Some("{}"));
    let end = stream.len() as u64;
    stream.push(0);
    let error = read(&stream).unwrap_err();
    assert_eq!((error.kind, error.offset), (StreamError::TrailingBytes { found: 0 }.into(), end));
    let options = || DecoderOptions { allow_trailing: true, ..DecoderOptions::default() };
    let mut decoder = Decoder::new(options());
    pump(&mut decoder, &stream, || 50).unwrap();
    assert_eq!(decoder.offset(), end);

    // A description that is cut off, and one that is too long.
    let stream = write(None, &[], Some("{\"page_size\": 4096}"));
    let error = read(&stream[..stream.len() - 1]).unwrap_err();
    assert_eq!(error.kind, WireError::Truncated { needed: 19, available: 18 }.into());
    let limits = Limits { vmdesc: 18, ..Limits::default() };
    let error = pump(&mut Decoder::new(DecoderOptions { limits, ..options() }), &stream, || 50).unwrap_err();
    assert_eq!(error.kind, WireError::LimitExceeded { what: "description length", found: 19, limit: 18 }.into());
}

/// A reader of a live connection must know when it need not wait.
#[test]
fn the_end_without_description() {
    let stream = write(None, &[], None);
    let mut decoder = Decoder::new(DecoderOptions::default());
    let mut position = 0;
    while !decoder.is_complete() {
        match decoder.next(&stream[position..]).unwrap() {
            Step::Event { consumed, .. } => position += consumed,
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(position, stream.len());
    assert_eq!(decoder.next(&[]).unwrap(), Step::NeedMore { at_least: 1 });
    decoder.end_of_input();
    assert_eq!(decoder.next(&[]).unwrap(), Step::End);
    let mut decoder = Decoder::new(DecoderOptions { vmdesc: false, ..DecoderOptions::default() });
    pump(&mut decoder, &stream, || 50).unwrap();
}

#[test]
fn an_error_stays() {
    let stream = write(None, &[], None);
    let mut decoder = Decoder::new(DecoderOptions::default());
    let bytes = [&stream[..8], &[0xee]].concat();
    decoder.next(&bytes).unwrap();
    let first = decoder.next(&bytes[8..]).unwrap_err();
    assert_eq!(decoder.next(&bytes[8..]).unwrap_err(), first);
    assert!(matches!(
        decoder.skip_payload(1).unwrap_err().kind,
        ErrorKind::Stream(StreamError::SkipTooFar { found: 1, remaining: 0 })
    ));
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
        assert_eq!(writer.len(), before);
        match error.kind {
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
