//! Where sections and streams end, and where they only seem to.

use super::{NO_PATH, read, refused, refused_after};
use crate::pump::pump;
use crate::streams::{RAM, header, name, write};
use qevm_savevm::command::{Command, PostcopyAdvise};
use qevm_savevm::ram::RamBlock;
use qevm_savevm::{Decoder, DecoderOptions, Encoder, ErrorKind, Event, Footers, Step, StreamError, StreamWriter};
use qevm_wire::{Decode, Driver, Limits, WireError};
use std::io::{self, Read};

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
    let mut ends = decoder.body_ends();
    assert_eq!(ends.next(&content[..3]), Ok(Step::NeedMore { at_least: 7 }));
    ends.end_of_input();
    assert_eq!(ends.next(content), Ok(Step::Event { consumed: 0, event: 2 }));
    assert_eq!(ends.next(content), Ok(Step::Event { consumed: 0, event: inner.len() as u64 }));
    let error = ends.next(content).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Stream(StreamError::EndNotFound { .. })));
    decoder.body(inner.len() as u64).unwrap();
    let step = decoder.next(&bytes[start + inner.len()..]).unwrap();
    assert_eq!(step, Step::Event { consumed: 5, event: Event::SectionFooter { section_id: 9, present: true } });
    assert!(matches!(decoder.body(0).unwrap_err().kind, ErrorKind::Stream(StreamError::NoBody)));
    let error = decoder.body_ends().next(&[]).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Stream(StreamError::NoBody)));
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
    // The candidates: the end of the stream follows, and nothing else here looks like an item.
    let content = &bytes[device + 19..];
    let mut ends = decoder.body_ends();
    assert_eq!(ends.next(&content[..24]), Ok(Step::NeedMore { at_least: 25 }));
    ends.end_of_input();
    assert_eq!(ends.next(content), Ok(Step::Event { consumed: 0, event: 24 }));
    let error = ends.next(content).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Stream(StreamError::EndNotFound { .. })));
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

/// A source that waits for an answer sends nothing more: a reader that went on would wait for ever.
#[test]
fn a_live_source_is_not_asked_for_more_than_it_has_to_say() {
    /// Gives byte after byte, then what is not the stream's, and nothing more.
    struct Live<'b>(&'b [u8], &'b [u8]);
    impl Read for Live<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let left = if self.0.is_empty() { &mut self.1 } else { &mut self.0 };
            let Some((first, rest)) = left.split_first() else { panic!("a source that waits is read from") };
            (into[0], *left) = (*first, rest);
            Ok(1)
        }
    }
    for vmdesc in [None, Some("{}")] {
        let stream = write(None, &[], vmdesc);
        let options = || DecoderOptions { vmdesc: vmdesc.is_some(), live: true, ..DecoderOptions::default() };
        let mut driver = Driver::new(Live(&stream, b""), Decoder::new(options()));
        while driver.next().unwrap().is_some() {}
        assert_eq!(driver.decoder().offset(), stream.len() as u64);
        // What is said afterwards is not the stream's, and may be in the buffer already.
        let mut decoder = Decoder::new(options());
        pump(&mut decoder, &[&stream[..], b"afterwards"].concat(), || 50).unwrap();
        assert_eq!(decoder.offset(), stream.len() as u64);
    }
    // At the end of postcopy none follows, whatever the machine type.
    let mut stream = write(None, &[], None);
    stream.pop();
    let mut rest = StreamWriter::unchecked(Encoder::default(), true);
    rest.package(b"").unwrap();
    rest.eof().unwrap();
    stream.extend(rest.take());
    let options = DecoderOptions { live: true, ..DecoderOptions::default() };
    let mut driver = Driver::new(Live(&stream, b""), Decoder::new(options));
    while driver.next().unwrap().is_some() {}
    assert_eq!(driver.decoder().offset(), stream.len() as u64);
    // A description that was promised is waited for, and is missing only when the source closes.
    let stream = write(None, &[], None);
    let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions { live: true, ..DecoderOptions::default() }));
    while driver.next().unwrap().is_some() {}
    assert!(driver.input().is_empty());
    // After postcopy none comes, whatever the machine type sends otherwise.
    let mut stream = StreamWriter::default();
    stream.header(None).unwrap();
    let advise = PostcopyAdvise { page_size_summary: 0x1000, target_page_size: 0x1000 };
    stream.command(Command::PostcopyAdvise(Some(advise))).unwrap();
    let mut package = stream.package_writer();
    package.command(Command::PostcopyListen).unwrap();
    package.command(Command::PostcopyRun).unwrap();
    stream.package(package.bytes()).unwrap();
    stream.eof().unwrap();
    let options = DecoderOptions { live: true, ..DecoderOptions::default() };
    let mut driver = Driver::new(Live(stream.bytes(), b""), Decoder::new(options));
    while driver.next().unwrap().is_some() {}
    assert_eq!(driver.decoder().offset(), stream.bytes().len() as u64);
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
