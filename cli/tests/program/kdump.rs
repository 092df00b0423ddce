//! Kdump-compressed files of guests of every target, held against a dump that QEMU's `dump-guest-memory` wrote of the
//! same stopped guest, and against the notes and memory of those of ELF cores. See `streams/cores/README.md`, and
//! `docs/format/kdump.md` for the offsets.

use crate::cores::{TARGETS, notes, stream, unpacked};
use crate::sample::{file, qevm};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use tempfile::TempDir;

const ZLIB: u64 = 1;
const ZSTD: u64 = 0x20;

/// A dump of a 64-bit or a 32-bit guest.
struct Dump {
    bytes: Vec<u8>,
    wide: bool,
    frame_size: usize,
    /// Both headers with the notes, without padding.
    headers: Vec<u8>,
    notes: Vec<u8>,
    /// By the number of the page: where its content is, how long, and how compressed.
    pages: BTreeMap<usize, (usize, usize, u64)>,
    contents: usize,
}

impl Dump {
    fn new(bytes: Vec<u8>, wide: bool) -> Self {
        assert_eq!(&bytes[..8], b"KDUMP   ");
        let big = bytes[8] == 0;
        let number = |at: usize, len: usize| {
            let shift_in = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
            let bytes = &bytes[at..at + len];
            if big { bytes.iter().fold(0, shift_in) } else { bytes.iter().rev().fold(0, shift_in) }
        };
        assert_eq!(number(8, 4), 6);
        let sizes = if wide { 428 } else { 416 };
        let [frame_size, second, bitmaps] = [0, 4, 8].map(|field| number(sizes + field, 4) as usize);
        let (notes_at, word) = if wide { (0x30, 8) } else { (0x20, 4) };
        let [at, len] = [(0, 8), (8, word)].map(|(field, len)| number(frame_size + notes_at + field, len) as usize);
        let start = (1 + second) * frame_size;
        let (first, present) = bytes[start..][..bitmaps * frame_size].split_at(bitmaps / 2 * frame_size);
        assert!(first == present, "pages are left out");
        let set = (0..present.len() * 8).filter(|bit| present[bit / 8] >> (bit % 8) & 1 != 0);
        let descriptors = start + bitmaps * frame_size;
        let mut pages = BTreeMap::new();
        for (index, page) in set.enumerate() {
            let [offset, len, flags, more] =
                [(0, 8), (8, 4), (12, 4), (16, 8)].map(|(field, len)| number(descriptors + index * 24 + field, len));
            assert_eq!(more, 0);
            pages.insert(page, (offset as usize, len as usize, flags));
        }
        let (headers, notes) = (bytes[..at + len].to_vec(), bytes[at..at + len].to_vec());
        Dump { wide, frame_size, headers, notes, contents: descriptors + pages.len() * 24, pages, bytes }
    }

    fn page(&self, number: usize) -> Vec<u8> {
        let (offset, len, flags) = self.pages[&number];
        let (content, mut page) = (&self.bytes[offset..offset + len], Vec::new());
        match flags {
            0 => page.extend_from_slice(content),
            ZLIB => drop(flate2::read::ZlibDecoder::new(content).read_to_end(&mut page).unwrap()),
            ZSTD => page = zstd::decode_all(content).unwrap(),
            other => panic!("compressed in way {other:#x}"),
        }
        assert_eq!(page.len(), self.frame_size);
        page
    }

    /// The contents lie in order and without gaps, that of all pages of zeroes first, and no page is longer than it
    /// was.
    fn judge_contents(&self) {
        let zeroes = (self.contents, self.frame_size, 0);
        let mut end = self.contents + self.frame_size;
        for (&number, &place) in &self.pages {
            let blank = self.page(number).iter().all(|byte| *byte == 0);
            assert_eq!(place == zeroes, blank, "page {number:#x}");
            if !blank {
                assert_eq!((place.0, place.1 < self.frame_size), (end, place.2 != 0), "page {number:#x}");
                end += place.1;
            }
        }
        assert_eq!(end, self.bytes.len());
    }

    /// With what QEMU cannot know left out: the name of the machine, which 11.1 calls `Unknown`, and how many pages
    /// there are up to the last one.
    fn headers_but_for_the_end(&self) -> Vec<u8> {
        let mut headers = self.headers.clone();
        let (counts, end) = if self.wide { (436, 96) } else { (424, 72) };
        headers[272..337].fill(0);
        headers[counts..counts + 8].fill(0);
        headers[self.frame_size + end..][..8].fill(0);
        headers
    }
}

fn extract(dir: &TempDir, stream: &Path, compression: &str, wide: bool) -> Dump {
    let dump = dir.path().join("dump");
    let [stream, path] = [stream, &dump].map(|path| path.display().to_string());
    let ran = qevm(["extract", "--force", "--kdump", &path, "--kdump-compression", compression, &stream]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("kdump-compressed dump with"), "{}", ran.stdout);
    Dump::new(std::fs::read(dump).unwrap(), wide)
}

#[test]
fn a_dump_is_the_one_that_qemu_writes() {
    let dir = TempDir::new().unwrap();
    let stream = file(&dir, "x86_64", &stream("x86_64"));
    let theirs = Dump::new(unpacked("cores/x86_64.kdump.xz"), true);
    theirs.judge_contents();
    for (compression, status) in [("zlib", ZLIB), ("zstd", ZSTD)] {
        let ours = extract(&dir, &stream, compression, true);
        ours.judge_contents();
        let mut headers = ours.headers_but_for_the_end();
        assert_eq!((headers[424], &ours.bytes[272..279]), (status as u8, &b"x86_64\0"[..]));
        headers[424] = ZLIB as u8;
        assert!(headers == theirs.headers_but_for_the_end(), "{compression}");
        // QEMU has the firmware below 4 GiB as well, and what lies in it at 960 KiB of the memory.
        let firmware = (1 << 20) - 16..1 << 20;
        assert!(theirs.pages.keys().all(|page| ours.pages.contains_key(page) || firmware.contains(page)));
        assert_eq!((ours.pages.len(), theirs.pages.len()), (4096, 4096 + firmware.len()));
        let shadow = 0xf0..0x100;
        for &page in ours.pages.keys().filter(|page| !shadow.contains(*page)) {
            assert!(ours.page(page) == theirs.page(page), "{compression}: page {page:#x}");
        }
        assert!(ours.pages.values().filter(|place| place.2 == status).count() > 10);
        assert!(ours.pages.values().filter(|place| place.2 == 0).count() > 4000);
    }
}

#[test]
fn dumps_have_the_notes_and_the_memory_of_cores() {
    let dir = TempDir::new().unwrap();
    for (name, [class, order], _, address, crc) in TARGETS {
        let dump = extract(&dir, &file(&dir, name, &stream(name)), "zlib", class == 2);
        dump.judge_contents();
        assert_eq!(dump.bytes[8] == 0, order == 2, "{name}: byte order");
        assert!(dump.notes == notes(name), "{name}: the notes differ");
        assert_eq!(dump.pages.keys().next(), Some(&(address as usize / dump.frame_size)), "{name}");
        let mut memory = crc32fast::Hasher::new();
        dump.pages.keys().for_each(|page| memory.update(&dump.page(*page)));
        assert_eq!(memory.finalize(), crc, "{name}");
    }
}

#[test]
fn a_compression_is_that_of_a_dump() {
    let ran = qevm(["extract", "--kdump-compression", "zstd", "--elf", "core", "stream"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stdout);
    assert!(ran.stderr.contains("--kdump <FILE>"), "{}", ran.stderr);
}
