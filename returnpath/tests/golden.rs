//! Return paths as real QEMUs wrote them. `data/README.md` tells how the files were made.

use qevm_returnpath::session::SourceSession;
use qevm_returnpath::{Decoder, Encoder, Event, Message};
use qevm_wire::{CountedString, Decode, PageGeometry, Step, Writer};
use std::fs;
use std::path::Path;

fn read(file: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file)).unwrap()
}

/// All messages of a file, which must be written again byte for byte.
fn messages(file: &str) -> Vec<Message> {
    let bytes = read(file);
    let (mut decoder, mut encoder, mut again) = (Decoder::default(), Encoder::default(), Writer::new());
    let (mut rest, mut messages) = (&bytes[..], Vec::new());
    decoder.end_of_input();
    while let Step::Event { consumed, event } = decoder.next(rest).unwrap() {
        encoder.event(&event, &mut again).unwrap();
        let (payload, after) = rest[consumed..].split_at(event.payload_len() as usize);
        again.bytes(payload);
        decoder.skip_payload(event.payload_len()).unwrap();
        rest = after;
        if let Event::Message(message) = event {
            messages.push(message);
        }
    }
    assert_eq!(decoder.next(rest), Ok(Step::End));
    assert!(again.as_bytes() == bytes, "{file} is written differently");
    messages
}

fn request(block: Option<&str>, start: u64) -> Message {
    Message::ReqPages { block: block.map(|name| CountedString::new(name).unwrap()), start, len: 4096 }
}

#[test]
fn a_destination_of_10_0_acks_the_switchover_before_anything_else() {
    let expected = [Message::SwitchoverAck, Message::Pong { value: 1 }, Message::Shut { status: 0 }];
    assert_eq!(messages("10.0-q35-switchover-ack-return-path.bin"), expected);
}

#[test]
fn a_broken_postcopy_ends_without_shut() {
    let messages = messages("11.1-microvm-postcopy-recovery-return-path.bin");
    let pongs = [1, 2, 3, 0x42, 4].map(|value| Message::Pong { value });
    assert_eq!(messages[..5], pongs);
    assert_eq!(
        messages[5..8],
        [request(Some("pc.bios"), 0xf000), request(Some("microvm.ram"), 0x50_9000), request(None, 0x50_a000)]
    );
    assert_eq!(messages.len(), 13);
}

#[test]
fn recovery_goes_through_the_session_as_two_releases_do_it() {
    for (file, blocks, count) in [
        ("5.2-microvm-postcopy-recovery-recovery-return-path.bin", 5, 93),
        ("11.1-microvm-postcopy-recovery-recovery-return-path.bin", 5, 67),
    ] {
        let messages = messages(file);
        let mut session = SourceSession::recovery();
        for message in &messages {
            if let Message::RecvBitmap { block, len } = message {
                // Every block is smaller than 32 MiB, but for the first.
                let used_length = if *len == 1024 { 32 << 20 } else { 0x1_0000 };
                session.ask_bitmap(block.clone(), used_length, PageGeometry::X86).unwrap();
            }
        }
        for (i, message) in messages.iter().enumerate() {
            match message {
                Message::ResumeAck => {
                    assert_eq!(i, blocks);
                    session.ask_resume().unwrap();
                }
                Message::Shut { .. } => session.everything_sent().unwrap(),
                _ => {}
            }
            let _ = session.message(message).unwrap_or_else(|error| panic!("{file}: {error}"));
        }
        session.ended().unwrap();
        assert_eq!(messages.len(), count, "{file}");
        assert!(matches!(&messages[blocks + 1], Message::ReqPages { block: Some(_), .. }), "named again");
    }
}
