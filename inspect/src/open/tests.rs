use super::*;
use std::io::Write;

/// Where an lz4 frame is cut, the reader has seen that it is one.
const MAGIC_AND_FLAGS: usize = 5;
const STREAM: &[u8] = b"QEVM\0\0\0\x03 and so on";

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read_all(mut opened: Opened) -> Vec<u8> {
    opened.source.skip(opened.offset).unwrap();
    opened.source.fill(1 << 20).unwrap();
    opened.source.window().to_vec()
}

fn save_image(format: u32, payload: &[u8]) -> Vec<u8> {
    let xml = b"<domain/>\0";
    let mut bytes = b"LibvirtQemudSave".to_vec();
    for word in [2, xml.len() as u32, 1, format, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(libvirt::HEADER_LEN, 0);
    bytes.extend(xml);
    bytes.extend(payload);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ::bzip2::write::BzEncoder::new(Vec::new(), ::bzip2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// `xz -9` of [`STREAM`], as the program makes it, so that the reader is not judged by its own writer.
fn xz() -> Vec<u8> {
    let mut child = std::process::Command::new("xz")
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("xz is part of every Debian");
    child.stdin.take().unwrap().write_all(STREAM).unwrap();
    child.wait_with_output().unwrap().stdout
}

/// What the program `lz4` 1.9.4 makes of [`STREAM`]: as it does by default, and with checksums of the blocks and the
/// size of the content (`-BX --content-size`).
const LZ4: [&[u8]; 2] = [
    b"\x04\x22M\x18d@\xa7\x12\0\0\x80QEVM\0\0\0\x03 and so on\0\0\0\0\xc9\x93\xd6\xa2",
    b"\x04\x22M\x18|@\x12\0\0\0\0\0\0\0\xce\x12\0\0\x80QEVM\0\0\0\x03 and so on\xc9\x93\xd6\xa2\0\0\0\0\xc9\x93\xd6\xa2",
];

#[test]
fn every_wrapping_gives_the_same_stream() {
    let zstd = zstd::encode_all(STREAM, 1).unwrap();
    for (what, bytes) in [
        ("plain", STREAM.to_vec()),
        ("gzip", gzip(STREAM)),
        ("bzip2", bzip2(STREAM)),
        ("xz", xz()),
        ("zstd", zstd.clone()),
        ("lz4", LZ4[0].to_vec()),
        ("lz4 with checksums and size", LZ4[1].to_vec()),
        ("lz4 in gzip", gzip(LZ4[0])),
        ("libvirt raw", save_image(0, STREAM)),
        ("libvirt gzip", save_image(1, &gzip(STREAM))),
        ("libvirt zstd", save_image(5, &zstd)),
        ("gzip in bzip2", bzip2(&gzip(STREAM))),
        ("libvirt raw in gzip", gzip(&save_image(0, STREAM))),
        ("libvirt zstd in bzip2 in gzip", gzip(&bzip2(&save_image(5, &zstd)))),
        ("libvirt sparse", save_image(6, STREAM)),
    ] {
        let file = file(&bytes);
        assert_eq!(read_all(open(file.path(), None, false).unwrap()), STREAM, "{what}");
        if what != "libvirt sparse" {
            let opened = from_pipe(what.to_owned(), Cursor::new(bytes), Vec::new()).unwrap();
            assert_eq!(read_all(opened), STREAM, "{what} through a pipe");
        }
    }
}

/// Compressed by the programs that people use, and followed by what a volume has after it.
#[test]
fn what_follows_compressed_data_is_no_part_of_it() {
    let zstd = zstd::encode_all(STREAM, 1).unwrap();
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &zstd].concat();
    for (what, member) in
        [("gzip", gzip(STREAM)), ("bzip2", bzip2(STREAM)), ("xz", xz()), ("zstd", zstd), ("lz4", LZ4[0].to_vec())]
    {
        let twice = [STREAM, STREAM].concat();
        for (after, expected, trailing) in [
            (vec![], STREAM.to_vec(), false),
            (vec![0; 70_000], STREAM.to_vec(), true),
            (b"\xff".to_vec(), STREAM.to_vec(), true),
            (member[..2].to_vec(), STREAM.to_vec(), true),
            (member.clone(), twice.clone(), false),
            ([&member[..], &[0; 512]].concat(), twice.clone(), true),
        ] {
            let file = file(&[&member[..], &after].concat());
            let mut opened = open(file.path(), None, false).unwrap();
            opened.source.fill(1 << 20).unwrap();
            assert_eq!(opened.source.window(), expected, "{what} and {} bytes", after.len());
            let remarked = opened.containers.iter().any(|container| container.remark().is_some());
            assert_eq!(remarked, trailing, "{what} and {} bytes", after.len());
        }
    }
    assert_eq!(read_all(open(file(&skipped).path(), None, false).unwrap()), STREAM, "pzstd");
    let padded = [&xz()[..], &[0; 8], &xz()].concat();
    assert_eq!(read_all(open(file(&padded).path(), None, false).unwrap()), [STREAM, STREAM].concat(), "padded xz");
}

#[test]
fn what_cannot_be_opened_says_why() {
    let usage = |bytes: &[u8], snapshot| match open(file(bytes).path(), snapshot, false) {
        Err(Error::Usage(message)) => message,
        other => panic!("{other:?}"),
    };
    assert!(usage(b"\x89LZO\0\r\n\x1a\n...........", None).contains("lzop -dc"));
    assert!(usage(STREAM, Some("x")).contains("--snapshot"));
    let cut = file(&save_image(0, STREAM)[..50]);
    assert!(matches!(open(cut.path(), None, false), Err(Error::Bad(Failure { kind: "truncated", offset: 36, .. }))));
    assert!(matches!(open(Path::new("/nonexistent"), None, false), Err(Error::Usage(_))));
}

/// Reads to the end, and says how that fails.
fn failure(bytes: &[u8]) -> Failure {
    let file = file(bytes);
    match open(file.path(), None, false) {
        Ok(mut opened) => {
            let error = opened.source.skip(u64::MAX).expect_err("a fault");
            Failure::io(&opened.name, 0, &error)
        }
        Err(Error::Bad(failure)) => failure,
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn damaged_compressed_data_is_the_inputs_fault() {
    let zstd = {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.include_checksum(true).unwrap();
        encoder.write_all(STREAM).unwrap();
        encoder.finish().unwrap()
    };
    // What is changed is a byte of a checksum, for which each has a place of its own.
    let (gzip, zstd_len) = (gzip(STREAM), zstd.len());
    let gzip_len = gzip.len();
    for (program, whole, checksum) in [
        ("gzip", gzip, gzip_len - 7),
        ("bzip2", bzip2(STREAM), 10),
        ("xz", xz(), 10),
        ("zstd", zstd, zstd_len - 1),
        ("lz4", LZ4[0].to_vec(), LZ4[0].len() - 1),
    ] {
        let cut = failure(&whole[..whole.len() - 3]);
        assert_eq!(cut.kind, "truncated", "{program}: {cut}");
        assert!(cut.message.contains(program), "{cut}");
        if program == "lz4" {
            for len in MAGIC_AND_FLAGS..whole.len() {
                assert_eq!(failure(&whole[..len]).kind, "truncated", "lz4, {len} bytes");
            }
        }
        let mut changed = whole;
        changed[checksum] ^= 0x55;
        let changed = failure(&changed);
        assert_eq!(changed.kind, "malformed", "{program}: {changed}");
        assert!(changed.message.contains(program), "{changed}");
    }
}

#[test]
fn compressed_data_that_asks_for_much_memory_is_beyond_a_limit() {
    // The header of a frame with a window of 2 GiB (RFC 8878, 3.1.1.1.2), and an empty last block.
    let window = failure(&[0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 1, 0, 0]);
    assert_eq!(window.kind, "limit", "{window}");
    assert!(window.message.contains("`zstd -dc`"), "{window}");
    // A stream with a dictionary of 4 GiB - 1: flags and size of the block's header, its one filter, and CRCs.
    let mut dictionary = b"\xfd7zXZ\0\0\0\xff\x12\xd9\x41".to_vec();
    dictionary.extend(b"\x02\0\x21\x01\x28\0\0\0");
    let mut crc = flate2::Crc::new();
    crc.update(&dictionary[12..]);
    dictionary.extend(crc.sum().to_le_bytes());
    dictionary.extend([1, 0, 0, b'x', 0]);
    let dictionary = failure(&dictionary);
    assert_eq!(dictionary.kind, "limit", "{dictionary}");
    assert!(dictionary.message.contains("`xz -dc`"), "{dictionary}");
}

/// A qcow2 image (version 3, clusters of 64 KiB, no disk) with one snapshot of this much VM state, and no cluster of
/// it.
fn image(vm_state_size: u64) -> Vec<u8> {
    const CLUSTER: usize = 64 << 10;
    let mut image = b"QFI\xfb\0\0\0\x03".to_vec();
    image.extend([0; 12]);
    image.extend(16u32.to_be_bytes());
    image.resize(60, 0);
    image.extend(1u32.to_be_bytes());
    image.extend((CLUSTER as u64).to_be_bytes());
    image.resize(100, 0);
    image.extend(104u32.to_be_bytes());
    image.resize(CLUSTER, 0);
    // L1 table: one entry maps 512 MiB.
    let entries = vm_state_size.div_ceil(512 << 20) as u32;
    image.extend((2 * CLUSTER as u64).to_be_bytes());
    image.extend(entries.to_be_bytes());
    image.extend(b"\0\x01\0\x01");
    image.extend([0; 20]);
    image.extend(16u32.to_be_bytes());
    image.extend(vm_state_size.to_be_bytes());
    image.extend([0; 8]);
    image.extend(b"1s");
    image.resize(3 * CLUSTER + 8 * entries as usize, 0);
    image
}

#[test]
fn a_snapshot_has_no_more_state_than_its_file() {
    let file = file(&image(100_000));
    assert_eq!(read_all(open(file.path(), None, false).unwrap()), [0; 100_000]);
    let failure = failure(&image(1 << 40));
    assert_eq!((failure.kind, failure.path.as_str()), ("malformed", "snapshot table"), "{failure}");
    assert!(failure.message.contains("1099511627776"), "{failure}");
}

#[test]
fn places_beyond_any_file_are_beyond_its_end() {
    let mut table = image(100_000);
    table[64..72].copy_from_slice(&(u64::MAX - 3).to_be_bytes());
    assert_eq!(failure(&table).kind, "truncated");
    let mut l1 = image(100_000);
    let at = 64 << 10;
    l1[at..at + 8].copy_from_slice(&(u64::MAX - 3).to_be_bytes());
    assert_eq!(failure(&l1).kind, "truncated");
}
