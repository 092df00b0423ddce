//! The words of a RAM block's entry that are only there with some capabilities.

use crate::pump::pump;
use crate::streams::{header, name};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use qevm_savevm::command::{Command, PostcopyAdvise};
use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_savevm::ram::{MappedRamHeader, RamBlock, RamError, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, Event, StreamWriter};
use qevm_wire::CountedString;

const HUGE: u64 = 2 << 20;
const GIGANTIC: u64 = 1 << 30;

fn capabilities(names: &[&str]) -> Configuration {
    let names = names.iter().map(|capability| name(capability)).collect();
    Configuration { machine: b"microvm".to_vec(), subsections: vec![ConfigurationSubsection::Capabilities(names)] }
}

fn write(configuration: &Configuration, advise: Option<u64>, blocks: &[RamBlock], flush: bool) -> Vec<u8> {
    let mut stream = StreamWriter::default();
    stream.header(Some(configuration)).unwrap();
    if let Some(page_size_summary) = advise {
        let advise = PostcopyAdvise { page_size_summary, target_page_size: 4096 };
        stream.command(Command::PostcopyAdvise(Some(advise))).unwrap();
    }
    stream.section_start(&header(1, "ram", 4)).unwrap();
    stream.ram_setup(blocks.iter().cloned()).unwrap();
    if flush {
        stream.multifd_flush().unwrap();
    }
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.eof().unwrap();
    stream.take()
}

fn read(stream: &[u8], piece: usize) -> Result<Vec<RamBlock>, Error> {
    let mut decoder = Decoder::new(DecoderOptions::default());
    let pumped = pump(&mut decoder, stream, || piece)?;
    assert_eq!(pumped.bytes, stream);
    Ok(decoder.ram_blocks().iter().map(|(_, block)| block.clone()).collect())
}

fn blocks(address: bool) -> impl Strategy<Value = Vec<RamBlock>> {
    let page_size = prop_oneof![Just(HUGE), Just(GIGANTIC), Just(0x1_0000)];
    // Addresses that look like page sizes are the hard case.
    let addresses = prop_oneof![Just(0), Just(HUGE), Just(GIGANTIC), (0u64..1 << 40).prop_map(|page| page << 12)];
    let block = (1u64..1 << 30, option::of(page_size), addresses);
    vec(block, 1..6).prop_map(move |blocks| {
        let named = blocks.into_iter().enumerate().map(|(i, (pages, page_size, at))| RamBlock {
            page_size,
            address: address.then_some(at),
            ..RamBlock::new(CountedString::new(format!("block {i}")).unwrap(), pages << 12)
        });
        named.collect()
    })
}

fn summary(blocks: &[RamBlock]) -> u64 {
    blocks.iter().fold(0, |sizes, block| sizes | block.page_size.unwrap_or(4096))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn page_sizes_are_told_from_what_follows(blocks in blocks(false), flush: bool, piece in 1usize..100) {
        let stream = write(&Configuration::new("microvm"), Some(summary(&blocks)), &blocks, flush);
        prop_assert_eq!(read(&stream, piece)?, blocks);
    }

    #[test]
    fn page_sizes_are_told_from_addresses(blocks in blocks(true), flush: bool, piece in 1usize..100) {
        let stream = write(&capabilities(&["x-ignore-shared"]), Some(summary(&blocks)), &blocks, flush);
        prop_assert_eq!(read(&stream, piece)?, blocks);
    }

    #[test]
    fn without_advice_there_are_no_page_sizes(mut blocks in blocks(true), piece in 1usize..100) {
        blocks.iter_mut().for_each(|block| block.page_size = None);
        let stream = write(&capabilities(&["x-ignore-shared"]), None, &blocks, false);
        prop_assert_eq!(read(&stream, piece)?, blocks);
    }

    #[test]
    fn mapped_ram_blocks_jump_over_bitmap_and_pages(
        lengths in vec(1u64..300, 1..4),
        address: bool,
        offset in prop_oneof![Just(0u64), Just(0x1234)],
        piece in 1usize..5000,
    ) {
        let stream = mapped_ram(&lengths, address, offset);
        let mut decoder = Decoder::new(DecoderOptions { offset, ..DecoderOptions::default() });
        let pumped = pump(&mut decoder, &stream, || piece)?;
        prop_assert_eq!(pumped.bytes, stream);
        let found: Vec<u64> = decoder.ram_blocks().iter().map(|(_, block)| block.used_length >> 12).collect();
        prop_assert_eq!(found, lengths);
    }
}

/// A mapped-ram file without its first `offset` bytes, with areas where QEMU puts them.
fn mapped_ram(lengths: &[u64], address: bool, offset: u64) -> Vec<u8> {
    let configuration = capabilities(if address { &["x-ignore-shared", "mapped-ram"] } else { &["mapped-ram"] });
    let mut stream = StreamWriter::default();
    stream.header(Some(&configuration)).unwrap();
    stream.section_start(&header(1, "ram", 4)).unwrap();
    let total = lengths.iter().sum::<u64>() << 12;
    stream.event(&Event::Ram(RamRecord::MemSize { total })).unwrap();
    for (i, pages) in lengths.iter().enumerate() {
        let block = RamBlock {
            address: address.then_some(0),
            ..RamBlock::new(CountedString::new(format!("block {i}")).unwrap(), pages << 12)
        };
        let words = block.name.wire_len() as u64 + 8 + if address { 8 } else { 0 };
        let bitmap_offset = offset + stream.bytes().len() as u64 + words + MappedRamHeader::LEN;
        let pages_offset = (bitmap_offset + pages.div_ceil(64) * 8).next_multiple_of(1 << 20);
        let mapped_ram = Some(MappedRamHeader { page_size: 4096, bitmap_offset, pages_offset });
        stream.event(&Event::Ram(RamRecord::Block(RamBlock { mapped_ram, ..block }))).unwrap();
        stream.payload(&vec![0x11; (pages_offset + (pages << 12) - bitmap_offset) as usize]).unwrap();
    }
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.eof().unwrap();
    stream.take()
}

#[test]
fn mapped_ram_headers_must_make_sense() {
    let refused = |change: fn(&mut MappedRamHeader)| {
        let mut header_value = MappedRamHeader { page_size: 4096, bitmap_offset: 200, pages_offset: 1 << 20 };
        change(&mut header_value);
        let mut stream = StreamWriter::unchecked(Encoder::default(), true);
        stream.header(Some(&capabilities(&["mapped-ram"]))).unwrap();
        stream.section_start(&header(1, "ram", 4)).unwrap();
        let block = RamBlock { mapped_ram: Some(header_value), ..RamBlock::new(name("pc.ram"), 1 << 30) };
        stream.ram_setup([block]).unwrap();
        let error = read(&stream.take(), 1000).unwrap_err();
        assert_eq!(error.path.to_string(), "section 1 'ram' › block 'pc.ram'");
        match error.kind {
            ErrorKind::Ram(kind) => kind,
            other => panic!("{other:?}"),
        }
    };
    let offset = |kind: RamError| match kind {
        RamError::MappedRamOffset { what, .. } => what,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        refused(|header| header.page_size = 8192),
        RamError::MappedRamPageSize { found: 8192, expected: 4096 }
    ));
    assert_eq!(offset(refused(|header| header.bitmap_offset = 10)), "bitmap");
    assert_eq!(offset(refused(|header| header.bitmap_offset = u64::MAX)), "pages");
    assert_eq!(offset(refused(|header| header.pages_offset = 4096)), "pages");
    assert_eq!(offset(refused(|header| header.pages_offset += 1)), "pages");
    assert_eq!(offset(refused(|header| header.pages_offset = u64::MAX << 12)), "pages");
}

#[test]
fn page_records_are_no_part_of_a_mapped_ram_file() {
    let mut stream = mapped_ram(&[1], false, 0);
    let end = stream.len() - 14; // EOS, footer and end
    for (flags, named) in [(0x08u8, true), (0x02, true), (0x200u16 as u8, false), (0x22, false)] {
        stream.truncate(end);
        let word = if flags == 0 { 0x200u64 } else { flags.into() };
        stream.extend(word.to_be_bytes());
        if named {
            stream.extend(b"\x07block 0");
        }
        let error = read(&stream, 1 << 20).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Ram(RamError::InMappedRam { found: word }));
        assert_eq!(error.offset, end as u64);
    }
}
