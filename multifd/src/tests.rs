//! Channels as a whole: every error by its kind and place.

mod random;

use crate::*;
use proptest::prelude::*;
use qevm_wire::{Blame, CountedString, Decode, Fault, Limits, PageGeometry, Step, WireError, Writer};

const PAGE: u64 = 4096;
const INIT: usize = 64;
const PACKET: usize = 1344;

fn block() -> CountedString {
    CountedString::new("pc.ram").unwrap()
}

/// A channel with its first packet and then whatever `write` adds.
fn channel(options: &EncoderOptions, write: impl FnOnce(&mut ChannelEncoder, &mut Writer)) -> Vec<u8> {
    let (mut encoder, mut writer) = (ChannelEncoder::new(options.clone()), Writer::new());
    encoder.init(&Init::new(Uuid([7; 16]), 3), &mut writer).unwrap();
    write(&mut encoder, &mut writer);
    writer.into_bytes()
}

/// One packet with pages 1, 2 and 4, and zero page 9.
fn one_packet() -> Vec<u8> {
    channel(&EncoderOptions::default(), |encoder, writer| {
        let pages = Pages { block: &block(), normal: &[PAGE, 2 * PAGE, 4 * PAGE], zero: &[9 * PAGE], packet_num: 5 };
        encoder.pages(&pages, 3 * PAGE, writer).unwrap();
        writer.bytes(&[0xab; 3 * PAGE as usize]);
    })
}

/// Reads all of `bytes`, shown in pieces of `piece` bytes, and writes it again.
fn again(options: &ChannelOptions, bytes: &[u8], piece: usize) -> Result<Vec<u8>, Error> {
    let mut decoder = ChannelDecoder::new(options.clone());
    let (mut encoder, mut writer) = (ChannelEncoder::new(EncoderOptions::default()), Writer::new());
    let (mut position, mut shown) = (0, 0);
    loop {
        if shown == bytes.len() {
            decoder.ended(Ending::Closed);
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
            Step::End => return Ok(writer.into_bytes()),
        }
        assert_eq!(decoder.offset(), position as u64);
    }
}

fn error_of(options: &ChannelOptions, bytes: &[u8]) -> Error {
    again(options, bytes, usize::MAX / 2).unwrap_err()
}

/// `bytes` with a big-endian word replaced.
fn with_word(bytes: &[u8], at: usize, word: u32) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
    bytes
}

#[test]
fn a_packet_gives_its_pages_as_runs() {
    let bytes = one_packet();
    let packet = RamPacket::decode(&bytes[INIT..], PageGeometry::X86, &Limits::default()).unwrap();
    assert_eq!(packet.block().unwrap(), "pc.ram");
    assert_eq!(
        packet.normal_runs().collect::<Vec<_>>(),
        [Run { offset: PAGE, len: 2 * PAGE }, Run { offset: 4 * PAGE, len: PAGE }]
    );
    assert_eq!(packet.zero_runs().collect::<Vec<_>>(), [Run { offset: 9 * PAGE, len: PAGE }]);
    assert_eq!((packet.packet_num(), packet.payload_len(), packet.is_sync()), (5, 3 * PAGE, false));
}

/// Every field of the first packet and of a packet with pages that can be wrong: where, what, and whose fault.
#[test]
fn wrong_fields_are_named_with_their_place() {
    type Case = (usize, u32, u64, fn(&ErrorKind) -> bool, Fault);
    const HANDSHAKE: [Case; 2] = [
        (
            0,
            0x5145_564d,
            0,
            |k| matches!(k, ErrorKind::Handshake(HandshakeError::Magic { found: 0x5145_564d })),
            Fault::Malformed,
        ),
        (4, 2, 4, |k| matches!(k, ErrorKind::Handshake(HandshakeError::Version { found: 2 })), Fault::Unsupported),
    ];
    const PACKETS: [Case; 12] = [
        (0, 9, 0, |k| matches!(k, ErrorKind::Packet(PacketError::Magic { found: 9 })), Fault::Malformed),
        (4, 2, 4, |k| matches!(k, ErrorKind::Packet(PacketError::Version { found: 2 })), Fault::Unsupported),
        (8, 0x80, 8, |k| matches!(k, ErrorKind::Packet(PacketError::Flags { found: 0x80, .. })), Fault::Unsupported),
        (8, 0x06, 8, |k| matches!(k, ErrorKind::Packet(PacketError::Flags { found: 0x06, .. })), Fault::Unsupported),
        (8, 0x41, 8, |k| matches!(k, ErrorKind::Packet(PacketError::Flags { found: 0x41, .. })), Fault::Unsupported),
        (
            12,
            129,
            12,
            |k| matches!(k, ErrorKind::Packet(PacketError::PageCount { what: "pages_alloc", found: 129, max: 128 })),
            Fault::Malformed,
        ),
        (
            12,
            2,
            16,
            |k| matches!(k, ErrorKind::Packet(PacketError::PageCount { what: "normal_pages", found: 3, max: 2 })),
            Fault::Malformed,
        ),
        (
            32,
            126,
            32,
            |k| matches!(k, ErrorKind::Packet(PacketError::PageCount { what: "zero_pages", found: 126, max: 125 })),
            Fault::Malformed,
        ),
        (
            20,
            4096,
            20,
            |k| matches!(k, ErrorKind::Packet(PacketError::PayloadLength { found: 4096, expected: 12288, pages: 3 })),
            Fault::Malformed,
        ),
        (64, 0, 64, |k| matches!(k, ErrorKind::Wire(WireError::Empty { what: "RAM block name" })), Fault::Malformed),
        (
            324,
            0x1001,
            320,
            |k| matches!(k, ErrorKind::Packet(PacketError::Unaligned { index: 0, found: 0x1001, page_size: 4096 })),
            Fault::Malformed,
        ),
        (
            16,
            0,
            20,
            |k| matches!(k, ErrorKind::Packet(PacketError::PayloadLength { found: 12288, expected: 0, pages: 0 })),
            Fault::Malformed,
        ),
    ];
    let good = one_packet();
    let options = ChannelOptions::default();
    assert_eq!(again(&options, &good, 100).unwrap(), good);
    for (base, cases) in [(0, &HANDSHAKE[..]), (INIT, &PACKETS[..])] {
        for (at, word, offset, expected, fault) in cases {
            let error = error_of(&options, &with_word(&good, base + at, *word));
            assert!(expected(&error.kind), "word {at}: {error}");
            assert_eq!((error.offset, error.fault()), (base as u64 + offset, *fault), "{error}");
            let path = if base == 0 { "multifd channel › init packet" } else { "multifd channel 3 › packet 0" };
            assert_eq!(error.path.to_string(), path);
        }
    }
}

#[test]
fn a_name_can_fill_its_field_and_its_last_byte_means_nothing() {
    let mut bytes = one_packet();
    bytes[INIT + 64..INIT + 320].fill(b'x');
    let packet = RamPacket::decode(&bytes[INIT..], PageGeometry::X86, &Limits::default()).unwrap();
    assert_eq!(packet.block().unwrap().as_bytes().len(), 255);
    assert_eq!(again(&ChannelOptions::default(), &bytes, 100).unwrap(), bytes);
}

#[test]
fn a_first_packet_of_someone_else_is_named() {
    let good = one_packet();
    let options = ChannelOptions { channels: Some(3), ..ChannelOptions::default() };
    let error = error_of(&options, &good);
    assert_eq!(error.kind, HandshakeError::ChannelNumber { found: 3, channels: 3 }.into());
    assert_eq!(
        (error.offset, error.fault(), error.path.to_string().as_str()),
        (24, Fault::Mismatch, "multifd channel 3")
    );
    let expected = Uuid([8; 16]);
    let options = ChannelOptions { uuid: Some(expected), ..ChannelOptions::default() };
    let error = error_of(&options, &good);
    assert_eq!(error.kind, HandshakeError::Uuid { found: Uuid([7; 16]), expected }.into());
    assert_eq!((error.offset, error.fault()), (8, Fault::Mismatch));
    let options = ChannelOptions { channels: Some(4), uuid: Some(Uuid([7; 16])), ..ChannelOptions::default() };
    assert!(again(&options, &good, 7).is_ok());
}

#[test]
fn the_set_of_channels_is_complete_when_each_came_once() {
    let uuid = Uuid([7; 16]);
    let mut set = ChannelSet::new(2, Some(uuid));
    set.arrived(&Init::new(uuid, 1)).unwrap();
    let error = set.arrived(&Init::new(uuid, 1)).unwrap_err();
    assert_eq!(error.kind, HandshakeError::DuplicateChannel { channel: 1 }.into());
    let error = set.arrived(&Init::new(uuid, 2)).unwrap_err();
    assert_eq!(error.kind, HandshakeError::ChannelNumber { found: 2, channels: 2 }.into());
    assert!(matches!(
        set.arrived(&Init::new(Uuid([0; 16]), 0)).unwrap_err().kind,
        ErrorKind::Handshake(HandshakeError::Uuid { .. })
    ));
    assert!(!set.is_complete());
    set.arrived(&Init::new(uuid, 0)).unwrap();
    assert!(set.is_complete());
    let mut all = ChannelSet::new(255, None);
    (0..255).for_each(|channel| all.arrived(&Init::new(uuid, channel)).unwrap());
    assert!(all.is_complete());
    let beyond = all.arrived(&Init::new(uuid, 255)).unwrap_err().kind;
    assert_eq!(beyond, HandshakeError::ChannelNumber { found: 255, channels: 255 }.into());
}

#[test]
fn packets_of_another_method_name_both() {
    let zstd = EncoderOptions { compression: Compression::Zstd, ..EncoderOptions::default() };
    let bytes = channel(&zstd, |encoder, writer| {
        let pages = Pages { block: &block(), normal: &[PAGE], zero: &[], packet_num: 0 };
        encoder.sync(0, writer).unwrap();
        encoder.pages(&pages, 10, writer).unwrap();
        writer.bytes(&[0; 10]);
    });
    let expected = Compression::Zlib;
    let options = ChannelOptions { compression: Some(expected), ..ChannelOptions::default() };
    let error = error_of(&options, &bytes);
    assert_eq!(error.kind, PacketError::Method { found: Compression::Zstd, expected }.into());
    assert_eq!((error.offset, error.fault()), ((INIT + PACKET + 8) as u64, Fault::Mismatch));
    // Where nothing is configured the first packet with pages decides, and SYNC packets never do.
    let two = [&bytes[..], &one_packet()[INIT..]].concat();
    let error = error_of(&ChannelOptions::default(), &two);
    assert_eq!(error.kind, PacketError::Method { found: Compression::None, expected: Compression::Zstd }.into());
    assert_eq!(again(&ChannelOptions::default(), &bytes, 1).unwrap(), bytes);
}

#[test]
fn compressed_payloads_are_bounded_and_not_empty() {
    let zlib = EncoderOptions { compression: Compression::Zlib, ..EncoderOptions::default() };
    let bytes = |len| {
        channel(&zlib, |encoder, writer| {
            let pages = Pages { block: &block(), normal: &[PAGE], zero: &[], packet_num: 0 };
            encoder.pages(&pages, len, writer).unwrap();
        })
    };
    let error = error_of(&ChannelOptions::default(), &bytes((1 << 20) + 1));
    let (found, limit) = ((1 << 20) + 1, 1 << 20);
    assert_eq!(error.kind, WireError::LimitExceeded { what: "next_packet_size", found, limit }.into());
    let error = error_of(&ChannelOptions::default(), &with_word(&bytes(9), INIT + 20, 0));
    assert_eq!((error.kind, error.offset), (PacketError::EmptyPayload.into(), INIT as u64 + 20));
}

#[test]
fn pages_are_checked_against_their_block() {
    let bytes = one_packet();
    let mut decoder = ChannelDecoder::new(ChannelOptions::default());
    decoder.next(&bytes).unwrap();
    let Step::Event { event: Event::Ram(packet), .. } = decoder.next(&bytes[INIT..]).unwrap() else { panic!() };
    assert_eq!(decoder.check_block(&packet, Some(10 * PAGE)), Ok(()));
    let error = decoder.check_block(&packet, Some(9 * PAGE)).unwrap_err();
    assert_eq!(error.kind, PacketError::Outside { index: 3, found: 9 * PAGE, used_length: 9 * PAGE }.into());
    assert_eq!(error.offset, (INIT + 320 + 24) as u64);
    assert_eq!(error.path.to_string(), "multifd channel 3 › packet 0 › RAM block 'pc.ram'");
    let error = decoder.check_block(&packet, None).unwrap_err();
    assert_eq!((error.kind, error.offset), (PacketError::UnknownBlock { name: block() }.into(), INIT as u64 + 64));
    let error = decoder.check_block(&packet, Some(0)).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Packet(PacketError::Outside { index: 0, used_length: 0, .. })), "{error}");
}

#[test]
fn the_end_is_clean_between_packets_only() {
    let bytes = one_packet();
    for end in 0..bytes.len() {
        match again(&ChannelOptions::default(), &bytes[..end], usize::MAX / 2) {
            Ok(_) => assert_eq!(end, INIT),
            Err(error) => assert!(error.is_truncated(), "{end}: {error}"),
        }
    }
}

#[test]
fn a_tls_session_ends_in_a_bye_unless_told_otherwise() {
    let bytes = &one_packet()[..INIT];
    let end = |clean_tls_termination, ending, shown: usize| {
        let mut decoder = ChannelDecoder::new(ChannelOptions { clean_tls_termination, ..ChannelOptions::default() });
        decoder.next(bytes).unwrap();
        decoder.ended(ending);
        decoder.next(&[0x11, 0x22, 0x33, 0x44][..shown]).map(|step| step == Step::End)
    };
    assert_eq!(end(true, Ending::TlsBye, 0), Ok(true));
    assert_eq!(end(true, Ending::Closed, 0), Ok(true));
    assert_eq!(end(false, Ending::TlsCut, 0), Ok(true));
    let error = end(true, Ending::TlsCut, 0).unwrap_err();
    assert_eq!((error.kind, error.offset), (PacketError::NoTlsBye.into(), INIT as u64));
    // Inside a packet a cut is an error whatever the property says.
    for clean in [true, false] {
        assert!(matches!(
            end(clean, Ending::TlsCut, 4).unwrap_err().kind,
            ErrorKind::Wire(WireError::Truncated { .. })
        ));
    }
}

#[test]
fn device_state_is_checked() {
    let state = DeviceState::new(CountedString::new("0000:00:02.0/vfio").unwrap(), 2, 5);
    let bytes = channel(&EncoderOptions::default(), |encoder, writer| {
        encoder.device_state(&state, writer).unwrap();
        writer.bytes(b"state");
    });
    assert_eq!(again(&ChannelOptions::default(), &bytes, 13).unwrap(), bytes);
    assert_eq!(DeviceState::decode(&bytes[INIT..], &Limits::default()).unwrap(), state);
    let off = ChannelOptions { device_state: false, ..ChannelOptions::default() };
    assert_eq!(error_of(&off, &bytes).kind, PacketError::DeviceStateOff.into());
    let empty = error_of(&ChannelOptions::default(), &with_word(&bytes, INIT + 272, 0));
    assert_eq!((empty.kind, empty.offset), (PacketError::EmptyPayload.into(), INIT as u64 + 272));
    let limits = Limits { device_state_packet: 4, ..Limits::default() };
    let long = error_of(&ChannelOptions { limits, ..ChannelOptions::default() }, &bytes);
    assert!(matches!(long.kind, ErrorKind::Wire(WireError::LimitExceeded { found: 5, limit: 4, .. })));
    let nameless = error_of(&ChannelOptions::default(), &with_word(&bytes, INIT + 12, 0));
    assert_eq!((nameless.kind, nameless.offset), (WireError::Empty { what: "idstr" }.into(), INIT as u64 + 12));
    let mut full = bytes.clone();
    full[INIT + 12..INIT + 268].fill(b'x');
    assert!(matches!(error_of(&ChannelOptions::default(), &full).kind, ErrorKind::Wire(WireError::Unexpected { .. })));
    full[INIT + 267] = 0;
    full[INIT + 20] = 0; // a short name, with something after it
    assert_eq!(again(&ChannelOptions::default(), &full, 13).unwrap(), full);
    assert!(matches!(
        RamPacket::decode(&[&bytes[INIT..], &[0; PACKET]].concat(), PageGeometry::X86, &Limits::default())
            .unwrap_err()
            .kind,
        ErrorKind::Packet(PacketError::Flags { found: 0x40, .. })
    ));
}

#[test]
fn vfio_headers_have_one_version_and_one_flag() {
    let decode = |words: [u32; 3]| {
        VfioDeviceState::decode(&words.map(u32::to_be_bytes).concat()).map_err(|e| (e.offset, e.kind))
    };
    assert_eq!(decode([0, 7, 0]), Ok(VfioDeviceState { index: 7, config: false }));
    assert_eq!(decode([0, 8, 1]), Ok(VfioDeviceState { index: 8, config: true }));
    assert!(matches!(decode([1, 7, 0]), Err((0, ErrorKind::Wire(WireError::Unexpected { found: 1, .. })))));
    assert!(matches!(decode([0, u32::MAX, 0]), Err((4, ErrorKind::Packet(PacketError::PageCount { .. })))));
    assert!(matches!(decode([0, 7, 2]), Err((8, ErrorKind::Wire(WireError::Unexpected { found: 2, .. })))));
    assert!(VfioDeviceState::decode(&[0; 11]).unwrap_err().is_truncated());
}

#[test]
fn what_no_destination_would_read_is_not_written() {
    let mut writer = Writer::new();
    let mut encoder = ChannelEncoder::new(EncoderOptions::default());
    assert!(matches!(
        encoder.sync(0, &mut writer).unwrap_err().kind,
        ErrorKind::Handshake(HandshakeError::Order { .. })
    ));
    encoder.init(&Init::new(Uuid::default(), 0), &mut writer).unwrap();
    assert!(matches!(
        encoder.init(&Init::new(Uuid::default(), 0), &mut writer).unwrap_err().kind,
        ErrorKind::Handshake(HandshakeError::Order { .. })
    ));
    let before = writer.len();
    let many = [0; 129];
    let block = block();
    let pages = |normal, zero| Pages { block: &block, normal, zero, packet_num: 0 };
    let mut refused = |pages: Pages<'_>, len| reason(encoder.pages(&pages, len, &mut writer).unwrap_err());
    assert!(matches!(
        refused(pages(&many, &[]), 129 * PAGE),
        ErrorKind::Packet(PacketError::PageCount { found: 129, max: 128, .. })
    ));
    assert!(matches!(refused(pages(&[1], &[]), PAGE), ErrorKind::Packet(PacketError::Unaligned { found: 1, .. })));
    assert!(matches!(
        refused(pages(&[0], &[]), 1),
        ErrorKind::Packet(PacketError::PayloadLength { found: 1, expected: 4096, .. })
    ));
    assert!(matches!(
        refused(pages(&[], &[0]), 1),
        ErrorKind::Packet(PacketError::PayloadLength { found: 1, expected: 0, .. })
    ));
    assert_eq!(writer.len(), before);
    for (options, expected) in [
        (
            EncoderOptions { layout: PacketLayout::Pages, ..EncoderOptions::default() },
            PacketError::NoZeroPages { found: 1 },
        ),
        (EncoderOptions { compression: Compression::Zlib, ..EncoderOptions::default() }, PacketError::EmptyPayload),
    ] {
        channel(&options, |encoder, writer| {
            let error = encoder.pages(&pages(&[0], &[PAGE]), 0, writer).unwrap_err();
            assert_eq!(reason(error), expected.into());
            let state = DeviceState::new(block.clone(), 0, 1);
            assert_eq!(reason(encoder.device_state(&state, writer).unwrap_err()), PacketError::DeviceStateOff.into());
        });
    }
    let empty = DeviceState::new(block.clone(), 0, 0).encode(&mut Writer::new()).unwrap_err();
    assert_eq!(reason(empty), PacketError::EmptyPayload.into());
}

/// What the destination would say of what the caller alone has done.
fn reason(error: Error) -> ErrorKind {
    assert_eq!(error.fault(), Fault::Misuse, "{error}");
    match error.kind {
        ErrorKind::Refused { reason } => *reason,
        kind => kind,
    }
}

#[test]
fn more_than_the_payload_cannot_be_skipped() {
    let bytes = one_packet();
    let mut decoder = ChannelDecoder::new(ChannelOptions::default());
    decoder.next(&bytes).unwrap();
    decoder.next(&bytes[INIT..]).unwrap();
    assert_eq!(decoder.payload_remaining(), 3 * PAGE);
    let error = decoder.skip_payload(3 * PAGE + 1).unwrap_err();
    assert_eq!(error.kind, WireError::SkipTooFar { found: 3 * PAGE + 1, remaining: 3 * PAGE }.into());
    decoder.ended(Ending::Closed);
    assert!(decoder.next(&[0; 100]).unwrap_err().is_truncated());
}
