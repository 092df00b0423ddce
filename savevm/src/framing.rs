//! The numbers that frame the main channel, and the section header.
//!
//! Unless a constant says otherwise it holds for every release examined (QEMU 5.2, 7.2, 10.0, 11.1).

use qevm_wire::CountedString;

/// The first four bytes of a stream, `QEVM`.
pub const MAGIC: u32 = 0x5145_564d;
/// The stream version after the magic. Version 2 is older than any release here and refused by all of them.
pub const VERSION: u32 = 3;

/// Type byte: end of the stream.
pub const EOF: u8 = 0x00;
/// Type byte: first section of an iterable handler.
pub const SECTION_START: u8 = 0x01;
/// Type byte: a further section of an iterable handler.
pub const SECTION_PART: u8 = 0x02;
/// Type byte: last section of an iterable handler.
pub const SECTION_END: u8 = 0x03;
/// Type byte: the only section of a device.
pub const SECTION_FULL: u8 = 0x04;
/// Type byte inside vmstate: a subsection follows.
pub const SUBSECTION: u8 = 0x05;
/// Type byte: the JSON description after the end of the stream (2.2).
pub const VMDESCRIPTION: u8 = 0x06;
/// Type byte: the configuration section (2.4).
pub const CONFIGURATION: u8 = 0x07;
/// Type byte: a command (2.5).
pub const COMMAND: u8 = 0x08;
/// First byte of a section footer (2.4; absent with `migration.send-section-footer=off`).
pub const FOOTER: u8 = 0x7e;

/// Which of the four kinds a section is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// START: names an iterable handler and carries its set-up.
    Start,
    /// PART: one round of an iterable handler.
    Part,
    /// END: the last round of an iterable handler, sent when the guest has stopped.
    End,
    /// FULL: everything of one device.
    Full,
}

impl SectionKind {
    /// The type byte on the wire.
    pub fn type_byte(self) -> u8 {
        match self {
            SectionKind::Start => SECTION_START,
            SectionKind::Part => SECTION_PART,
            SectionKind::End => SECTION_END,
            SectionKind::Full => SECTION_FULL,
        }
    }

    /// The name used for this kind in messages: `START`, `PART`, `END` or `FULL`.
    pub fn as_str(self) -> &'static str {
        match self {
            SectionKind::Start => "START",
            SectionKind::Part => "PART",
            SectionKind::End => "END",
            SectionKind::Full => "FULL",
        }
    }
}

/// What START and FULL say about the section they open; PART and END refer to it by `section_id`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SectionHeader {
    /// The source's registration number of the handler. Gaps are normal, and the number means nothing elsewhere.
    pub section_id: u32,
    /// The handler's name, e.g. `ram` or `0000:00:03.0/e1000e`.
    pub idstr: CountedString,
    /// Tells handlers of the same name apart.
    pub instance_id: u32,
    /// Version of the content.
    pub version_id: u32,
}

impl SectionHeader {
    /// The header of the only handler of this name, whose instance is 0.
    ///
    /// ```
    /// let ram = qevm_savevm::framing::SectionHeader::new(2, "ram".try_into()?, 4);
    /// assert_eq!((ram.section_id, ram.instance_id, ram.version_id), (2, 0, 4));
    /// # Ok::<(), qevm_wire::NameLength>(())
    /// ```
    pub fn new(section_id: u32, idstr: CountedString, version_id: u32) -> Self {
        SectionHeader { section_id, idstr, instance_id: 0, version_id }
    }

    /// True if both name the same handler: START and FULL of one handler differ in nothing else that tells it apart.
    pub(crate) fn is_same_handler(&self, other: &SectionHeader) -> bool {
        self.idstr == other.idstr && self.instance_id == other.instance_id
    }

    /// Which codec the content of a section of this name has.
    pub fn content(&self) -> Content {
        match self.idstr.as_bytes() {
            b"ram" => Content::Ram,
            b"dirty-bitmap" => Content::DirtyBitmap,
            b"block" => Content::BlockMigration,
            b"spapr/htab" => Content::HashTable,
            b"s390-storage_attributes" => Content::StorageAttributes,
            b"vfio" => Content::Vfio,
            name if name.ends_with(b"/vfio") => Content::Vfio,
            _ => Content::Opaque,
        }
    }
}

/// The codec of a section's content, which follows from its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Content {
    /// [`RamRecord`](crate::ram::RamRecord)s.
    Ram,
    /// [`VfioRecord`](crate::vfio::VfioRecord)s.
    Vfio,
    /// [`Chunk`](crate::dirty_bitmap::Chunk)s.
    DirtyBitmap,
    /// [`BlockRecord`](crate::block_migration::BlockRecord)s.
    BlockMigration,
    /// [`HashTableRecord`](crate::hash_table::HashTableRecord)s.
    HashTable,
    /// [`StorageAttributesRecord`](crate::storage_attributes::StorageAttributesRecord)s.
    StorageAttributes,
    /// Bytes whose length the wire does not tell: a device's vmstate, or a handler unknown here.
    Opaque,
}

impl Content {
    /// The only `version_id` that QEMU 5.2 to 11.1 use for this content; `None` where the device decides.
    pub fn version_id(self) -> Option<u32> {
        match self {
            Content::Ram => Some(4),
            Content::Vfio | Content::DirtyBitmap | Content::BlockMigration => Some(1),
            Content::HashTable | Content::StorageAttributes | Content::Opaque => None,
        }
    }
}
