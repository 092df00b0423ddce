//! Pages told of, and what became of them.

use super::*;
use crate::source::Source;
use proptest::prelude::*;

/// Memory without pages, with blocks of these names and lengths in MiB.
pub(crate) fn of_mib(blocks: &[(&str, u64)]) -> GuestRam {
    let mut ram = GuestRam::new(4096, Keep::Digests, Spool::unlimited()).unwrap();
    for (name, mib) in blocks {
        ram.add_block((*name).into(), mib << 20);
    }
    ram
}

#[test]
fn digests_are_those_of_the_whole_block_with_absent_pages_as_zeroes() {
    let mut ram = GuestRam::new(4096, Keep::Image, Spool::unlimited()).unwrap();
    ram.add_block("first".into(), 4096);
    let block = ram.add_block("second".into(), 5 * 4096);
    let page: Vec<u8> = (0..4096).map(|i| (i * 7) as u8).collect();
    ram.put(block, 4096, &page).unwrap();
    ram.put(block, 3 * 4096, &page).unwrap();
    ram.put(block, 3 * 4096, &[0; 4096]).unwrap(); // the last content wins
    ram.put_zero(block, 0).unwrap();
    ram.put(block, 2 * 4096, &page).unwrap();
    ram.discard(block, 2 * 4096, 4096).unwrap();

    let mut bytes = vec![0; 5 * 4096];
    bytes[4096..8192].copy_from_slice(&page);
    let sha: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(ram.digest(block, RamDigest::Crc32).unwrap(), format!("{:08x}", crc32fast::hash(&bytes)));
    assert_eq!(ram.digest(block, RamDigest::Sha256).unwrap(), sha);
    assert_eq!((ram.blocks()[block].pages, ram.blocks()[block].zero_pages), (3, 2));
    let mut read = vec![1; 4096];
    ram.read(block, 3 * 4096, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 0));
    ram.read(block, 4096, &mut read).unwrap();
    assert_eq!(read, page);
}

#[test]
fn a_block_of_a_pebibyte_costs_nothing_until_pages_come() {
    let mut ram = GuestRam::new(4096, Keep::Digests, Spool::unlimited()).unwrap();
    let block = ram.add_block("huge".into(), 1 << 50);
    ram.put(block, (1 << 50) - 4096, &[7; 4096]).unwrap();
    assert_eq!(ram.blocks()[block].pages, 1);
    assert_eq!(ram.digest(block, RamDigest::Crc32).unwrap().len(), 8);
}

/// What may happen to pages, up to four of them from a place on.
#[derive(Debug, Clone)]
enum Told {
    Put(u64, u8),
    Zeroes(u64, u64),
    Discard(u64, u64),
    /// Pages that lie in a file, with so many bytes between each two.
    Place(u64, u64, u64),
}

fn told() -> impl Strategy<Value = Told> {
    let (at, count) = (0..40u64, 1..5u64);
    prop_oneof![
        (at.clone(), 0..3u8).prop_map(|(at, byte)| Told::Put(at, byte)),
        (at.clone(), count.clone()).prop_map(|(at, count)| Told::Zeroes(at, count)),
        (at.clone(), count.clone()).prop_map(|(at, count)| Told::Discard(at, count)),
        (at, count, prop_oneof![Just(0u64), Just(8)]).prop_map(|(at, count, gap)| Told::Place(at, count, gap)),
    ]
}

const SIZE: u64 = 256;

/// The pages of a block, each with its content, if it came.
fn pages(ram: &mut GuestRam, block: usize) -> Vec<Option<Vec<u8>>> {
    let mut pages = Vec::new();
    let len = ram.blocks()[block].used_length;
    ram.stretches(block, 0, len, |offset, stretch| {
        assert_eq!(offset, pages.len() as u64 * SIZE);
        match stretch {
            Stretch::Absent(count) => pages.extend((0..count).map(|_| None)),
            Stretch::Zero(count) => pages.extend((0..count).map(|_| Some(vec![0; SIZE as usize]))),
            Stretch::Data(contents) => {
                pages.extend(contents.chunks_exact(SIZE as usize).map(|page| Some(page.to_vec())));
                assert!(contents.chunks_exact(SIZE as usize).all(|page| page.iter().any(|byte| *byte != 0)));
            }
        }
        Ok::<(), Failure>(())
    })
    .unwrap();
    pages
}

proptest! {
    /// Whether contents were copied or stay where they are, the guest is the same.
    #[test]
    fn contents_that_stay_in_their_files_are_those_that_are_copied(all in prop::collection::vec(told(), 0..60)) {
        // Pages of one byte each, some of them of zeroes.
        let file: Vec<u8> = (0..64 * (SIZE + 8)).map(|at| (at / SIZE % 4) as u8).collect();
        let source = Source::seekable(std::sync::Arc::new(file.clone()), file.len() as u64);
        let mut kept = [Keep::Image, Keep::Contents, Keep::Contents].map(|keep| {
            let mut ram = GuestRam::new(SIZE, keep, Spool::unlimited()).unwrap();
            ram.add_block("first".into(), 3 * SIZE);
            ram.add_block("second".into(), 44 * SIZE);
            ram
        });
        // The third is copied as it comes: the second block but for its first page, in two parts.
        let copy = tempfile::tempfile().unwrap();
        let part = |block_offset, pages: u64, file_offset| Destination { block: 1, block_offset, len: pages * SIZE, file_offset };
        let parts = vec![part(9 * SIZE, 35, 5000), part(SIZE, 8, 100)];
        kept[2].copy_to(Copying::Placed(PageCopy::new(&copy, "copy", parts.clone()).unwrap().unwrap())).unwrap();
        for told in &all {
            for ram in &mut kept {
                match *told {
                    Told::Put(at, byte) => ram.put(1, at * SIZE, &[byte; SIZE as usize]),
                    Told::Zeroes(at, count) => ram.put_zeroes(1, at * SIZE, count * SIZE),
                    Told::Discard(at, count) => ram.discard(1, at * SIZE, count * SIZE),
                    Told::Place(at, count, gap) => (0..count).try_for_each(|page| {
                        let place = page * (SIZE + gap) + at;
                        match ram.keep() {
                            Keep::Image => ram.put(1, (at + page) * SIZE, &file[place as usize..][..SIZE as usize]),
                            _ => ram.put_place(1, (at + page) * SIZE, SIZE, ("file", &source, place)),
                        }
                    }),
                }
                .unwrap();
            }
        }
        let [image, contents, copied] = &mut kept;
        let expected = pages(image, 1);
        prop_assert_eq!(&expected, &pages(contents, 1));
        prop_assert_eq!(&expected, &pages(copied, 1));
        prop_assert_eq!(image.blocks()[1].zero_pages, copied.blocks()[1].zero_pages);
        let mut found: Vec<u64> = Vec::new();
        copied.contents(1, |first, count| { found.extend(first..first + count); Ok(()) }).unwrap();
        let is_there = |page: &u64| expected[*page as usize].as_ref().is_some_and(|page| !is_zero(page));
        prop_assert_eq!(found, (0..44).filter(is_there).collect::<Vec<u64>>());
        prop_assert!(copied.copied_to(&tempfile::tempfile().unwrap(), "another").unwrap().is_empty());
        let mut done = copied.copied_to(&copy, "copy").unwrap();
        done.reverse();
        prop_assert_eq!(&done, &parts);
        copy.set_len(5000 + 35 * SIZE).unwrap();
        for Destination { block_offset, len, file_offset, .. } in parts {
            let mut written = vec![9; len as usize];
            read_exact_at(&copy, &mut written, file_offset).unwrap();
            let pages = &expected[(block_offset / SIZE) as usize..][..(len / SIZE) as usize];
            let all: Vec<u8> = pages.iter().flat_map(|page| page.clone().unwrap_or(vec![0; SIZE as usize])).collect();
            prop_assert_eq!(written, all);
        }
        prop_assert_eq!(image.blocks()[1].pages, contents.blocks()[1].pages);
        let (mut copied, mut read) = (vec![1; SIZE as usize], vec![2; SIZE as usize]);
        for page in 0..44 {
            image.read(1, page * SIZE, &mut copied).unwrap();
            contents.read(1, page * SIZE, &mut read).unwrap();
            prop_assert_eq!(&copied, &read);
        }
    }
}

#[test]
fn a_file_that_changes_is_not_read_on() {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 8192]).unwrap();
    let source = Source::file(file.try_clone().unwrap()).unwrap();
    let mut ram = GuestRam::new(4096, Keep::Contents, Spool::unlimited()).unwrap();
    let block = ram.add_block("ram".into(), 8192);
    ram.put_place(block, 0, 8192, ("guest.qevm", &source, 0)).unwrap();
    let read = |ram: &mut GuestRam| ram.stretches(block, 0, 8192, |_, _| Ok::<(), Failure>(()));
    assert!(read(&mut ram).is_ok());
    std::thread::sleep(std::time::Duration::from_millis(20));
    file.rewind().unwrap();
    file.write_all(&[8; 8193]).unwrap();
    let failure = read(&mut ram).unwrap_err();
    assert_eq!((failure.kind, failure.file.as_str()), ("malformed", "guest.qevm"), "{failure}");
    assert!(failure.message.contains("has changed"), "{failure}");
    assert!(ram.digest(block, RamDigest::Crc32).is_err());
}
