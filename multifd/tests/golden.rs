//! Page channels as real QEMUs wrote them: every byte is read, written again, and decompressed. `data/README.md` tells
//! how the files were made and where the expected values come from.

use flate2::read::GzDecoder;
use qevm_multifd::{
    ChannelDecoder, ChannelEncoder, ChannelOptions, Compression, CompressionError, Decompressor, EncoderOptions,
    Ending, Event,
};
use qevm_wire::{Decode, Step, Writer};
use std::fs;
use std::io::Read;
use std::path::Path;

struct Expected {
    file: &'static str,
    method: Compression,
    channel: u8,
    packets: usize,
    syncs: usize,
    normal: u64,
    zero: u64,
    bytes: usize,
    /// How many bytes of the pages an independent decompressor gave, and their CRC-32.
    pages: (usize, u32),
}

const FILES: [Expected; 6] = [
    row("5.2-q35-zlib-4-channel-4.gz", Compression::Zlib, 3, [5, 3], [4, 0], 9889, (16_384, 0xd0cc_d0f7)),
    row("7.2-q35-none-4-channel-4.gz", Compression::None, 3, [4, 3], [3, 0], 17_728, (12_288, 0xc48d_d6de)),
    row("7.2-q35-zstd-4-channel-4.gz", Compression::Zstd, 3, [5, 3], [4, 0], 9673, (16_384, 0x164a_8415)),
    row(
        "10.0-microvm-live-zlib-channel-1.gz",
        Compression::Zlib,
        0,
        [14, 1],
        [768, 896],
        34_487,
        (3_145_728, 0x7eef_96ca),
    ),
    row(
        "11.1-microvm-live-zstd-channel-1.gz",
        Compression::Zstd,
        0,
        [11, 1],
        [384, 896],
        15_670,
        (1_441_792, 0x4a09_a244),
    ),
    row("10.0-q35-live-peer-channel-1.gz", Compression::None, 0, [7, 1], [0, 768], 9472, (0, 0)),
];

const fn row(
    file: &'static str,
    method: Compression,
    channel: u8,
    [packets, syncs]: [usize; 2],
    [normal, zero]: [u64; 2],
    bytes: usize,
    pages: (usize, u32),
) -> Expected {
    Expected { file, method, channel, packets, syncs, normal, zero, bytes, pages }
}

fn read(file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file);
    let (mut bytes, packed) = (Vec::new(), fs::read(path).unwrap());
    GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn channels_of_four_releases_are_read_to_the_last_byte_and_written_again() {
    for expected in FILES {
        let bytes = read(expected.file);
        assert_eq!(bytes.len(), expected.bytes, "{}", expected.file);
        let options =
            ChannelOptions { compression: Some(expected.method), channels: Some(4), ..ChannelOptions::default() };
        let mut decoder = ChannelDecoder::new(options);
        let mut encoder = ChannelEncoder::new(EncoderOptions::default());
        // Without its library a channel is read and written, and its pages stay compressed.
        let mut decompressor = match Decompressor::new(expected.method, decoder.page_geometry()) {
            Err(CompressionError::NotBuilt { .. }) if cfg!(not(all(feature = "zlib", feature = "zstd"))) => None,
            decompressor => Some(decompressor.unwrap()),
        };
        let (mut again, mut pages) = (Writer::new(), Vec::new());
        let (mut packets, mut syncs, mut normal, mut zero) = (0, 0, 0, 0);
        let mut rest = &bytes[..];
        decoder.ended(Ending::Closed);
        while let Step::Event { consumed, event } = decoder.next(rest).unwrap() {
            encoder.event(&event, &mut again).unwrap();
            let (payload, next) = rest[consumed..].split_at(event.payload_len() as usize);
            again.bytes(payload);
            decoder.skip_payload(event.payload_len()).unwrap();
            rest = next;
            let Event::Ram(packet) = &event else { continue };
            packets += 1;
            syncs += usize::from(packet.is_sync());
            normal += u64::from(packet.normal_count());
            zero += u64::from(packet.zero_count());
            let Some(decompressor) = &mut decompressor else { continue };
            let filled = pages.len();
            pages.resize(filled + packet.pages_len() as usize, 0);
            let mut contents = decompressor.packet(payload, packet.normal_count()).unwrap();
            contents.fill(&mut pages[filled..]).unwrap();
            if packet.normal_count() > 0 {
                contents.finish().unwrap();
            }
        }
        assert_eq!(decoder.next(rest), Ok(Step::End), "{}", expected.file);
        assert!(again.as_bytes() == bytes, "{} is written differently", expected.file);
        assert_eq!(decoder.channel(), Some(expected.channel));
        let counts = (packets, syncs, normal, zero);
        assert_eq!(counts, (expected.packets, expected.syncs, expected.normal, expected.zero), "{}", expected.file);
        if decompressor.is_none() {
            continue;
        }
        let mut crc = flate2::Crc::new();
        crc.update(&pages[..expected.pages.0]);
        assert_eq!(crc.sum(), expected.pages.1, "{}", expected.file);
    }
}
