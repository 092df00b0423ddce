//! Random streams: every kind of item, with random but legal values.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use qevm_savevm::StreamWriter;
use qevm_savevm::block_migration::{BLOCK_LEN, BlockRecord};
use qevm_savevm::command::{Command, DiscardRange, PostcopyAdvise, RamDiscard};
use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_savevm::dirty_bitmap::{Chunk, ChunkContent};
use qevm_savevm::event::Event;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::hash_table::HashTableRecord;
use qevm_savevm::ram::{BlockId, PageAt, RamBlock, RamRecord};
use qevm_savevm::storage_attributes::StorageAttributesRecord;
use qevm_savevm::vfio::VfioRecord;
use qevm_wire::CountedString;

/// RAM blocks of every random stream and their lengths in pages.
pub(crate) const BLOCKS: [(&str, u64); 3] =
    [("pc.ram", 64), ("0000:00:02.0/vga.vram", 16), ("/rom@etc/acpi/tables", 1)];

pub(crate) const RAM: u32 = 2;
pub(crate) const VFIO: u32 = 5;
pub(crate) const BITMAPS: u32 = 3;
pub(crate) const DISKS: u32 = 1;
pub(crate) const OTHER: u32 = 4;
pub(crate) const HASH_TABLE: u32 = 6;
pub(crate) const ATTRIBUTES: u32 = 7;
/// Log2 of the bytes of the hash page table: 2 MiB.
const HASH_TABLE_SHIFT: u32 = 21;
const HASH_TABLE_ENTRIES: u32 = 1 << (HASH_TABLE_SHIFT - 4);

pub(crate) fn name(text: &str) -> CountedString {
    CountedString::new(text).unwrap()
}

pub(crate) fn header(section_id: u32, idstr: &str, version_id: u32) -> SectionHeader {
    SectionHeader { section_id, idstr: name(idstr), instance_id: 0, version_id }
}

/// One thing that a stream can do between its set-up and its end.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Ram { end: bool, records: Vec<Record> },
    Vfio { end: bool, data: Vec<Vec<u8>>, init_data_sent: bool },
    VfioFull { config: Option<Vec<u8>>, ready: bool, end_of_state: bool },
    Bitmaps { chunks: Vec<Chunk>, bits: Vec<u8> },
    Disks(Vec<BlockRecord>),
    HashTable { end: bool, gone: bool, chunks: Vec<(u32, u16, u16)> },
    Attributes { end: bool, done: bool, pages: Vec<(u64, Vec<u8>)> },
    Other { end: bool, body: Vec<u8> },
    Device { header: SectionHeader, body: Vec<u8> },
    Command(Command),
    Package(Vec<Item>),
}

/// A record of a page in RAM, or another one.
#[derive(Debug, Clone)]
pub(crate) enum Record {
    Page { block: u32, page: u64, named: bool, kind: PageKind },
    Flush,
}

#[derive(Debug, Clone)]
pub(crate) enum PageKind {
    Zero,
    Plain(u8),
    Xbzrle(Vec<u8>),
    Compressed(Vec<u8>),
}

pub(crate) fn bytes(len: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..len)
}

fn any_name() -> impl Strategy<Value = CountedString> {
    vec(any::<u8>(), 1..=255).prop_map(|bytes| CountedString::new(bytes).unwrap())
}

fn record() -> impl Strategy<Value = Record> {
    let kind = prop_oneof![
        4 => Just(PageKind::Zero),
        2 => any::<u8>().prop_map(PageKind::Plain),
        1 => bytes(200).prop_map(PageKind::Xbzrle),
        1 => bytes(200).prop_map(PageKind::Compressed),
    ];
    prop_oneof![
        9 => (0u32..3, any::<u64>(), any::<bool>(), kind).prop_map(|(block, page, named, kind)| {
            Record::Page { block, page: page % BLOCKS[block as usize].1, named, kind }
        }),
        1 => Just(Record::Flush),
    ]
}

pub(crate) fn command() -> impl Strategy<Value = Command> {
    let ranges = vec((0u64..32, 1u64..32), 1..12).prop_map(|ranges| {
        let ranges = ranges.into_iter().map(|(start, len)| DiscardRange { start: start << 12, len: len << 12 });
        Command::RamDiscard(RamDiscard { block: name("pc.ram"), ranges: ranges.collect() })
    });
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        Just(Command::PostcopyAdvise(None)),
        // Without postcopy-ram, so that all RAM records stay legal: the other form has its own test.
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        ranges,
        Just(Command::EnableColo),
        Just(Command::PostcopyResume),
        (0usize..3).prop_map(|block| Command::RecvBitmap(name(BLOCKS[block].0))),
        Just(Command::SwitchoverStart),
    ]
}

pub(crate) fn advise() -> Command {
    Command::PostcopyAdvise(Some(PostcopyAdvise { page_size_summary: 0x1000, target_page_size: 0x1000 }))
}

fn chunk() -> impl Strategy<Value = Chunk> {
    let content = prop_oneof![
        (any::<u32>(), 0u8..8).prop_map(|(granularity, flags)| ChunkContent::Start { granularity, flags }),
        Just(ChunkContent::Complete),
        (any::<u64>(), any::<u32>(), any::<bool>()).prop_map(|(first_sector, sectors, zero)| ChunkContent::Bits {
            first_sector,
            sectors,
            len: (!zero).then_some(0), // the length of the bits is filled in where they are written
        }),
    ];
    (option::of(any_name()), option::of(any_name()), content).prop_map(|(node, bitmap, content)| Chunk::Bitmap {
        node,
        bitmap,
        content,
    })
}

fn disk() -> impl Strategy<Value = BlockRecord> {
    prop_oneof![
        1 => (0u64..1 << 55, any_name()).prop_map(|(sector, device)| BlockRecord::DeviceBlock { sector, device, zero: false }),
        20 => (0u64..1 << 55, any_name()).prop_map(|(sector, device)| BlockRecord::DeviceBlock { sector, device, zero: true }),
        10 => (0u64..1 << 55).prop_map(BlockRecord::Progress),
    ]
}

/// A device whose id and name are none of those used elsewhere.
fn device() -> impl Strategy<Value = Item> {
    ("[a-z0-9:./ -]{1,40}x", any::<u32>(), any::<u32>(), bytes(300)).prop_map(
        |(idstr, instance_id, version_id, body)| {
            let section_id =
                100 + idstr.bytes().fold(instance_id, |id, byte| id.wrapping_mul(31).wrapping_add(byte.into())) / 2;
            Item::Device { header: SectionHeader { section_id, idstr: name(&idstr), instance_id, version_id }, body }
        },
    )
}

fn flat_item() -> impl Strategy<Value = Item> {
    prop_oneof![
        4 => (any::<bool>(), vec(record(), 0..12)).prop_map(|(end, records)| Item::Ram { end, records }),
        1 => (any::<bool>(), vec(bytes(100), 0..3), any::<bool>())
            .prop_map(|(end, data, init_data_sent)| Item::Vfio { end, data, init_data_sent }),
        1 => (option::of(bytes(300)), any::<bool>(), any::<bool>())
            .prop_map(|(config, ready, end_of_state)| Item::VfioFull { config, ready, end_of_state }),
        1 => (vec(chunk(), 0..4), bytes(100)).prop_map(|(chunks, bits)| Item::Bitmaps { chunks, bits }),
        1 => vec(disk(), 0..3).prop_map(Item::Disks),
        1 => (any::<bool>(), prop::bool::weighted(0.1), vec((0..HASH_TABLE_ENTRIES - 100, 0u16..20, 1u16..80), 0..5))
            .prop_map(|(end, gone, chunks)| Item::HashTable { end, gone, chunks }),
        1 => (any::<bool>(), any::<bool>(), vec((any::<u64>(), bytes(200)), 0..4))
            .prop_map(|(end, done, pages)| Item::Attributes { end, done, pages }),
        1 => (any::<bool>(), bytes(100)).prop_map(|(end, body)| Item::Other { end, body }),
        3 => device(),
        3 => command().prop_map(Item::Command),
    ]
}

/// Items in a random order. No source mixes them so, but every reader must take any order.
pub(crate) fn items() -> impl Strategy<Value = Vec<Item>> {
    vec(prop_oneof![12 => flat_item(), 1 => vec(flat_item(), 0..5).prop_map(Item::Package)], 0..12)
}

pub(crate) fn configuration() -> impl Strategy<Value = Option<Configuration>> {
    let subsection = prop_oneof![
        Just(ConfigurationSubsection::TargetPageBits(12)),
        vec(any_name(), 0..4).prop_map(ConfigurationSubsection::Capabilities),
        any::<[u8; 16]>().prop_map(ConfigurationSubsection::Uuid),
    ];
    option::weighted(
        0.9,
        (bytes(60), vec(subsection, 0..4)).prop_map(|(machine, subsections)| Configuration { machine, subsections }),
    )
}

/// A whole stream of these items.
pub(crate) fn write(configuration: Option<&Configuration>, items: &[Item], description: Option<&str>) -> Vec<u8> {
    let mut stream = StreamWriter::default();
    stream.header(configuration).unwrap();
    stream.section_start(&header(OTHER, "cmma", 7)).unwrap();
    stream.event(&Event::Body(b"opaque")).unwrap();
    stream.footer().unwrap();
    for (section_id, idstr, version_id) in [(DISKS, "block", 1), (RAM, "ram", 4), (BITMAPS, "dirty-bitmap", 1)] {
        stream.section_start(&header(section_id, idstr, version_id)).unwrap();
        match section_id {
            RAM => {
                stream.ram_setup(BLOCKS.map(|(block, pages)| RamBlock::new(name(block), pages << 12))).unwrap();
                stream.eos().unwrap();
            }
            DISKS => stream.event(&Event::BlockMigration(BlockRecord::EndOfSection)).unwrap(),
            _ => stream.event(&Event::DirtyBitmap(Chunk::EndOfSection)).unwrap(),
        }
        stream.footer().unwrap();
    }
    stream.section_start(&header(HASH_TABLE, "spapr/htab", 1)).unwrap();
    stream.event(&Event::HashTable(HashTableRecord::Size(HASH_TABLE_SHIFT))).unwrap();
    stream.footer().unwrap();
    stream.section_start(&header(ATTRIBUTES, "s390-storage_attributes", 0)).unwrap();
    stream.event(&Event::StorageAttributes(StorageAttributesRecord::EndOfSection)).unwrap();
    stream.footer().unwrap();
    stream.section_start(&header(VFIO, "0000:00:04.0/vfio", 1)).unwrap();
    stream.event(&Event::Vfio(VfioRecord::Setup)).unwrap();
    stream.event(&Event::Vfio(VfioRecord::EndOfState)).unwrap();
    stream.footer().unwrap();
    let mut names = (None, None);
    for item in items {
        write_item(&mut stream, item, &mut names);
    }
    stream.eof().unwrap();
    if let Some(description) = description {
        stream.vmdesc(description).unwrap();
    }
    stream.take()
}

type Names = (Option<CountedString>, Option<CountedString>);

fn write_item(stream: &mut StreamWriter, item: &Item, names: &mut Names) {
    let event = |stream: &mut StreamWriter, event: Event<'_>| stream.event(&event).unwrap();
    let part = |stream: &mut StreamWriter, end: bool, section_id| {
        let kind = if end { SectionKind::End } else { SectionKind::Part };
        stream.event(&Event::SectionPart { kind, section_id }).unwrap();
    };
    match item {
        Item::Ram { end, records } => {
            part(stream, *end, RAM);
            records.iter().for_each(|record| write_record(stream, record));
            stream.eos().unwrap();
        }
        Item::Vfio { end, data, init_data_sent } => {
            part(stream, *end, VFIO);
            for data in data {
                event(stream, Event::Vfio(VfioRecord::Data { len: data.len() as u64 }));
                stream.payload(data).unwrap();
            }
            let last = if *init_data_sent { VfioRecord::InitDataSent } else { VfioRecord::EndOfState };
            event(stream, Event::Vfio(last));
        }
        Item::VfioFull { config, ready, end_of_state } => {
            let header = header(VFIO, "0000:00:04.0/vfio", 1);
            event(stream, Event::Section { kind: SectionKind::Full, header });
            match config {
                Some(config) => {
                    event(stream, Event::Vfio(VfioRecord::Config));
                    event(stream, Event::Body(config));
                    event(stream, Event::Vfio(VfioRecord::EndOfState));
                }
                None if *ready => {
                    event(stream, Event::Vfio(VfioRecord::ConfigLoadReady));
                    if *end_of_state {
                        event(stream, Event::Vfio(VfioRecord::EndOfState));
                    }
                }
                None => event(stream, Event::Vfio(VfioRecord::EndOfState)),
            }
        }
        Item::Bitmaps { chunks, bits } => {
            part(stream, false, BITMAPS);
            // A package has names of its own.
            for chunk in chunks {
                let Chunk::Bitmap { node, bitmap, content } = chunk.clone() else { continue };
                let node = if names.0.is_none() { Some(node.unwrap_or_else(|| name("node"))) } else { node };
                let bitmap = if names.1.is_none() { Some(bitmap.unwrap_or_else(|| name("bitmap"))) } else { bitmap };
                *names = (node.clone().or(names.0.take()), bitmap.clone().or(names.1.take()));
                let content = match content {
                    ChunkContent::Bits { first_sector, sectors, len: Some(_) } => {
                        ChunkContent::Bits { first_sector, sectors, len: Some(bits.len() as u64) }
                    }
                    content => content,
                };
                event(stream, Event::DirtyBitmap(Chunk::Bitmap { node, bitmap, content }));
                if matches!(content, ChunkContent::Bits { len: Some(_), .. }) {
                    stream.payload(bits).unwrap();
                }
            }
            event(stream, Event::DirtyBitmap(Chunk::EndOfSection));
        }
        Item::Disks(records) => {
            part(stream, false, DISKS);
            for record in records {
                event(stream, Event::BlockMigration(record.clone()));
                if matches!(record, BlockRecord::DeviceBlock { zero: false, .. }) {
                    stream.payload(&vec![0x5a; BLOCK_LEN as usize]).unwrap();
                }
            }
            event(stream, Event::BlockMigration(BlockRecord::EndOfSection));
        }
        Item::HashTable { end, gone: true, .. } => {
            part(stream, *end, HASH_TABLE);
            event(stream, Event::HashTable(HashTableRecord::Size(u32::MAX)));
        }
        Item::HashTable { end, gone: false, chunks } => {
            part(stream, *end, HASH_TABLE);
            event(stream, Event::HashTable(HashTableRecord::Chunks));
            for &(index, valid, invalid) in chunks {
                event(stream, Event::HashTable(HashTableRecord::Chunk { index, valid, invalid }));
                stream.payload(&vec![0xa5; usize::from(valid) * 16]).unwrap();
            }
            event(stream, Event::HashTable(HashTableRecord::EndOfChunks));
        }
        Item::Attributes { end, done, pages } => {
            part(stream, *end, ATTRIBUTES);
            for (address, attributes) in pages {
                let (address, len) = (address & !0xfff, attributes.len() as u64);
                event(stream, Event::StorageAttributes(StorageAttributesRecord::Attributes { address, len }));
                stream.payload(attributes).unwrap();
            }
            if *done {
                event(stream, Event::StorageAttributes(StorageAttributesRecord::Done));
            }
            event(stream, Event::StorageAttributes(StorageAttributesRecord::EndOfSection));
        }
        Item::Other { end, body } => {
            part(stream, *end, OTHER);
            event(stream, Event::Body(body));
        }
        Item::Device { header, body } => stream.section_full(header, body).unwrap(),
        Item::Command(command) => stream.command(command.clone()).unwrap(),
        Item::Package(items) => {
            // A package is a stream of its own: it goes on with the blocks, but neither with the last block of a page
            // nor with names of bitmaps.
            let mut package = stream.package_writer();
            items.iter().for_each(|item| write_item(&mut package, item, &mut (None, None)));
            stream.package(&package.take()).unwrap();
        }
    }
    stream.footer().unwrap();
}

fn write_record(stream: &mut StreamWriter, record: &Record) {
    let Record::Page { block, page, named, kind } = record else {
        return stream.multifd_flush().unwrap();
    };
    let (block, offset) = (BlockId(*block), page << 12);
    let page = PageAt { block, offset, named: *named || stream.current_block() != Some(block) };
    let record = match kind {
        PageKind::Zero => RamRecord::Zero(page),
        PageKind::Plain(_) => RamRecord::Page(page),
        PageKind::Xbzrle(data) => RamRecord::Xbzrle { page, data },
        PageKind::Compressed(data) => RamRecord::Compressed { page, data },
    };
    stream.event(&Event::Ram(record)).unwrap();
    if let PageKind::Plain(fill) = kind {
        stream.payload(&[*fill; 4096]).unwrap();
    }
}
