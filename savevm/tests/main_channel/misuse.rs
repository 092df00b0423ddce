//! What a caller does wrong is never reported as the peer's fault.

use crate::streams::{RAM, header, name, write};
use qevm_savevm::ram::{BlockId, PreemptDecoder, RamBlock, RamBlocks};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, Event, Step, StreamError, StreamWriter};
use qevm_wire::{Decode, DriveError, Driver, Fault, PageGeometry, WireError};
use std::sync::Arc;

/// A stream with one page and one device.
fn stream() -> Vec<u8> {
    let mut stream = StreamWriter::default();
    stream.header(None).unwrap();
    stream.section_start(&header(RAM, "ram", 4)).unwrap();
    stream.ram_setup([RamBlock::new(name("pc.ram"), 0x1000)]).unwrap();
    stream.page_header(BlockId(0), 0).unwrap();
    stream.payload(&[1; 4096]).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.section_full(&header(9, "timer", 2), &[3; 24]).unwrap();
    stream.eof().unwrap();
    stream.take()
}

fn misuse(error: Error, kind: impl Into<ErrorKind>) {
    assert_eq!((error.fault(), error.kind), (Fault::Misuse, kind.into()));
}

#[test]
fn payload_is_not_skipped_beyond_its_end() {
    let stream = stream();
    let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions::default()));
    misuse(driver.decoder_mut().skip_payload(1).unwrap_err(), WireError::SkipTooFar { found: 1, remaining: 0 });
    while driver.decoder().payload_remaining() == 0 {
        driver.next().unwrap();
    }
    let error = driver.decoder_mut().skip_payload(4097).unwrap_err();
    misuse(error, WireError::SkipTooFar { found: 4097, remaining: 4096 });
    // It has done nothing; payload that was not read is given again and again, and is passed over by a driver.
    let mut decoder = driver.decoder().clone();
    for _ in 0..2 {
        decoder.next(&[]).unwrap();
        assert_eq!(decoder.payload_remaining(), 4096);
    }
    while driver.next().unwrap().is_some() {}
}

/// More than the payload has, and more than its package.
#[test]
fn payload_in_a_package_is_not_skipped_beyond_its_end() {
    let mut package = StreamWriter::unchecked(Encoder::default(), true);
    package.section_part(RAM).unwrap();
    let start = package.bytes().len();
    let content = [package.bytes(), b"\0\0\0\0\0\0\0\x08\x06pc.ram", &[0; 4096]].concat();
    let mut stream = write(None, &[], None);
    stream.pop();
    let mut rest = StreamWriter::unchecked(Encoder::default(), true);
    rest.package(&content).unwrap();
    stream.extend(rest.take());
    let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions::default()));
    while driver.decoder().payload_remaining() == 0 {
        driver.next().unwrap();
    }
    let mut nested = driver.decoder().nested().unwrap();
    nested.next(&content).unwrap();
    let Step::Event { consumed, .. } = nested.next(&content[start..]).unwrap() else { panic!("no page") };
    assert_eq!(start + consumed + 4096, content.len());
    misuse(nested.skip_payload(4097).unwrap_err(), WireError::SkipTooFar { found: 4097, remaining: 4096 });
}

#[test]
fn content_of_a_device_is_told_of_where_it_is_and_taken() {
    let stream = stream();
    let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions::default()));
    misuse(driver.decoder_mut().body(24).unwrap_err(), StreamError::NoBody);
    misuse(driver.decoder().body_ends().next(&[]).unwrap_err(), StreamError::NoBody);
    while !driver.decoder().expects_body() {
        driver.next().unwrap();
    }
    driver.decoder_mut().body(24).unwrap();
    misuse(driver.decoder_mut().body(24).unwrap_err(), StreamError::NoBody);
    // Without taking it, a footer would be missing.
    let error = driver.next().unwrap_err();
    assert!(matches!(error, DriveError::OutOfStep { .. }) && error.fault() == Some(Fault::Misuse), "{error}");
    driver.consume(24);
    assert!(matches!(driver.next().unwrap(), Some(Event::SectionFooter { .. })));
}

#[test]
fn pages_of_the_preempt_channel_likewise() {
    let mut blocks = RamBlocks::default();
    blocks.push(RamBlock::new(name("pc.ram"), 0x1000)).unwrap();
    let mut decoder = PreemptDecoder::new(Arc::new(blocks), PageGeometry::X86);
    misuse(decoder.skip_payload(1).unwrap_err(), WireError::SkipTooFar { found: 1, remaining: 0 });
    decoder.next(b"\0\0\0\0\0\0\0\x08\x06pc.ram").unwrap();
    misuse(decoder.skip_payload(4097).unwrap_err(), WireError::SkipTooFar { found: 4097, remaining: 4096 });
}

/// An error stays what it was, and whose it was.
#[test]
fn after_an_error_the_same_error_comes_again() {
    let stream = stream();
    let mut decoder = Decoder::new(DecoderOptions::default());
    let first = decoder.next(b"QEVX....").unwrap_err();
    assert_eq!((first.fault(), Err(first)), (Fault::Malformed, decoder.next(b"QEVX....")));
    let mut driver = Driver::new(&stream[..stream.len() - 3], Decoder::new(DecoderOptions::default()));
    let first = loop {
        if let Err(error) = driver.next() {
            break error;
        }
    };
    assert_eq!(first.to_string(), driver.next().unwrap_err().to_string());
}
