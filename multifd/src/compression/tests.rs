use super::*;
use flate2::write::GzEncoder;
use flate2::{Compress, FlushCompress, GzBuilder};
use proptest::prelude::*;
use qevm_wire::{Blame, Fault, PageGeometry};
use std::io::Write;

const PAGE: usize = 4096;

/// Pages that compress well (`seed` below 128) or not at all.
fn page(seed: u8) -> Vec<u8> {
    let mut state = u32::from(seed) | 1;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..PAGE).map(|i| if seed < 128 { seed ^ (i / 100) as u8 } else { random() }).collect()
}

fn compress(compressor: &mut Compressor, pages: &[Vec<u8>]) -> Vec<u8> {
    let mut payload = Vec::new();
    compressor.packet(pages.iter().map(Vec::as_slice), &mut payload).unwrap();
    payload
}

fn decompress(decompressor: &mut Decompressor, payload: &[u8], pages: u32) -> Result<Vec<u8>, CompressionError> {
    let mut memory = vec![0; pages as usize * PAGE];
    let mut packet = decompressor.packet(payload, pages)?;
    packet.fill(&mut memory)?;
    packet.finish()?;
    Ok(memory)
}

fn decompressor(method: Compression) -> Decompressor {
    Decompressor::new(method, PageGeometry::X86).unwrap()
}

/// Raw deflate of one page, as `qpl` makes it: a stream of its own, finished.
fn raw_deflate(page: &[u8]) -> Vec<u8> {
    let mut output = Vec::with_capacity(2 * PAGE);
    Compress::new(flate2::Compression::fast(), false).compress_vec(page, &mut output, FlushCompress::Finish).unwrap();
    output
}

fn by_page(pages: &[Vec<u8>]) -> Vec<u8> {
    let lengths = pages.iter().flat_map(|page| (page.len() as u32).to_be_bytes());
    lengths.chain(pages.concat()).collect()
}

/// A gzip member with an extra field, as QATzip's `gzip-ext` format has one.
fn gzip_ext(data: &[u8]) -> Vec<u8> {
    let extra = *b"QZ\x08\0\x01\x02\x03\x04\x05\x06\x07\x08";
    let mut member: GzEncoder<Vec<u8>> = GzBuilder::new().extra(extra).write(Vec::new(), flate2::Compression::fast());
    member.write_all(data).unwrap();
    member.finish().unwrap()
}

#[test]
fn flags_and_names_are_those_of_the_format() {
    let rows = [
        ("none", 0, "4.0"),
        ("zlib", 2, "5.0"),
        ("zstd", 4, "5.0"),
        ("qpl", 8, "9.1"),
        ("uadk", 16, "9.1"),
        ("qatzip", 32, "9.2"),
    ];
    for (name, flag, since) in rows {
        let method: Compression = name.parse().unwrap();
        assert_eq!((method.flag(), method.since(), method.to_string()), (flag, since.parse().unwrap(), name.into()));
        assert_eq!(Compression::from_flags(flag | 1), Some(method));
    }
    assert_eq!(Compression::from_flags(0x06), None);
    assert_eq!("lz4".parse::<Compression>(), Err(UnknownCompression));
}

/// The marks that the spec gives for the payloads of the channel's packets.
#[test]
fn streams_start_once_and_are_flushed_with_every_packet() {
    let (pages, noise) = ([page(1), page(2)], [page(200), page(1), page(200)]);
    let mut zlib = Compressor::new(Compression::Zlib, None).unwrap();
    let (first, second) = (compress(&mut zlib, &pages), compress(&mut zlib, &pages));
    assert_eq!(first[..2], [0x78, 0x01]);
    assert_ne!(second[..2], [0x78, 0x01]);
    assert!(compress(&mut zlib, &noise).ends_with(&[0, 0, 0xff, 0xff]));
    for payload in [first, second] {
        assert_eq!(payload[payload.len() - 4..], [0, 0, 0xff, 0xff]);
        let markers = payload.windows(4).filter(|window| *window == [0, 0, 0xff, 0xff]).count();
        assert_eq!(markers, 1, "flushed with the last page only");
    }
    let mut zstd = Compressor::new(Compression::Zstd, None).unwrap();
    let magic = 0xfd2f_b528_u32.to_le_bytes();
    assert!(compress(&mut zstd, &pages).starts_with(&magic));
    assert!(!compress(&mut zstd, &pages).starts_with(&magic));
}

#[test]
fn every_level_is_read_back_and_others_are_refused() {
    for (method, max) in [(Compression::Zlib, 9), (Compression::Zstd, 20)] {
        for level in 0..=max {
            let mut compressor = Compressor::new(method, Some(level)).unwrap();
            let mut reader = decompressor(method);
            for pages in [vec![page(3), page(250)], vec![page(9)]] {
                let payload = compress(&mut compressor, &pages);
                assert_eq!(decompress(&mut reader, &payload, pages.len() as u32).unwrap(), pages.concat());
            }
        }
        for level in [-1, max + 1] {
            let error = Compressor::new(method, Some(level)).unwrap_err();
            assert_eq!(error, CompressionError::Level { method, found: level, min: 0, max });
        }
    }
}

#[test]
fn methods_of_accelerators_are_not_written() {
    for method in [Compression::Qpl, Compression::Uadk, Compression::Qatzip] {
        let error = Compressor::new(method, None).unwrap_err();
        assert!(matches!(error, CompressionError::Hardware { .. }));
        assert_eq!(error.fault(), Fault::Unsupported);
    }
}

#[test]
fn a_payload_must_give_exactly_its_pages() {
    let pages = [page(1), page(2)];
    for method in [Compression::None, Compression::Zlib, Compression::Zstd] {
        let payload = compress(&mut Compressor::new(method, None).unwrap(), &pages);
        let try_with = |payload: &[u8], pages| decompress(&mut decompressor(method), payload, pages).err().unwrap();
        let more = try_with(&payload, 1);
        assert!(
            matches!(more, CompressionError::Length { .. } | CompressionError::LeftOver { .. }),
            "{method}: {more}"
        );
        let fewer = try_with(&payload, 3);
        assert!(matches!(fewer, CompressionError::Length { expected: 12288, .. }), "{method}: {fewer}");
        let cut = try_with(&payload[..payload.len() / 2], 2);
        assert!(matches!(cut, CompressionError::Length { expected: 8192, .. }), "{method}: {cut}");
    }
}

#[test]
fn plain_pages_must_use_up_the_payload() {
    let payload = [&page(1)[..], b"x"].concat();
    let error = decompress(&mut decompressor(Compression::None), &payload, 1).err();
    assert_eq!(error, Some(CompressionError::LeftOver { left: 1, len: 4097 }));
}

#[test]
fn a_broken_stream_is_reported_and_stays_broken() {
    for (method, payload) in
        [(Compression::Zlib, &b"\x78\x01\xff\xff\xff\xff"[..]), (Compression::Zstd, b"no frame at all")]
    {
        let mut reader = decompressor(method);
        let first = decompress(&mut reader, payload, 1).err().unwrap();
        assert!(matches!(first, CompressionError::Corrupt { method: m, .. } if m == method), "{first}");
        let good = compress(&mut Compressor::new(method, None).unwrap(), &[page(1)]);
        assert_eq!(decompress(&mut reader, &good, 1).err().unwrap(), first);
    }
}

#[test]
fn a_zlib_stream_that_ends_is_no_channel() {
    let mut finished = Vec::with_capacity(2 * PAGE);
    Compress::new(flate2::Compression::fast(), true)
        .compress_vec(&page(1), &mut finished, FlushCompress::Finish)
        .unwrap();
    let error = decompress(&mut decompressor(Compression::Zlib), &finished, 1).err().unwrap();
    assert!(matches!(error, CompressionError::Corrupt { method: Compression::Zlib, .. }), "{error}");
}

#[test]
fn a_zstd_window_above_that_of_the_highest_level_is_refused() {
    // Frame header with a window descriptor of exponent 16: 2^26 bytes.
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 16 << 3, 0x01, 0x00, 0x00];
    let error = decompress(&mut decompressor(Compression::Zstd), &frame, 1).err().unwrap();
    assert!(matches!(error, CompressionError::Corrupt { method: Compression::Zstd, .. }), "{error}");
    // The same with 2^25 bytes is an empty frame, and so only too short.
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 15 << 3, 0x01, 0x00, 0x00];
    let error = decompress(&mut decompressor(Compression::Zstd), &frame, 1).err().unwrap();
    assert!(matches!(error, CompressionError::Length { found: 0, expected: 4096 }), "{error}");
}

#[test]
fn qpl_pages_are_raw_deflate_or_plain() {
    let pages = [page(1), page(200), page(2)];
    let payload = by_page(&[raw_deflate(&pages[0]), pages[1].clone(), raw_deflate(&pages[2])]);
    let mut reader = decompressor(Compression::Qpl);
    for _ in 0..2 {
        assert_eq!(decompress(&mut reader, &payload, 3).unwrap(), pages.concat());
    }
}

#[test]
fn page_lengths_must_add_up() {
    let try_with =
        |payload: &[u8], pages| decompress(&mut decompressor(Compression::Qpl), payload, pages).err().unwrap();
    let good = by_page(&[raw_deflate(&page(1))]);
    assert!(matches!(try_with(&good[..3], 1), CompressionError::Length { found: 3, expected: 4 }));
    assert!(matches!(try_with(&good[..20], 1), CompressionError::Length { found: 16, .. }));
    let longer = [&good[..], b"xy"].concat();
    assert!(matches!(try_with(&longer, 1), CompressionError::LeftOver { left: 2, .. }));
    let oversized = by_page(&[vec![0; PAGE + 1]]);
    assert!(matches!(try_with(&oversized, 1), CompressionError::PageLength { index: 0, found: 4097, max: 4096 }));
    let two_pages = by_page(&[raw_deflate(&[page(1), page(2)].concat())]);
    assert!(matches!(try_with(&two_pages, 1), CompressionError::Length { found: 4097, expected: 4096 }));
    let half = by_page(&[raw_deflate(&page(1)[..100])]);
    assert!(matches!(try_with(&half, 1), CompressionError::Length { found: 100, expected: 4096 }));
    assert!(matches!(try_with(&by_page(&[vec![]]), 1), CompressionError::Length { found: 0, expected: 4096 }));
    assert!(matches!(
        try_with(&by_page(&[vec![0xff; 9]]), 1),
        CompressionError::Corrupt { method: Compression::Qpl, .. }
    ));
}

#[test]
fn uadk_pages_are_read_where_they_are_plain() {
    let plain = by_page(&[page(200), page(201)]);
    assert_eq!(decompress(&mut decompressor(Compression::Uadk), &plain, 2).unwrap(), [page(200), page(201)].concat());
    let error = decompress(&mut decompressor(Compression::Uadk), &by_page(&[vec![1; 10]]), 1).err().unwrap();
    assert!(matches!(error, CompressionError::Hardware { method: Compression::Uadk, .. }));
}

#[test]
fn qatzip_blocks_are_gzip_members() {
    let pages = [page(1), page(200), page(2)].concat();
    let one = gzip_ext(&pages);
    let two = [gzip_ext(&pages[..5000]), gzip_ext(&pages[5000..])].concat();
    for payload in [&one, &two] {
        assert_eq!(decompress(&mut decompressor(Compression::Qatzip), payload, 3).unwrap(), pages);
    }
    let try_with =
        |payload: &[u8], pages| decompress(&mut decompressor(Compression::Qatzip), payload, pages).err().unwrap();
    assert!(matches!(try_with(&one, 2), CompressionError::Length { found: 8193, expected: 8192 }));
    assert!(matches!(try_with(&one, 4), CompressionError::Length { found: 12288, expected: 16384 }));
    assert!(matches!(
        try_with(&one[..one.len() / 2], 3),
        CompressionError::Corrupt { method: Compression::Qatzip, .. }
    ));
    assert!(matches!(try_with(b"QZ no gzip", 1), CompressionError::Hardware { method: Compression::Qatzip, .. }));
}

#[test]
fn asking_for_more_or_less_than_the_packet_is_an_error() {
    let payload = [page(1), page(2)].concat();
    let mut reader = decompressor(Compression::None);
    let mut memory = vec![0; 3 * PAGE];
    assert!(matches!(reader.packet(&payload, 2).unwrap().fill(&mut memory), Err(CompressionError::Order { .. })));
    assert!(matches!(reader.packet(&payload, 2), Err(CompressionError::Order { .. })), "it gives the error for ever");
    let mut reader = decompressor(Compression::None);
    let part = reader.packet(&payload, 2).unwrap().fill(&mut memory[..100]);
    assert!(matches!(part, Err(CompressionError::Order { .. })));
    let mut reader = decompressor(Compression::None);
    let mut packet = reader.packet(&payload, 2).unwrap();
    packet.fill(&mut memory[..PAGE]).unwrap();
    assert!(matches!(packet.finish(), Err(CompressionError::Order { .. })));
    // What is left of a payload would be taken for the start of the next.
    let mut reader = decompressor(Compression::None);
    reader.packet(&payload, 2).unwrap().fill(&mut memory[..PAGE]).unwrap();
    assert!(matches!(reader.packet(&payload, 2), Err(CompressionError::Order { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_compressed_is_read_back(
        method in prop::sample::select(&[Compression::None, Compression::Zlib, Compression::Zstd]),
        level in 0..=3,
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..6), 1..5),
        step in 1usize..4,
    ) {
        let mut compressor = Compressor::new(method, Some(level)).unwrap();
        let mut reader = decompressor(method);
        for seeds in packets {
            let pages: Vec<_> = seeds.iter().map(|seed| page(*seed)).collect();
            let payload = compress(&mut compressor, &pages);
            let mut memory = vec![0xee; pages.len() * PAGE];
            let mut packet = reader.packet(&payload, pages.len() as u32).unwrap();
            for run in memory.chunks_mut(step * PAGE) {
                packet.fill(run).unwrap();
            }
            packet.finish().unwrap();
            prop_assert_eq!(memory, pages.concat());
        }
    }

    #[test]
    fn damaged_payloads_give_errors_and_nothing_else(
        method in prop::sample::select(&Compression::ALL[..]),
        mut payload in prop::collection::vec(any::<u8>(), 0..300),
        prefix in 0usize..4,
        pages in 1u32..4,
    ) {
        let prefix: &[u8] = [&b""[..], &[0x78, 0x01], &[0x28, 0xb5, 0x2f, 0xfd], &[0x1f, 0x8b, 8, 0]][prefix];
        payload.splice(0..0, prefix.iter().copied());
        if let Ok(memory) = decompress(&mut decompressor(method), &payload, pages) {
            prop_assert_eq!(memory.len(), pages as usize * PAGE);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Pages that are stored and pages that are compressed may follow each other in any way, at every level, and
    /// flate2's own decoder reads what comes out.
    #[test]
    fn noise_between_other_pages_survives(
        packets in prop::collection::vec(prop::collection::vec((any::<bool>(), any::<u8>()), 1..12), 1..4),
        level in 0..=9,
    ) {
        let noise = |seed: u8| -> Vec<u8> {
            let mut state = u64::from(seed) + 1;
            (0..PAGE).map(|_| { state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); (state >> 56) as u8 }).collect()
        };
        let mut compressor = Compressor::new(Compression::Zlib, Some(level)).unwrap();
        let mut other = flate2::Decompress::new(true);
        for packet in packets {
            let pages: Vec<Vec<u8>> = packet.iter().map(|(random, seed)| if *random { noise(*seed) } else { page(*seed) }).collect();
            let payload = compress(&mut compressor, &pages);
            let mut memory = vec![0; pages.len() * PAGE];
            let read = other.total_in();
            other.decompress(&payload, &mut memory, flate2::FlushDecompress::Sync).unwrap();
            prop_assert_eq!(other.total_in() - read, payload.len() as u64);
            prop_assert!(memory == pages.concat());
        }
    }
}

/// Random pages stay as long as they are but for the headers of stored blocks.
#[test]
fn noise_is_stored() {
    let mut state = 1u64;
    let mut noise = || -> Vec<u8> {
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..PAGE).map(|_| byte()).collect()
    };
    let pages: Vec<_> = (0..128).map(|_| noise()).collect();
    let payload = compress(&mut Compressor::new(Compression::Zlib, None).unwrap(), &pages);
    assert!(payload.len() < 128 * PAGE + 128 * 16, "{}", payload.len());
}
