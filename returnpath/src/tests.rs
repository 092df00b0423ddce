//! The return path as a whole: every error by its kind and place, and decode∘encode on random messages in random
//! pieces.

use crate::*;
use proptest::prelude::*;
use qevm_wire::{Blame, CountedString, Decode, Fault, Limits, Step, WireError, Writer};

/// Reads all of `bytes`, shown in pieces of `piece` bytes, and writes it again.
fn again(limits: &Limits, bytes: &[u8], piece: usize) -> Result<Vec<u8>, Error> {
    let (mut decoder, mut encoder, mut writer) = (Decoder::new(limits.clone()), Encoder::default(), Writer::new());
    let (mut position, mut shown) = (0, 0);
    loop {
        if shown == bytes.len() {
            decoder.end_of_input();
        }
        match decoder.next(&bytes[position..shown])? {
            Step::Event { consumed, event } => {
                encoder.event(&event, &mut writer).unwrap();
                position += consumed;
            }
            Step::Payload { remaining, .. } => {
                let count = (bytes.len() - position).min(piece).min(remaining as usize);
                writer.bytes(&bytes[position..position + count]);
                decoder.skip_payload(count as u64).unwrap();
                position += count;
                shown = shown.max(position);
            }
            Step::NeedMore { at_least } => {
                assert!(position + at_least > shown, "asks for what it has");
                shown = (shown + piece).min(bytes.len());
            }
            Step::End if shown < bytes.len() => shown = (shown + piece).min(bytes.len()),
            Step::End => return Ok(writer.into_bytes()),
        }
        assert_eq!(decoder.offset(), position as u64);
    }
}

fn error_of(bytes: &[u8]) -> Error {
    again(&Limits::default(), bytes, 1).unwrap_err()
}

fn name(name: &str) -> CountedString {
    CountedString::new(name).unwrap()
}

#[test]
fn types_have_the_numbers_of_the_format() {
    let numbers = MessageType::ALL.map(|kind| (kind.number(), kind.name()));
    let expected = [
        (1, "SHUT"),
        (2, "PONG"),
        (3, "REQ_PAGES_ID"),
        (4, "REQ_PAGES"),
        (5, "RECV_BITMAP"),
        (6, "RESUME_ACK"),
        (7, "SWITCHOVER_ACK"),
    ];
    assert_eq!(numbers, expected);
}

#[test]
fn unknown_types_and_wrong_lengths_are_named() {
    for number in [0, 8, 0xffff] {
        let [high, low] = u16::to_be_bytes(number);
        let error = error_of(&[high, low, 0, 0]);
        assert_eq!((error.kind.clone(), error.offset), (MessageError::Type { found: number }.into(), 0));
        assert_eq!((error.fault(), error.path.to_string().as_str()), (Fault::Unsupported, "return path › message 0"));
    }
    for message in MessageType::ALL {
        let (min, max) = message.lengths();
        for found in [min.wrapping_sub(1), max + 1, 513, u16::MAX] {
            let header = [message.number().to_be_bytes(), found.to_be_bytes()].concat();
            let error = error_of(&header);
            let expected = if min == max {
                MessageError::Length { message, found, expected: min }
            } else {
                MessageError::LengthRange { message, found, min, max }
            };
            assert_eq!((error.kind, error.offset), (expected.into(), 2), "{message} {found}");
            assert_eq!(error.path.to_string(), format!("return path › message 0 › {message}"));
        }
    }
}

#[test]
fn a_name_fills_its_message() {
    let request =
        |len: u16, name_len: u8| [&[0, 3][..], &len.to_be_bytes(), &[0; 12], &[name_len], b"pc.ram__________"].concat();
    let message = MessageType::ReqPagesId;
    for (len, name_len, expected) in [(19, 5, 18), (18, 6, 19), (19, 255, 268)] {
        let error = error_of(&request(len, name_len));
        assert_eq!((error.kind, error.offset), (MessageError::Length { message, found: len, expected }.into(), 16));
    }
    let error = error_of(&request(19, 0));
    assert_eq!((error.kind, error.offset), (WireError::Empty { what: "RAM block name" }.into(), 16));
    let error = error_of(&[0, 5, 0, 3, 1, b'a', b'b', 0, 0]);
    let expected = MessageError::Length { message: MessageType::RecvBitmap, found: 3, expected: 2 };
    assert_eq!((error.kind, error.offset), (expected.into(), 4));
}

#[test]
fn bitmaps_are_bounded_and_end_in_their_mark() {
    let message = |len: u64| [&[0, 5, 0, 2, 1, b'x'][..], &len.to_be_bytes()].concat();
    let limits = Limits { received_bitmap: 16, ..Limits::default() };
    let error = again(&limits, &message(24), 1).unwrap_err();
    let what = "length of the received bitmap";
    assert_eq!((error.kind, error.offset), (WireError::LimitExceeded { what, found: 24, limit: 16 }.into(), 6));
    let good = [&message(8)[..], &[0xff; 8], &0x0123_4567_89ab_cdef_u64.to_be_bytes()].concat();
    assert_eq!(again(&limits, &good, 3).unwrap(), good);
    let mut bad = good.clone();
    bad[22] = 0x99;
    let error = error_of(&bad);
    let (what, found) = ("end of the bitmap", 0x9923_4567_89ab_cdef);
    assert_eq!(error.kind, WireError::Unexpected { what, found, expected: message::BITMAP_END }.into());
    assert_eq!(
        (error.offset, error.path.to_string().as_str()),
        (22, "return path › message 0 › bitmap of RAM block 'x'")
    );
    for end in 1..good.len() {
        let error = again(&limits, &good[..end], 5).unwrap_err();
        assert!(error.is_truncated(), "{end}: {error}");
    }
}

#[test]
fn resume_ack_has_one_value() {
    let error = error_of(&[0, 6, 0, 4, 0, 0, 0, 2]);
    assert_eq!(error.kind, WireError::Unexpected { what: "value of RESUME_ACK", found: 2, expected: 1 }.into());
    assert_eq!(error.offset, 4);
}

#[test]
fn nothing_follows_shut() {
    let shut = [0, 1, 0, 4, 0, 0, 0, 0];
    assert_eq!(again(&Limits::default(), &shut, 1).unwrap(), shut);
    let error = error_of(&[&shut[..], &[0, 2]].concat());
    assert_eq!((error.kind, error.offset), (MessageError::AfterShut { found: 0 }.into(), 8));
    let mut decoder = Decoder::default();
    decoder.next(&shut).unwrap();
    assert!(decoder.is_shut());
    assert_eq!(decoder.next(&[]), Ok(Step::End));
}

#[test]
fn an_end_between_messages_is_no_error_of_the_format() {
    assert_eq!(again(&Limits::default(), &[0, 7, 0, 0], 1).unwrap(), [0, 7, 0, 0]);
    assert!(error_of(&[0, 7, 0]).is_truncated());
}

#[test]
fn what_no_source_would_read_is_not_written() {
    let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
    let order =
        |result: Result<(), Error>| matches!(result.unwrap_err().kind, ErrorKind::Message(MessageError::Order { .. }));
    assert!(order(encoder.bitmap_end(&mut writer)));
    encoder.message(&Message::RecvBitmap { block: name("x"), len: 8 }, &mut writer).unwrap();
    assert!(order(encoder.message(&Message::ResumeAck, &mut writer)));
    encoder.bitmap_end(&mut writer).unwrap();
    encoder.message(&Message::Shut { status: 1 }, &mut writer).unwrap();
    assert!(order(encoder.message(&Message::ResumeAck, &mut writer)));
}

#[test]
fn more_than_the_bitmap_cannot_be_skipped() {
    let mut decoder = Decoder::default();
    decoder.next(&[0, 5, 0, 2, 1, b'x', 0, 0, 0, 0, 0, 0, 0, 8]).unwrap();
    assert_eq!(decoder.payload_remaining(), 8);
    assert_eq!(decoder.skip_payload(9).unwrap_err().kind, WireError::SkipTooFar { found: 9, remaining: 8 }.into());
}

fn message() -> impl Strategy<Value = Message> {
    let name = || prop::collection::vec(any::<u8>(), 1..=255).prop_map(|name| CountedString::new(name).unwrap());
    prop_oneof![
        any::<u32>().prop_map(|value| Message::Pong { value }),
        (prop::option::of(name()), any::<u64>(), any::<u32>()).prop_map(|(block, start, len)| Message::ReqPages {
            block,
            start,
            len
        }),
        (name(), 0u64..300).prop_map(|(block, len)| Message::RecvBitmap { block, len }),
        Just(Message::ResumeAck),
        Just(Message::SwitchoverAck),
    ]
}

fn write(messages: &[Message], shut: Option<u32>) -> Vec<u8> {
    let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
    for message in messages {
        encoder.message(message, &mut writer).unwrap();
        if let Message::RecvBitmap { len, .. } = message {
            writer.bytes(&vec![0x5a; *len as usize]);
            encoder.bitmap_end(&mut writer).unwrap();
        }
    }
    if let Some(status) = shut {
        encoder.message(&Message::Shut { status }, &mut writer).unwrap();
    }
    writer.into_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_written_is_read_and_written_again(
        messages in prop::collection::vec(message(), 0..6),
        shut: Option<u32>,
        piece in 1usize..100,
    ) {
        let bytes = write(&messages, shut);
        prop_assert_eq!(again(&Limits::default(), &bytes, piece).unwrap(), bytes.clone());
        let mut decoder = Decoder::default();
        let mut rest = &bytes[..];
        for expected in messages {
            let Step::Event { consumed, event } = decoder.next(rest).unwrap() else { panic!() };
            prop_assert_eq!(&event, &Event::Message(expected));
            decoder.skip_payload(event.payload_len()).unwrap();
            rest = &rest[consumed + event.payload_len() as usize..];
            if matches!(event, Event::Message(Message::RecvBitmap { .. })) {
                prop_assert_eq!(decoder.next(rest).unwrap(), Step::Event { consumed: 8, event: Event::BitmapEnd });
                rest = &rest[8..];
            }
        }
    }

    #[test]
    fn damaged_messages_are_errors_or_other_messages(
        messages in prop::collection::vec(message(), 1..4),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        piece in 1usize..100,
    ) {
        let mut bytes = write(&messages, Some(0));
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len() * 2).min(bytes.len()));
        match again(&Limits::default(), &bytes, piece) {
            Ok(copy) => prop_assert_eq!(copy, bytes),
            Err(error) => {
                prop_assert!(error.offset <= bytes.len() as u64);
                prop_assert_eq!(error.fault(), error.kind.fault());
            }
        }
    }
}
