use super::*;
use crate::bounds::Bounds;
use crate::rewrite::SavedGuest;
use crate::rewrite::mapped_file::MappedFile;
use crate::source::Source;
use crate::stream::{Input, Named};
use proptest::prelude::*;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_savevm::{Encoder, StreamWriter};
use qevm_wire::{CountedString, PageGeometry};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The recorded migrations, with their further channels, and the CRC-32 that the guest's memory has, as QEMU left it in
/// a file.
const RECORDED: [(&str, &[&str], u32); 6] = [
    ("5.2-plain", &[], 0xc611_748e),
    ("7.2-return-path", &[], 0x62d8_28c8),
    ("7.2-postcopy", &[], 0x62d8_28c8),
    ("7.2-multifd-zlib", &["7.2-multifd-zlib.channel-0", "7.2-multifd-zlib.channel-1"], 0x62d8_28c8),
    ("10.0-multifd-zstd", &["10.0-multifd-zstd.channel-1", "10.0-multifd-zstd.channel-0"], 0xdeab_7121),
    ("11.1-mapped-ram", &[], 0x52f5_e92b),
];

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/streams/{name}.zst"))
}

/// A recorded file as it was.
fn plain(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, zstd::decode_all(File::open(recorded(name)).unwrap()).unwrap()).unwrap();
    path
}

fn inputs(main: &Path, channels: Vec<PathBuf>) -> Inputs {
    let mut inputs = Inputs::of_file(main).unwrap();
    if main.to_string_lossy().contains("11.1-mapped-ram") {
        inputs.offset = 4096;
    }
    for channel in channels {
        let Inputs { main: Named { name, source }, .. } = Inputs::of_file(&channel).unwrap();
        inputs.channels.push(Named { name, source });
    }
    inputs
}

/// The CRC-32 of a block, whose pages several threads read from both of its ends and in its middle.
fn crc(pages: &Pages, name: &str) -> u32 {
    let block = pages.blocks().iter().position(|block| block.name == name).unwrap();
    let (len, size) = (pages.blocks()[block].len, pages.page_size());
    let mut memory = vec![0xa5; len as usize];
    std::thread::scope(|scope| {
        for (share, part) in memory.chunks_mut(1 << 20).enumerate() {
            scope.spawn(move || {
                let start = (share as u64) << 20;
                let mut offsets: Vec<u64> = (0..part.len() as u64).step_by(size as usize).collect();
                offsets.sort_by_key(|offset| (offset / size * 97) % 256);
                for offset in offsets {
                    let page = &mut part[offset as usize..(offset + size) as usize];
                    pages.read(block, start + offset, page).unwrap();
                }
            });
        }
    });
    let mut at_once = vec![0x5a; len as usize];
    pages.read(block, 0, &mut at_once).unwrap();
    assert!(memory == at_once);
    crc32fast::hash(&memory)
}

#[test]
fn pages_are_those_of_qemu_from_files_and_from_compressed_ones() {
    let folder = tempfile::tempdir().unwrap();
    for (name, channels, expected) in RECORDED {
        let as_they_were = channels.iter().map(|channel| plain(folder.path(), channel)).collect();
        let compressed = channels.iter().map(|channel| recorded(channel)).collect();
        for (main, channels) in [(plain(folder.path(), name), as_they_were), (recorded(name), compressed)] {
            let mut inputs = inputs(&main, channels);
            let pages = Pages::index(&mut inputs, Spool::new(64 << 20), &mut |_| ()).unwrap();
            assert_eq!(crc(&pages, "mem"), expected, "{}", main.display());
        }
    }
}

#[test]
fn a_snapshot_in_a_disk_image_has_the_pages_of_its_full_extraction() {
    let folder = tempfile::tempdir().unwrap();
    for (name, snapshot) in [("two", Some("after-upgrade")), ("two", Some("before-upgrade")), ("extl2", None)] {
        let packed = format!("{}/tests/streams/reported/{name}.qcow2.xz", env!("CARGO_MANIFEST_DIR"));
        let path = folder.path().join(name);
        let mut image = lzma_rust2::XzReader::new(File::open(packed).unwrap(), true);
        std::io::copy(&mut image, &mut File::create(&path).unwrap()).unwrap();
        let open = || Inputs::open(&Input::snapshot_of(&path, snapshot)).unwrap();
        let pages = Pages::index(&mut open(), Spool::new(0), &mut |_| ()).unwrap();
        let mut extracted = extracted(&mut open());
        for block in 0..pages.blocks().len() {
            let len = pages.blocks()[block].len as usize;
            let (mut read, mut expected) = (vec![1; len], vec![2; len]);
            pages.read(block, 0, &mut read).unwrap();
            for (number, page) in expected.chunks_mut(4096).enumerate() {
                extracted.read(block, number as u64 * 4096, page).unwrap();
            }
            assert!(read == expected, "{name}: {}", pages.blocks()[block].name);
        }
    }
}

fn extracted(inputs: &mut Inputs) -> GuestRam {
    let settings = Settings {
        keep: Keep::Image,
        reencode: false,
        complete: true,
        strict: false,
        live: false,
        layouts: Layouts::default(),
        spool: Spool::unlimited(),
        max_ram: u64::MAX,
    };
    let analysis = analyze(inputs, &settings, &mut crate::stream::Ignore);
    assert_eq!(analysis.failure, None);
    analysis.ram.unwrap()
}

#[test]
fn the_mapped_ram_file_is_the_one_that_is_written() {
    let folder = tempfile::tempdir().unwrap();
    for (name, channels, _) in RECORDED {
        let channels: Vec<_> = channels.iter().map(|channel| plain(folder.path(), channel)).collect();
        let main = plain(folder.path(), name);
        let open = || inputs(&main, channels.clone());
        let file = MappedFile::index(&mut open(), Spool::new(64 << 20), &mut |_| ()).unwrap();
        let bounds = crate::bounds::Bounds::new(u64::MAX, u64::MAX);
        let out = tempfile::tempfile().unwrap();
        let mut guest = SavedGuest::read(&mut open(), &bounds, &mut |_| ()).unwrap();
        assert_eq!(guest.write_mapped(&out, "out", &mut |_| ()).unwrap(), file.len());
        let mut written = vec![0; file.len() as usize];
        out.read_exact_at(&mut written, 0).unwrap();
        assert!(mapped_in_one_pass(&mut open()) == written, "{name}");
        let (copied, _) = plain_in_one_pass(&mut open());
        assert!(copied == plain_in_two(&mut open()), "{name}");
        // In pieces that end anywhere.
        for piece in [7001, 4096, 1 << 20] {
            let mut read = vec![0xee; written.len()];
            for (n, part) in read.chunks_mut(piece).enumerate() {
                let offset = (n * piece) as u64;
                file.read_at(part, offset).unwrap();
                let zeroes = file.zeroes_at(offset, part.len() as u64) as usize;
                assert!(part[..zeroes].iter().all(|byte| *byte == 0), "{name} at {offset:#x}");
            }
            let differs = read.iter().zip(&written).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{name} in pieces of {piece}");
        }
        // Where there is nothing, that is known.
        let known: u64 = (0..file.len()).step_by(4096).map(|at| file.zeroes_at(at, 4096)).sum();
        assert!(known > file.len() / 2, "{name}: {known} of {} bytes", file.len());
        let mut beyond = [1; 9];
        file.read_at(&mut beyond, file.len() - 1).unwrap();
        assert_eq!(beyond[1..], [0; 8]);
    }
}

#[test]
fn a_file_that_is_cut_or_changed_is_an_error_with_byte_and_path() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["5.2-plain", "11.1-mapped-ram"] {
        let path = plain(folder.path(), name);
        let pages = Pages::index(&mut inputs(&path, Vec::new()), Spool::new(0), &mut |_| ()).unwrap();
        let block = pages.blocks().iter().position(|block| block.name == "mem").unwrap();
        // The last page that the image has.
        let last =
            (0..pages.blocks()[block].len / 4096).rev().find(|page| pages.run(block, *page, page + 1).1).unwrap();
        let mut page = [0; 4096];
        pages.read(block, last * 4096, &mut page).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        let content = std::fs::read(&path).unwrap();
        let place = content.windows(4096).position(|window| window == page).unwrap() as u64;
        file.set_len(place + 100).unwrap();
        let failure = pages.read(block, last * 4096, &mut page).unwrap_err();
        assert_eq!((failure.kind, failure.offset, &*failure.file), ("truncated", place, &*path.display().to_string()));
        assert_eq!(failure.path, format!("RAM block 'mem' › page {:#x}", last * 4096));
        file.set_len(len).unwrap();
        file.write_all_at(&content, 0).unwrap();
        let failure = pages.read(block, last * 4096, &mut page).unwrap_err();
        assert_eq!((failure.kind, failure.offset), ("malformed", place));
        assert!(failure.message.contains("changed"), "{failure}");
        // What is cut before it is opened is found then.
        file.set_len(place + 100).unwrap();
        let cut = Pages::index(&mut inputs(&path, Vec::new()), Spool::new(0), &mut |_| ()).unwrap_err();
        assert!(matches!(&cut, Error::Bad(failure) if failure.kind == "truncated"), "{cut:?}");
    }
}

#[test]
fn what_does_not_fit_the_spool_is_refused() {
    let spool = || Spool::new(64 << 10);
    let cut = Pages::index(&mut inputs(&recorded("5.2-plain"), Vec::new()), spool(), &mut |_| ()).unwrap_err();
    let Error::Bad(failure) = cut else { panic!("{cut:?}") };
    assert_eq!(failure.kind, "limit");
    assert!(failure.message.contains("--max-spool"), "{failure}");
}

#[test]
fn only_whole_pages_of_a_block_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let main = plain(folder.path(), "5.2-plain");
    let pages = Pages::index(&mut inputs(&main, Vec::new()), Spool::new(0), &mut |_| ()).unwrap();
    let len = pages.blocks()[0].len;
    let mut page = vec![0; 8192];
    for (block, offset, count) in [
        (0, 1, 4096),
        (0, 0, 4095),
        (0, len - 4096, 8192),
        (0, len + 4096, 4096),
        (0, u64::MAX - 4095, 8192),
        (99, 0, 0),
    ] {
        let failure = pages.read(block, offset, &mut page[..count]).unwrap_err();
        assert_eq!(failure.kind, "misuse", "{failure}");
    }
    pages.read(0, len, &mut []).unwrap();
}

pub(crate) const PAGES: u64 = 700;

/// What a source says of a page.
#[derive(Debug, Clone)]
pub(crate) enum Told {
    Zero,
    Page(u8),
    /// The first byte becomes this one.
    Difference(u8),
}

pub(crate) fn told() -> impl Strategy<Value = Vec<(u64, Told)>> {
    let one = prop_oneof![Just(Told::Zero), any::<u8>().prop_map(Told::Page), any::<u8>().prop_map(Told::Difference)];
    let in_order = (0..PAGES, 1..40u64, any::<u8>()).prop_map(|(first, count, byte)| {
        (first..PAGES.min(first + count)).map(|page| (page, Told::Page(byte))).collect::<Vec<_>>()
    });
    let step = prop_oneof![3 => (0..PAGES, one).prop_map(|one| vec![one]), 1 => in_order];
    prop::collection::vec(step, 0..60).prop_map(|steps| steps.concat())
}

/// A migration of a guest with one RAM block of [`PAGES`] pages that said this of its pages.
pub(crate) fn stream(told: &[(u64, Told)]) -> Vec<u8> {
    let mut stream = StreamWriter::new(Encoder::new(PageGeometry::X86), true);
    let header =
        SectionHeader { section_id: 2, idstr: CountedString::new("ram").unwrap(), instance_id: 0, version_id: 4 };
    stream.header(None).unwrap();
    stream.section_start(&header).unwrap();
    stream.ram_setup([RamBlock::new(CountedString::new("pc.ram").unwrap(), PAGES * 4096)]).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.section_end(2).unwrap();
    for (page, told) in told {
        let (block, offset) = (BlockId(0), page * 4096);
        match told {
            Told::Zero => stream.zero_page(block, offset).unwrap(),
            Told::Page(byte) => {
                stream.page_header(block, offset).unwrap();
                let content: Vec<u8> = (0..4096u32).map(|n| (n as u8).wrapping_mul(*byte)).collect();
                stream.payload(&content).unwrap();
            }
            Told::Difference(byte) => {
                stream.xbzrle_page(block, offset, &[0, 1, *byte]).unwrap();
            }
        }
    }
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.eof().unwrap();
    stream.take()
}

const UNBOUNDED: fn() -> Bounds = || Bounds::new(u64::MAX, u64::MAX);

/// The mapped-ram file to which pages went as they came.
fn mapped_in_one_pass(inputs: &mut Inputs) -> Vec<u8> {
    let out = tempfile::tempfile().unwrap();
    let guest = SavedGuest::read_to_mapped(inputs, &UNBOUNDED(), (&out, "out"), &mut |_| ()).unwrap();
    written(guest, &out)
}

/// The plain stream to which pages went as they came, and how long it was when all had come.
fn plain_in_one_pass(inputs: &mut Inputs) -> (Vec<u8>, u64) {
    let out = tempfile::tempfile().unwrap();
    let guest = SavedGuest::read_to_plain(inputs, &UNBOUNDED(), (&out, "out"), &mut |_| ()).unwrap();
    let came = out.metadata().unwrap().len();
    (plain_of(guest, &out), came)
}

/// The one to which pages go when all have come.
fn plain_in_two(inputs: &mut Inputs) -> Vec<u8> {
    let guest = SavedGuest::read(inputs, &UNBOUNDED(), &mut |_| ()).unwrap();
    plain_of(guest, &tempfile::tempfile().unwrap())
}

fn plain_of(mut guest: SavedGuest, out: &File) -> Vec<u8> {
    let len = guest.write_plain(out, "out", &mut |_| ()).unwrap();
    assert_eq!(out.metadata().unwrap().len(), len);
    let mut written = vec![0; len as usize];
    out.read_exact_at(&mut written, 0).unwrap();
    written
}

#[test]
fn pages_go_to_a_stream_as_they_come_as_long_as_they_come_in_order() {
    let page = |page| (page, if page % 7 == 2 { Told::Zero } else { Told::Page(page as u8 | 1) });
    let in_order: Vec<_> = (1..PAGES).map(page).collect();
    for more in [vec![], vec![(0, Told::Zero)], vec![(2, Told::Page(1))]] {
        for first in [true, false] {
            let told = if first { [&more[..], &in_order[..]].concat() } else { [&in_order[..], &more[..]].concat() };
            let bytes = stream(&told);
            let open =
                || Inputs::single("file", Source::seekable(std::sync::Arc::new(bytes.clone()), bytes.len() as u64));
            let (copied, came) = plain_in_one_pass(&mut open());
            assert!(copied == plain_in_two(&mut open()));
            // What comes late is late.
            assert!(came > 1 << 20 || first && matches!(more[..], [(2, _)]), "{came}: {more:?}");
        }
    }
}

/// The one to which pages go when all have come.
fn mapped_in_two(inputs: &mut Inputs) -> Vec<u8> {
    let guest = SavedGuest::read(inputs, &UNBOUNDED(), &mut |_| ()).unwrap();
    written(guest, &tempfile::tempfile().unwrap())
}

fn written(mut guest: SavedGuest, out: &File) -> Vec<u8> {
    let mut written = vec![0; guest.write_mapped(out, "out", &mut |_| ()).unwrap() as usize];
    assert_eq!(out.metadata().unwrap().len(), written.len() as u64);
    out.read_exact_at(&mut written, 0).unwrap();
    written
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn the_last_content_of_each_page_wins_as_in_a_full_extraction(told in told(), piped: bool) {
        let bytes = stream(&told);
        let open = || match piped {
            true => Inputs::single("pipe", Source::stream(Box::new(std::io::Cursor::new(bytes.clone())))),
            false => Inputs::single("file", Source::seekable(std::sync::Arc::new(bytes.clone()), bytes.len() as u64)),
        };
        let pages = Pages::index(&mut open(), Spool::unlimited(), &mut |_| ()).unwrap();
        let mut extracted = extracted(&mut open());
        prop_assert!(mapped_in_one_pass(&mut open()) == mapped_in_two(&mut open()));
        prop_assert!(plain_in_one_pass(&mut open()).0 == plain_in_two(&mut open()));
        let mut all = vec![3; (PAGES * 4096) as usize];
        pages.read(0, 0, &mut all).unwrap();
        for number in 0..PAGES {
            let (mut read, mut expected) = ([1; 4096], [2; 4096]);
            pages.read(0, number * 4096, &mut read).unwrap();
            extracted.read(0, number * 4096, &mut expected).unwrap();
            prop_assert!(read == expected && all[number as usize * 4096..][..4096] == expected, "page {}", number);
            if pages.zeroes_at(0, number * 4096, 4096) > 0 {
                prop_assert_eq!(expected, [0; 4096]);
            }
        }
    }
}

/// Contents that do not lie in the file as they are take room in a temporary file, once.
#[test]
fn differences_take_their_room_once() {
    let told: Vec<_> =
        (1..=50u8).flat_map(|n| [(3, Told::Page(n)), (3, Told::Difference(n)), (4, Told::Zero)]).collect();
    let bytes = stream(&told);
    let mut inputs = Inputs::single("file", Source::seekable(std::sync::Arc::new(bytes.clone()), bytes.len() as u64));
    let pages = Pages::index(&mut inputs, Spool::new(4096), &mut |_| ()).unwrap();
    let mut page = [0; 4096];
    pages.read(0, 3 * 4096, &mut page).unwrap();
    assert_eq!(page[..3], [50, 50, 100]);
}
