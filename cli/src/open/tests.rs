use super::*;
use std::io::Write;

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

#[test]
fn every_wrapping_gives_the_same_stream() {
    let zstd = zstd::encode_all(STREAM, 1).unwrap();
    for (what, bytes) in [
        ("plain", STREAM.to_vec()),
        ("gzip", gzip(STREAM)),
        ("bzip2", bzip2(STREAM)),
        ("xz", xz()),
        ("zstd", zstd.clone()),
        ("libvirt raw", save_image(0, STREAM)),
        ("libvirt gzip", save_image(1, &gzip(STREAM))),
        ("libvirt zstd", save_image(5, &zstd)),
        ("libvirt sparse", save_image(6, STREAM)),
    ] {
        let file = file(&bytes);
        assert_eq!(read_all(open(file.path(), None).unwrap()), STREAM, "{what}");
        if what != "libvirt sparse" {
            let opened = from_pipe(what.to_owned(), Cursor::new(bytes)).unwrap();
            assert_eq!(read_all(opened), STREAM, "{what} through a pipe");
        }
    }
}

#[test]
fn what_cannot_be_opened_says_why() {
    let usage = |bytes: &[u8], snapshot| match open(file(bytes).path(), snapshot) {
        Err(Stop::Usage(message)) => message,
        other => panic!("{other:?}"),
    };
    assert!(usage(b"\x89LZO\0\r\n\x1a\n...........", None).contains("lzop -dc"));
    assert!(usage(STREAM, Some("x")).contains("--snapshot"));
    let cut = file(&save_image(0, STREAM)[..50]);
    assert!(matches!(open(cut.path(), None), Err(Stop::Bad(Failure { kind: "truncated", offset: 36, .. }))));
    assert!(matches!(open(Path::new("/nonexistent"), None), Err(Stop::Usage(_))));
}
