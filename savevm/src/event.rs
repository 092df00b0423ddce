//! What a main channel consists of: the events that [`Decoder`](crate::Decoder) gives and
//! [`Encoder`](crate::Encoder) takes.

use crate::block_migration::BlockRecord;
use crate::command::Command;
use crate::configuration::Configuration;
use crate::dirty_bitmap::Chunk;
use crate::framing::{SectionHeader, SectionKind};
use crate::hash_table::HashTableRecord;
use crate::ram::{BlockId, RamRecord};
use crate::storage_attributes::StorageAttributesRecord;
use crate::vfio::VfioRecord;

pub use qevm_wire::Step;

/// One item of the main channel.
///
/// The items of a stream in order, encoded one after the other with their payloads, are the bytes of the stream.
/// Payload is what follows an event without being part of it; [`Event::payload_len`] tells how much, but for
/// mapped-ram blocks, where it depends on the place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Magic and version.
    Header,
    /// The configuration section.
    Configuration(Configuration),
    /// START (`kind` is [`SectionKind::Start`]) or FULL.
    Section {
        /// START or FULL.
        kind: SectionKind,
        /// What is opened.
        header: SectionHeader,
    },
    /// PART (`kind` is [`SectionKind::Part`]) or END of a section that a START opened.
    SectionPart {
        /// PART or END.
        kind: SectionKind,
        /// The section.
        section_id: u32,
    },
    /// A record of the `ram` section.
    Ram(RamRecord<'a>),
    /// A record of a VFIO section.
    Vfio(VfioRecord),
    /// A chunk of the `dirty-bitmap` section.
    DirtyBitmap(Chunk),
    /// A record of the `block` section.
    BlockMigration(BlockRecord),
    /// A record of the `spapr/htab` section.
    HashTable(HashTableRecord),
    /// A record of the `s390-storage_attributes` section.
    StorageAttributes(StorageAttributesRecord),
    /// Content whose layout the wire does not tell: the vmstate of a device, or the section of a handler that is
    /// unknown here.
    Body(&'a [u8]),
    /// A section is over.
    SectionFooter {
        /// The section.
        section_id: u32,
        /// The footer is on the wire. Otherwise the stream has none, and this event takes no bytes.
        present: bool,
    },
    /// A command. After [`Command::Packaged`] the package is the payload.
    Command(Command),
    /// The end of the stream; only a description may follow.
    Eof,
    /// The JSON description, whose `len` bytes follow as payload.
    VmDescription {
        /// Length in bytes.
        len: u32,
    },
}

/// What the payload of a main channel or a preempt channel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PayloadKind {
    /// A page of guest memory.
    Page {
        /// The RAM block.
        block: BlockId,
        /// Where in the block the page is, in bytes.
        offset: u64,
    },
    /// The page bitmap and the pages of the RAM block that was listed last, each at its place in a mapped-ram file.
    MappedPages,
    /// The data of a VFIO device.
    DeviceData {
        /// The device's section.
        section_id: u32,
    },
    /// Bits of a dirty bitmap of a disk.
    DirtyBitmap,
    /// Sectors of a disk.
    DiskSectors,
    /// Entries of a hash page table.
    HashTableEntries,
    /// Attributes of pages.
    StorageAttributes,
    /// A package: sections that a decoder of their own reads, from [`Decoder::nested`](crate::Decoder::nested).
    Package,
    /// The JSON description.
    Description,
}

impl Event<'_> {
    /// How many bytes of payload follow the event; `None` for a mapped-ram block, where
    /// [`Decoder::payload_remaining`](qevm_wire::Decode::payload_remaining) tells. `page_size` is that of a target
    /// page.
    pub fn payload_len(&self, page_size: u64) -> Option<u64> {
        match self {
            Event::Ram(RamRecord::Page(_)) => Some(page_size),
            Event::Ram(RamRecord::Block(block)) if block.mapped_ram.is_some() => None,
            Event::Vfio(VfioRecord::Data { len }) => Some(*len),
            Event::DirtyBitmap(chunk) => Some(chunk.payload()),
            Event::BlockMigration(record) => Some(record.payload()),
            Event::HashTable(record) => Some(record.payload()),
            Event::StorageAttributes(record) => Some(record.payload()),
            Event::Command(Command::Packaged { len }) | Event::VmDescription { len } => Some((*len).into()),
            _ => Some(0),
        }
    }
}
