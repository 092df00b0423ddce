//! Each way in which a stream can be wrong: kind, offset and path of the error.

mod ends;
mod records;

use crate::pump::pump;
use crate::streams::{advise, header, name, write};
use qevm_savevm::command::CommandError;
use qevm_savevm::configuration::ConfigurationError;
use qevm_savevm::framing::SectionKind;
use qevm_savevm::ram::RamError;
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, StreamError, StreamWriter};
use qevm_wire::{Decode, Fault, Limits, WireError};

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
    assert_eq!((kind, at), (ConfigurationError::PageBits { found: 64, min: 8, max: 20 }.into(), 36));
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
    let mut device = StreamWriter::unchecked(Encoder::default(), true);
    device.section_full(&header(9, "timer", 2), &[0; 24]).unwrap();
    start.extend(device.take());
    let (kind, at, _) = refused_after(&start, b"\x02\0\0\0\x09");
    assert_eq!((kind, at), (StreamError::UnknownSection { kind: SectionKind::Part, section_id: 9 }.into(), 1));
}

#[test]
fn sections_have_a_limit() {
    let limits = Limits { sections: 7, ..Limits::default() };
    let options = || DecoderOptions { limits: limits.clone(), ..DecoderOptions::default() };
    let mut stream = write(None, &[], None);
    pump(&mut Decoder::new(options()), &stream, || 50).unwrap();
    stream.pop();
    stream.extend(b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02");
    let error = pump(&mut Decoder::new(options()), &stream, || 50).unwrap_err();
    assert_eq!(error.kind, WireError::LimitExceeded { what: "section count", found: 8, limit: 7 }.into());
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
    let mut stream = StreamWriter::unchecked(Encoder::default(), true);
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
        ErrorKind::Wire(WireError::SkipTooFar { found: 1, remaining: 0 })
    ));
}
