//! The encoder of the main channel: events in, bytes out. The mirror of [`decode`](crate::decode).

mod error;
mod stream;
mod taken;

pub use error::WriteError;
pub use stream::StreamWriter;

use crate::Error;
use crate::event::Event;
use crate::framing::{self, SectionHeader};
use crate::ram::{self, BlockId, RamBlocks};
use qevm_wire::{PageGeometry, Writer};

/// Writes the events of a main channel as bytes.
///
/// Payload is not the encoder's: the caller writes it after its event. What a
/// [`Decoder`](crate::Decoder) gave is written as it was read, byte for byte.
///
/// ```
/// use qevm_savevm::{Encoder, Event, command::Command};
/// use qevm_wire::Writer;
///
/// let mut writer = Writer::new();
/// Encoder::default().encode(&Event::Command(Command::Ping(1)), &mut writer)?;
/// assert_eq!(writer.as_bytes(), b"\x08\0\x02\0\x04\0\0\0\x01");
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Encoder {
    pages: PageGeometry,
    blocks: RamBlocks,
    current: Option<BlockId>,
}

impl Encoder {
    /// As [`Decoder::set_page_geometry`](crate::Decoder::set_page_geometry).
    pub fn set_page_geometry(&mut self, pages: PageGeometry) {
        self.pages = pages;
    }
}

impl Default for Encoder {
    /// An encoder for pages of 4096 bytes.
    fn default() -> Self {
        Self::new(PageGeometry::X86)
    }
}

impl Encoder {
    /// An encoder for target pages of this size, where the configuration section tells of no other.
    pub fn new(pages: PageGeometry) -> Self {
        Encoder { pages, blocks: RamBlocks::default(), current: None }
    }

    /// An encoder for a connection on which a broken postcopy goes on, or for the content of a package: RAM blocks are
    /// known, and the first page record must carry its block's name.
    #[must_use]
    pub fn recovery(&self) -> Encoder {
        Encoder { current: None, ..self.clone() }
    }

    /// The RAM blocks written so far.
    pub fn ram_blocks(&self) -> &RamBlocks {
        &self.blocks
    }

    /// The block of the last page record, which the next one may leave out.
    pub fn current_block(&self) -> Option<BlockId> {
        self.current
    }

    /// Appends `event` to `writer`, without its payload.
    ///
    /// # Errors
    /// A value that the wire has no room for, or a RAM record that no decoder would accept: always of
    /// [`Fault::Misuse`](qevm_wire::Fault). Nothing is appended then. Offsets in errors are those in `writer`.
    pub fn encode(&mut self, event: &Event<'_>, writer: &mut Writer) -> Result<(), Error> {
        self.append(event, writer).map_err(error::misuse)
    }

    #[inline]
    fn append(&mut self, event: &Event<'_>, writer: &mut Writer) -> Result<(), Error> {
        match event {
            Event::Ram(record) => ram::encode(record, &mut self.blocks, &mut self.current, self.pages, writer)?,
            Event::Header => drop(writer.be32(framing::MAGIC).be32(framing::VERSION)),
            Event::Configuration(configuration) => {
                configuration.encode(writer)?;
                self.pages = configuration.page_geometry().unwrap_or(self.pages);
            }
            Event::Section { kind, header } => section(kind.type_byte(), header, writer),
            Event::SectionPart { kind, section_id } => drop(writer.u8(kind.type_byte()).be32(*section_id)),
            Event::SectionFooter { section_id, present: true } => drop(writer.u8(framing::FOOTER).be32(*section_id)),
            Event::SectionFooter { present: false, .. } => {}
            Event::Vfio(record) => record.encode(writer),
            Event::DirtyBitmap(chunk) => chunk.encode(writer),
            Event::BlockMigration(record) => record.encode(writer)?,
            Event::HashTable(record) => record.encode(writer),
            Event::StorageAttributes(record) => record.encode(writer),
            Event::Body(bytes) => drop(writer.bytes(bytes)),
            Event::Command(command) => command.encode(writer)?,
            Event::Eof => drop(writer.u8(framing::EOF)),
            Event::VmDescription { len } => drop(writer.u8(framing::VMDESCRIPTION).be32(*len)),
        }
        Ok(())
    }
}

fn section(type_byte: u8, header: &SectionHeader, writer: &mut Writer) {
    writer.u8(type_byte).be32(header.section_id).counted_string(&header.idstr);
    writer.be32(header.instance_id).be32(header.version_id);
}
