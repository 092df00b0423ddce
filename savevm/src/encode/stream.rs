//! A main channel written step by step: what a source VMM uses.

use super::taken::Taken;
use super::{Encoder, WriteError};
use crate::Error;
use crate::command::Command;
use crate::configuration::Configuration;
use crate::event::Event;
use crate::framing::{SectionHeader, SectionKind};
use crate::ram::{BlockId, PageAt, RamBlock, RamBlocks, RamRecord};
use qevm_wire::{Located, WireError, Writer};

/// Writes a main channel step by step into a buffer of its own: an [`Encoder`] that knows which section is open and
/// which RAM block the last page was in.
///
/// The caller sends [`bytes`](StreamWriter::bytes) and calls [`clear`](StreamWriter::clear) whenever it likes, at the
/// latest before payload that it sends from elsewhere (pages straight from guest memory).
///
/// ```
/// use qevm_savevm::{StreamWriter, configuration::Configuration, ram::{BlockId, RamBlock}};
/// use qevm_savevm::framing::SectionHeader;
/// use qevm_wire::CountedString;
///
/// let name = |name: &str| CountedString::new(name).unwrap();
/// let ram = SectionHeader { section_id: 2, idstr: name("ram"), instance_id: 0, version_id: 4 };
///
/// let mut stream = StreamWriter::default();
/// stream.header(Some(&Configuration::new("microvm")))?;
/// stream.section_start(&ram)?;
/// stream.ram_setup([RamBlock::new(name("microvm.ram"), 0x2000)])?;
/// stream.eos()?;
/// stream.footer()?;
/// stream.section_end(2)?;
/// stream.page_header(BlockId(0), 0)?;
/// stream.payload(&[0xaa; 4096])?; // or sent from guest memory, after bytes()
/// stream.zero_page(BlockId(0), 0x1000)?; // the same block: its name is left out
/// stream.eos()?;
/// stream.footer()?;
/// stream.eof()?;
/// assert_eq!(stream.bytes()[..8], *b"QEVM\0\0\0\x03");
/// // What no decoder takes is refused, and is the caller's fault.
/// assert_eq!(stream.section_part(2).unwrap_err().fault(), qevm_wire::Fault::Misuse);
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StreamWriter {
    encoder: Encoder,
    footers: bool,
    writer: Writer,
    section: Option<u32>,
    /// What was written so far, as a decoder takes it; `None` for who wants to write what none takes.
    taken: Option<Taken>,
}

impl Default for StreamWriter {
    /// A writer with footers, for pages of 4096 bytes.
    fn default() -> Self {
        Self::new(Encoder::default(), true)
    }
}

impl StreamWriter {
    /// A writer of what `encoder` writes, with or without footers
    /// ([`Profile::send_section_footer`](qevm_wire::Profile)).
    pub fn new(encoder: Encoder, footers: bool) -> Self {
        let taken = Some(Taken::new(encoder.pages, footers));
        StreamWriter { encoder, footers, writer: Writer::new(), section: None, taken }
    }

    /// A writer of anything, to write a piece of a stream, or a wrong one for a test: what no decoder takes is not
    /// refused, but for what has no form on the wire.
    pub fn unchecked(encoder: Encoder, footers: bool) -> Self {
        StreamWriter { encoder, footers, writer: Writer::new(), section: None, taken: None }
    }

    /// What was written since the last [`clear`](StreamWriter::clear).
    pub fn bytes(&self) -> &[u8] {
        self.writer.as_bytes()
    }

    /// Forgets what was written, which the caller has sent, and keeps the allocation.
    pub fn clear(&mut self) {
        self.writer.clear();
    }

    /// Takes what was written.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.writer).into_bytes()
    }

    /// The RAM blocks of [`ram_setup`](StreamWriter::ram_setup).
    pub fn ram_blocks(&self) -> &RamBlocks {
        self.encoder.ram_blocks()
    }

    /// The block of the last page record.
    pub fn current_block(&self) -> Option<BlockId> {
        self.encoder.current_block()
    }

    /// A writer for the content of a package, to be given to [`package`](StreamWriter::package).
    #[must_use]
    pub fn package_writer(&self) -> StreamWriter {
        let taken = self.taken.as_ref().map(Taken::package);
        StreamWriter { taken, ..StreamWriter::unchecked(self.encoder.recovery(), self.footers) }
    }

    /// A writer for the preempt channel of postcopy (7.1): records of pages alone, of the RAM blocks of `self`. The
    /// first carries its block's name.
    #[must_use]
    pub fn preempt_writer(&self) -> StreamWriter {
        StreamWriter::unchecked(self.encoder.recovery(), false)
    }

    /// A writer for the connection on which a broken postcopy goes on: it has no header, and sections and RAM blocks
    /// are those of `self`.
    #[must_use]
    pub fn recovery(&self) -> StreamWriter {
        let taken = self.taken.as_ref().map(Taken::recovery);
        StreamWriter { taken, ..StreamWriter::unchecked(self.encoder.recovery(), self.footers) }
    }

    /// Appends payload of the last event, or a whole package. Payload goes through here as a whole or not at all: what
    /// the caller sends from elsewhere is taken for sent when the next event is written.
    ///
    /// # Errors
    /// [`WriteError::PayloadInExcess`].
    pub fn payload(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if let Some(taken) = &mut self.taken {
            taken.payload(bytes.len() as u64, self.writer.len() as u64)?;
        }
        self.writer.bytes(bytes);
        Ok(())
    }

    /// Appends any event. The other methods are short forms of this one.
    ///
    /// # Errors
    /// [`WriteError`] for what no [`Decoder`](crate::Decoder) takes here, such as a section of
    /// an id that was not opened, or anything after the end; those of [`Encoder::encode`]. All other methods likewise.
    /// Nothing is written then, and the writer can go on.
    pub fn event(&mut self, event: &Event<'_>) -> Result<(), Error> {
        let at = self.writer.len();
        let Some(taken) = &mut self.taken else {
            self.encoder.encode(event, &mut self.writer)?;
            self.entered(event);
            return Ok(());
        };
        // What the encoder remembers of an event that is refused must go.
        let changes = |event: &Event<'_>| {
            matches!(event, Event::Configuration(_) | Event::Ram(RamRecord::MemSize { .. } | RamRecord::Block(_)))
        };
        let (current, whole) = (self.encoder.current, changes(event).then(|| self.encoder.clone()));
        let encoded = self.encoder.encode(event, &mut self.writer);
        let written = &self.writer.as_bytes()[at.min(self.writer.len())..];
        let taken = encoded.and_then(|()| taken.event(event, written, at as u64));
        if let Err(error) = taken {
            self.encoder = whole.unwrap_or_else(|| Encoder { current, ..self.encoder.clone() });
            self.writer.truncate(at);
            return Err(error);
        }
        self.entered(event);
        Ok(())
    }

    fn entered(&mut self, event: &Event<'_>) {
        match event {
            Event::Section { header: SectionHeader { section_id, .. }, .. } | Event::SectionPart { section_id, .. } => {
                self.section = Some(*section_id)
            }
            Event::SectionFooter { .. } => self.section = None,
            _ => {}
        }
    }

    /// Magic and version, and the configuration section if the machine type sends one.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn header(&mut self, configuration: Option<&Configuration>) -> Result<(), Error> {
        self.event(&Event::Header)?;
        configuration.map_or(Ok(()), |configuration| self.event(&Event::Configuration(configuration.clone())))
    }

    /// Opens a START section.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn section_start(&mut self, header: &SectionHeader) -> Result<(), Error> {
        self.event(&Event::Section { kind: SectionKind::Start, header: header.clone() })
    }

    /// Opens a PART section.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn section_part(&mut self, section_id: u32) -> Result<(), Error> {
        self.event(&Event::SectionPart { kind: SectionKind::Part, section_id })
    }

    /// Opens an END section.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn section_end(&mut self, section_id: u32) -> Result<(), Error> {
        self.event(&Event::SectionPart { kind: SectionKind::End, section_id })
    }

    /// A whole FULL section: header, content and footer.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn section_full(&mut self, header: &SectionHeader, body: &[u8]) -> Result<(), Error> {
        self.event(&Event::Section { kind: SectionKind::Full, header: header.clone() })?;
        self.event(&Event::Body(body))?;
        self.footer()
    }

    /// Closes the open section, with a footer if the stream has them; nothing if none is open.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn footer(&mut self) -> Result<(), Error> {
        let present = self.footers;
        self.section.map_or(Ok(()), |section_id| self.event(&Event::SectionFooter { section_id, present }))
    }

    /// The list of RAM blocks, which get the numbers 0, 1, 2… as [`BlockId`].
    ///
    /// # Errors
    /// [`RamError::DuplicateBlock`](crate::ram::RamError::DuplicateBlock), or
    /// [`RamError::Unaligned`](crate::ram::RamError::Unaligned) if a length is not whole pages.
    pub fn ram_setup(&mut self, blocks: impl IntoIterator<Item = RamBlock>) -> Result<(), Error> {
        let blocks: Vec<RamBlock> = blocks.into_iter().collect();
        let total = blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.used_length)).ok_or_else(|| {
            let kind = WireError::TooLong { what: "sum of RAM block lengths", found: u64::MAX, max: u64::MAX };
            Located::new(kind.into(), self.writer.len() as u64)
        })?;
        self.event(&Event::Ram(RamRecord::MemSize { total }))?;
        blocks.into_iter().try_for_each(|block| self.event(&Event::Ram(RamRecord::Block(block))))?;
        self.event(&Event::Ram(RamRecord::EndOfBlocks))
    }

    /// The record of a page whose bytes the caller sends next. `offset` is that of the page in its block.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn page_header(&mut self, block: BlockId, offset: u64) -> Result<(), Error> {
        let page = self.place(block, offset);
        self.event(&Event::Ram(RamRecord::Page(page)))
    }

    /// The record of a page of zeroes.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn zero_page(&mut self, block: BlockId, offset: u64) -> Result<(), Error> {
        let page = self.place(block, offset);
        self.event(&Event::Ram(RamRecord::Zero(page)))
    }

    /// A page and its content, which is copied: as a page of zeroes if it is one. Content that is not to be copied is
    /// sent after [`page_header`](StreamWriter::page_header).
    ///
    /// # Errors
    /// [`WriteError::PayloadMissing`] and [`WriteError::PayloadInExcess`] if `content` is not one target page; see
    /// [`event`](StreamWriter::event).
    ///
    /// ```
    /// use qevm_savevm::{StreamWriter, framing::SectionHeader, ram::{BlockId, RamBlock}};
    ///
    /// let mut stream = StreamWriter::default();
    /// stream.header(None)?;
    /// stream.section_start(&SectionHeader::new(2, "ram".try_into()?, 4))?;
    /// stream.ram_setup([RamBlock::new("pc.ram".try_into()?, 0x2000)])?;
    /// let before = stream.bytes().len();
    /// stream.page(BlockId(0), 0, &[0; 4096])?; // word, name and a zero
    /// assert_eq!(stream.bytes().len() - before, 8 + 7 + 1);
    /// stream.page(BlockId(0), 0x1000, &[1; 4096])?; // word and content
    /// assert_eq!(stream.bytes().len() - before, 16 + 8 + 4096);
    /// assert!(stream.page(BlockId(0), 0, &[1; 100]).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn page(&mut self, block: BlockId, offset: u64, content: &[u8]) -> Result<(), Error> {
        let (found, size) = (content.len() as u64, self.encoder.pages.size());
        if found != size {
            let missing = WriteError::PayloadMissing { remaining: size.saturating_sub(found) };
            let kind = if found < size { missing } else { WriteError::PayloadInExcess { found, remaining: size } };
            return Err(Located::new(kind.into(), self.writer.len() as u64));
        }
        if content.iter().all(|byte| *byte == 0) {
            return self.zero_page(block, offset);
        }
        self.page_header(block, offset)?;
        self.payload(content)
    }

    /// The record of a page as difference to what was sent of it before; see [`xbzrle`](crate::xbzrle).
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn xbzrle_page(&mut self, block: BlockId, offset: u64, data: &[u8]) -> Result<(), Error> {
        let page = self.place(block, offset);
        self.event(&Event::Ram(RamRecord::Xbzrle { page, data }))
    }

    /// The record that makes the destination wait for the SYNC packets of all page channels.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn multifd_flush(&mut self) -> Result<(), Error> {
        self.event(&Event::Ram(RamRecord::MultifdFlush))
    }

    /// The end of the content of a `ram` section.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn eos(&mut self) -> Result<(), Error> {
        self.event(&Event::Ram(RamRecord::EndOfSection))
    }

    /// Ends the open `ram` section: [`eos`](StreamWriter::eos) and [`footer`](StreamWriter::footer).
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn end_ram(&mut self) -> Result<(), Error> {
        self.eos()?;
        self.footer()
    }

    /// A command.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn command(&mut self, command: Command) -> Result<(), Error> {
        self.event(&Event::Command(command))
    }

    /// A package of sections and commands, written by a [`package_writer`](StreamWriter::package_writer).
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it is 4 GiB or more.
    pub fn package(&mut self, package: &[u8]) -> Result<(), Error> {
        let len = self.length32("package length", package.len())?;
        self.command(Command::Packaged { len })?;
        self.payload(package)
    }

    /// The end of the stream.
    ///
    /// # Errors
    /// See [`event`](StreamWriter::event).
    pub fn eof(&mut self) -> Result<(), Error> {
        self.event(&Event::Eof)
    }

    /// The JSON description after the end.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it is 4 GiB or more.
    pub fn vmdesc(&mut self, json: &str) -> Result<(), Error> {
        let len = self.length32("description length", json.len())?;
        self.event(&Event::VmDescription { len })?;
        self.payload(json.as_bytes())
    }

    /// Names the block only where it is not that of the page before, as QEMU does.
    fn place(&self, block: BlockId, offset: u64) -> PageAt {
        PageAt { block, offset, named: self.encoder.current_block() != Some(block) }
    }

    fn length32(&self, what: &'static str, len: usize) -> Result<u32, Error> {
        u32::try_from(len).map_err(|_| {
            let kind = WireError::TooLong { what, found: len as u64, max: u32::MAX.into() };
            Located::new(kind.into(), self.writer.len() as u64)
        })
    }
}
