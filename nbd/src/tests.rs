use crate::number::{MAX_READ, command, export, option, reply};
use crate::*;
use alloc::vec::Vec;
use proptest::prelude::*;
use qevm_wire::{Blame, Decode, Fault, Step, WireError, Writer};

fn bytes(encode: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut writer = Writer::new();
    encode(&mut writer);
    writer.into_bytes()
}

/// Feeds everything, one byte more at a time, and gives what was decoded, encoded again.
fn again<D: Decode>(decoder: &mut D, input: &[u8], encode: impl Fn(&D::Event<'_>, &mut Writer)) -> Vec<u8> {
    let (mut position, mut shown, mut writer) = (0, 0, Writer::new());
    loop {
        match decoder.next(&input[position..shown]).unwrap() {
            Step::Event { consumed, event } => {
                encode(&event, &mut writer);
                position += consumed;
            }
            Step::Payload { remaining, .. } => {
                let count = remaining.min((input.len() - position) as u64) as usize;
                if count == 0 {
                    break;
                }
                writer.bytes(&input[position..position + count]);
                decoder.skip_payload(count as u64).unwrap();
                position += count;
                shown = shown.max(position);
            }
            Step::NeedMore { at_least } => {
                assert!(position + at_least > shown);
                if shown == input.len() {
                    break;
                }
                shown += 1;
            }
            Step::End => break,
        }
    }
    writer.into_bytes()
}

fn wanted() -> impl Strategy<Value = Vec<[u8; 2]>> {
    prop::collection::vec(any::<[u8; 2]>(), 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn what_a_client_says_is_read_and_written_alike(
        flags: u32,
        options in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 0..40)), 0..4),
        requests in prop::collection::vec((any::<u16>(), 0..8u16, any::<u64>(), any::<u64>(), 0..50u32), 0..5),
    ) {
        let mut decoder = ClientDecoder::default();
        let handshake = bytes(|writer| {
            ClientEvent::Flags(flags).encode(writer);
            options.iter().for_each(|(option, data)| ClientEvent::Option { option: *option, data }.encode(writer));
        });
        prop_assert_eq!(again(&mut decoder, &handshake, |event, writer| event.encode(writer)), handshake);
        decoder.begin();
        let sent = bytes(|writer| {
            for &(flags, command, cookie, offset, len) in &requests {
                ClientEvent::Request(Request { flags, command, cookie, offset, len }).encode(writer);
                if command == command::WRITE {
                    writer.zeroes(len as usize);
                }
            }
        });
        prop_assert_eq!(again(&mut decoder, &sent, |event, writer| event.encode(writer)), sent);
    }

    #[test]
    fn what_a_server_says_is_read_and_written_alike(
        flags: u16,
        replies in prop::collection::vec((any::<u32>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..40)), 0..4),
        chunks in prop::collection::vec((any::<bool>(), 0..6u8, 0..100u64, 1..100u32, prop::collection::vec(any::<u8>(), 0..20)), 0..6),
        cookie: u64,
    ) {
        let mut decoder = ServerDecoder::default();
        let handshake = bytes(|writer| {
            ServerEvent::Hello(flags).encode(writer);
            for (option, reply, data) in &replies {
                ServerEvent::OptionReply { option: *option, reply: *reply, data }.encode(writer);
            }
        });
        prop_assert_eq!(again(&mut decoder, &handshake, |event, writer| event.encode(writer)), handshake);
        decoder.begin();
        decoder.expect(cookie, 0, 200);
        let sent = bytes(|writer| {
            for (done, kind, offset, len, message) in &chunks {
                let (offset, len, error) = (*offset, *len, 5);
                let content = match kind {
                    0 => Content::None,
                    1 => Content::Data { offset, len },
                    2 => Content::Hole { offset, len },
                    3 => Content::Error { error, message, offset: None },
                    4 => Content::Error { error, message, offset: Some(offset) },
                    _ => {
                        ServerEvent::Simple { error: len, cookie }.encode(writer);
                        continue;
                    }
                };
                ServerEvent::Chunk(Chunk { done: *done, cookie, content }).encode(writer);
                if *kind == 1 {
                    writer.zeroes(len as usize);
                }
            }
        });
        prop_assert_eq!(again(&mut decoder, &sent, |event, writer| event.encode(writer)), sent);
    }

    #[test]
    fn an_export_query_is_read_as_it_was_written(name in prop::collection::vec(any::<u8>(), 0..300), wanted in wanted(), cut: u16) {
        let query = ExportQuery { name: &name, wanted: &wanted };
        let data = bytes(|writer| query.encode(writer));
        prop_assert_eq!(ExportQuery::parse(&data).unwrap(), query);
        let cut = usize::from(cut) % data.len();
        prop_assert!(ExportQuery::parse(&data[..cut]).unwrap_err().is_truncated());
        let more = [&data[..], &[0]].concat();
        let trailing = WireError::TrailingBytes { what: "data of an option", left: 1 };
        prop_assert_eq!(ExportQuery::parse(&more).unwrap_err().kind, trailing.into());
    }

    #[test]
    fn nothing_makes_a_server_panic_or_answer_at_length(option in 0..12u32, data in prop::collection::vec(any::<u8>(), 0..80)) {
        let export = Export { description: "d".repeat(100), len: 1 << 30 };
        let mut answer = Writer::new();
        Negotiation::default().option(&export, option, &data, &mut answer);
        prop_assert!(answer.len() < 1000);
    }
}

fn failure<D: Decode<Kind = ErrorKind>>(decoder: &mut D, input: &[u8]) -> (Fault, u64, ErrorKind) {
    let error = match decoder.next(input) {
        Ok(_) => panic!("{input:?} was read"),
        Err(error) => error,
    };
    (error.kind.fault(), error.offset, error.kind)
}

#[test]
fn what_is_no_client_says_why() {
    let mut decoder = ClientDecoder::default();
    decoder.next(&[0; 4]).unwrap();
    let (fault, at, _) = failure(&mut decoder.clone(), b"GET / HTTP/1.1\r\n");
    assert_eq!((fault, at), (Fault::Malformed, 4));
    let long = [b"IHAVEOPT", &[0, 0, 0, 7, 0, 1, 0, 1][..]].concat();
    let (fault, at, kind) = failure(&mut decoder, &long);
    assert_eq!((fault, at), (Fault::Limit, 20));
    assert_eq!(kind, WireError::LimitExceeded { what: "length of an option", found: 65537, limit: 65536 }.into());
    decoder.begin();
    assert_eq!(failure(&mut decoder, &[0; 28]).0, Fault::Malformed);
}

#[test]
fn replies_to_what_was_not_asked_are_refused() {
    let mut decoder = ServerDecoder::default();
    decoder.next(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    decoder.begin();
    decoder.expect(7, 4096, 100);
    let chunk =
        |cookie, content| bytes(|writer| ServerEvent::Chunk(Chunk { done: true, cookie, content }).encode(writer));
    let mut refused = |input: Vec<u8>| failure(&mut decoder, &input).2;
    assert_eq!(refused(chunk(8, Content::None)), NbdError::Cookie { found: 8, expected: 7 }.into());
    let simple = bytes(|writer| ServerEvent::Simple { error: 0, cookie: 1 }.encode(writer));
    assert_eq!(refused(simple), NbdError::Cookie { found: 1, expected: 7 }.into());
    for (found, len) in [(4095, 10), (4096, 101), (4196, 1), (u64::MAX, 1)] {
        let found_end = found.saturating_add(len.into());
        let range: ErrorKind = NbdError::Range { found, found_end, start: 4096, end: 4196 }.into();
        assert_eq!(refused(chunk(7, Content::Hole { offset: found, len })), range);
        assert_eq!(refused(chunk(7, Content::Data { offset: found, len })), range);
    }
    let with = |at: usize, byte: u8| {
        let mut input = chunk(7, Content::Hole { offset: 4096, len: 1 });
        input[at] = byte;
        input
    };
    assert_eq!(refused(with(4, 2)), NbdError::ChunkFlags { found: 0x201 }.into());
    assert_eq!(refused(with(7, 5)), NbdError::ChunkType { found: 5 }.into());
    assert_eq!(refused(with(19, 13)), NbdError::ChunkLength { chunk: 2, found: 13, expected: 12 }.into());
    let none = [&chunk(7, Content::None)[..19], &[1, 0]].concat();
    assert_eq!(refused(none), NbdError::ChunkLength { chunk: 0, found: 1, expected: 0 }.into());
    assert!(matches!(refused(with(0, 0)), ErrorKind::Wire(WireError::Unexpected { .. })));
    // An oldstyle server.
    let old = [b"NBDMAGIC", &0x0000_4202_8186_1253u64.to_be_bytes()[..], &[0; 2]].concat();
    assert_eq!(failure(&mut ServerDecoder::default(), &old).1, 8);
}

#[test]
fn options_are_answered_as_the_protocol_wants_it() {
    let export = Export { description: "a guest".into(), len: 0x1234_5678 };
    let mut negotiation = Negotiation::default();
    let mut answers = |option, data: &[u8]| {
        let (mut writer, mut answers) = (Writer::new(), Vec::new());
        let outcome = negotiation.option(&export, option, data, &mut writer);
        let mut decoder = ServerDecoder::default();
        decoder.next(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        let mut rest = writer.as_bytes();
        while let Ok(Step::Event { consumed, event: ServerEvent::OptionReply { option: to, reply, data } }) =
            decoder.next(rest)
        {
            assert_eq!(to, option);
            answers.push((reply, data.to_vec()));
            rest = &rest[consumed..];
        }
        assert!(rest.is_empty() || option == option::EXPORT_NAME);
        (outcome, answers)
    };
    let flags = export::HAS_FLAGS | export::READ_ONLY | export::CAN_MULTI_CONN;
    let size = [&[0, 0][..], &0x1234_5678u64.to_be_bytes(), &flags.to_be_bytes()].concat();
    let ack = (reply::ACK, Vec::new());
    let block_size = [&[0, 3][..], [1, 4096, MAX_READ].map(u32::to_be_bytes).as_flattened()].concat();
    // Name "", BLOCK_SIZE and a number that is not defined.
    let query = [0, 0, 0, 0, 0, 2, 0, 3, 0, 99];
    let told = [(reply::INFO, size.clone()), (reply::INFO, block_size), ack.clone()];
    assert_eq!(answers(option::INFO, &query), (Outcome::Continue, told.to_vec()));
    assert_eq!(answers(option::GO, &query), (Outcome::Begin, told.to_vec()));
    let all = [0, 0, 0, 0, 0, 2, 0, 1, 0, 2];
    let (name, text) = ((reply::INFO, [0, 1].to_vec()), (reply::INFO, [&[0, 2][..], b"a guest"].concat()));
    let told = [(reply::INFO, size), name, text, ack.clone()];
    assert_eq!(answers(option::INFO, &all), (Outcome::Continue, told.to_vec()));
    let (outcome, refused) = answers(option::GO, &[0, 0, 0, 1, b'x', 0, 0]);
    assert_eq!((outcome, refused[0].0), (Outcome::Continue, reply::ERR_UNKNOWN));
    assert_eq!(answers(option::GO, &[0, 0, 0, 1]).1[0].0, reply::ERR_INVALID);
    assert_eq!(answers(option::STRUCTURED_REPLY, &[]), (Outcome::Continue, [ack.clone()].to_vec()));
    assert_eq!(answers(option::STRUCTURED_REPLY, &[1]).1[0].0, reply::ERR_INVALID);
    let listed = (reply::SERVER, [&[0; 4][..], b"a guest"].concat());
    assert_eq!(answers(option::LIST, &[]), (Outcome::Continue, [listed, ack.clone()].to_vec()));
    assert_eq!(answers(option::ABORT, &[]), (Outcome::Close, [ack].to_vec()));
    assert_eq!(answers(option::STARTTLS, &[]).1[0].0, reply::ERR_UNSUP);
    assert_eq!(answers(11, &[]).1[0].0, reply::ERR_UNSUP);
    assert_eq!(answers(option::EXPORT_NAME, b"x").0, Outcome::Close);
    assert_eq!(answers(option::EXPORT_NAME, &[]).0, Outcome::Begin);
    assert!(negotiation.structured);
    for (no_zeroes, len) in [(false, 134), (true, 10)] {
        let mut writer = Writer::new();
        Negotiation { structured: false, no_zeroes }.option(&export, option::EXPORT_NAME, &[], &mut writer);
        assert_eq!(writer.len(), len);
    }
}
