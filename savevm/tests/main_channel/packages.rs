//! Packages: streams in a stream.

use crate::pump::{pump, pump_with};
use crate::streams::{RAM, advise, header, name, write};
use qevm_savevm::command::Command;
use qevm_savevm::ram::{BlockId, RamError};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, StreamError, StreamWriter};
use qevm_wire::{Limits, WireError};

fn read(stream: &[u8]) -> Result<(), Error> {
    pump(&mut Decoder::new(DecoderOptions::default()), stream, || 100).map(drop)
}

/// A stream of set-up, this package, and the end; and the offset of the package's content.
fn packaged(package: &[u8]) -> (Vec<u8>, u64) {
    let mut stream = write(None, &[], None);
    stream.pop();
    let mut tail = StreamWriter::unchecked(Encoder::default(), true);
    tail.package(package).unwrap();
    let start = stream.len() + tail.bytes().len() - package.len();
    tail.eof().unwrap();
    stream.extend(tail.take());
    (stream, start as u64)
}

fn refused(package: &[u8]) -> (ErrorKind, u64, String) {
    let (stream, start) = packaged(package);
    let error = read(&stream).unwrap_err();
    let path = error.path.to_string();
    assert!(path.starts_with(&format!("package at {start}")), "{path}");
    (error.kind, error.offset - start, path)
}

#[test]
fn a_package_has_neither_header_nor_end() {
    let misplaced = |kind| matches!(kind, ErrorKind::Stream(StreamError::Misplaced { .. }));
    let (kind, at, _) = refused(b"\x08\0\x04\0\0\0");
    assert!(misplaced(kind) && at == 5);
    let (kind, at, _) = refused(b"\x06\0\0\0\x02{}");
    assert!(misplaced(kind) && at == 0);
    let (kind, at, _) = refused(b"QEVM\0\0\0\x03");
    assert!(matches!(kind, ErrorKind::Stream(StreamError::SectionType { found: b'Q' })) && at == 0);
}

#[test]
fn a_package_that_ends_inside_an_item_is_its_writers_fault() {
    let (kind, at, _) = refused(b"\x08\0\x02\0\x04\0\0");
    assert_eq!((kind, at), (StreamError::PackageTooShort { missing: 2 }.into(), 5));
    // A page whose bytes go on after the package.
    let mut part = StreamWriter::unchecked(Encoder::default(), true);
    part.section_part(RAM).unwrap();
    let page = [part.bytes(), b"\0\0\0\0\0\0\0\x08\x06pc.ram", &[0; 100]].concat();
    let (kind, at, path) = refused(&page);
    assert_eq!((kind, at), (StreamError::PackageTooShort { missing: 3996 }.into(), 20));
    assert!(path.ends_with("section 2 'ram' › block 'pc.ram'"), "{path}");
    // Content without footer.
    let mut device = StreamWriter::unchecked(Encoder::default(), true);
    device.section_full(&header(9, "timer", 2), &[0; 24]).unwrap();
    let whole = device.take();
    let (kind, _, path) = refused(&whole[..whole.len() - 1]);
    assert_eq!(kind, StreamError::EndNotFound { searched: 28 }.into());
    assert!(path.ends_with("section 9 'timer'"), "{path}");
    read(&packaged(&whole).0).unwrap();
}

#[test]
fn the_sections_of_a_package_stay_its_own() {
    let mut device = StreamWriter::unchecked(Encoder::default(), true);
    device.section_full(&header(9, "timer", 2), &[0; 24]).unwrap();
    let (mut stream, _) = packaged(&device.take());
    stream.pop();
    // The same id for another handler: in a package it would be refused, after it the package is forgotten.
    let mut tail = StreamWriter::unchecked(Encoder::default(), true);
    tail.section_full(&header(9, "cpu", 12), &[0; 24]).unwrap();
    tail.eof().unwrap();
    stream.extend(tail.take());
    read(&stream).unwrap();
}

#[test]
fn packages_in_packages_have_a_limit() {
    let mut package = b"\x08\0\x0b\0\0".to_vec();
    for _ in 0..5 {
        let mut outer = StreamWriter::unchecked(Encoder::default(), true);
        outer.package(&package).unwrap();
        package = outer.take();
    }
    let (stream, _) = packaged(&package);
    read(&stream).unwrap();
    let limits = Limits { depth: 5, ..Limits::default() };
    let mut decoder = Decoder::new(DecoderOptions { limits, ..DecoderOptions::default() });
    let error = pump(&mut decoder, &stream, || 100).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Wire(WireError::LimitExceeded { found: 6, limit: 5, .. })));
}

#[test]
fn a_package_above_the_limit_is_refused_before_it_is_read() {
    let limits = Limits { package: 100, ..Limits::default() };
    let mut decoder = Decoder::new(DecoderOptions { limits, ..DecoderOptions::default() });
    let error = pump(&mut decoder, &packaged(&[0; 101]).0, || 100).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Wire(WireError::LimitExceeded { found: 101, limit: 100, .. })));
}

/// After `postcopy-ram` was advised and the package sent, pages come whole or as zero.
#[test]
fn postcopy_has_fewer_records() {
    let mut stream = StreamWriter::unchecked(Encoder::default(), true);
    stream.header(None).unwrap();
    stream.command(advise()).unwrap();
    stream.section_start(&header(RAM, "ram", 4)).unwrap();
    stream.ram_setup([qevm_savevm::ram::RamBlock::new(name("pc.ram"), 0x8000)]).unwrap();
    stream.xbzrle_page(BlockId(0), 0, &[1, 1, 1]).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.package(b"\x08\0\x04\0\0\x08\0\x05\0\0").unwrap();
    stream.command(Command::Ping(4)).unwrap();
    stream.section_part(RAM).unwrap();
    stream.zero_page(BlockId(0), 0x1000).unwrap();
    let at = stream.bytes().len() as u64;
    stream.xbzrle_page(BlockId(0), 0, &[1, 1, 1]).unwrap();
    let error = read(stream.bytes()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Ram(RamError::InPostcopy { found: 0x60 }));
    assert_eq!(error.offset, at);
}

/// What the second connection of a broken postcopy refers to comes from the first.
#[test]
fn a_recovery_stream_goes_on_with_sections_and_blocks() {
    let stream = write(None, &[], None);
    let (mut first, mut encoder) = (Decoder::new(DecoderOptions::default()), Encoder::default());
    let broken = &stream[..stream.len() - 1];
    assert!(pump_with(&mut first, &mut encoder, broken, || 100).unwrap_err().is_truncated());

    let mut second = StreamWriter::unchecked(encoder.recovery(), true);
    second.command(Command::RecvBitmap(name("pc.ram"))).unwrap();
    second.command(Command::PostcopyResume).unwrap();
    second.section_part(RAM).unwrap();
    second.zero_page(BlockId(0), 0x1000).unwrap();
    second.zero_page(BlockId(0), 0x2000).unwrap();
    second.eos().unwrap();
    second.footer().unwrap();
    second.eof().unwrap();
    let second = second.take();
    let pumped = pump_with(&mut first.recovery(), &mut encoder.recovery(), &second, || 3).unwrap();
    assert_eq!(pumped.bytes, second);

    let error = pump(&mut first.recovery(), b"\x08\0\x0a\0\x04\x03rom", || 3).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Ram(RamError::UnknownBlock { name: name("rom") }));
}
