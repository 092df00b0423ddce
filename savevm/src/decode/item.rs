//! One item of the stream: the state machine behind [`Decoder::next`].

use super::{AfterBody, CurrentSection, Decoder, Footers, Scan, State, StreamError};
use crate::block_migration::BlockRecord;
use crate::command::{Command, RamDiscard};
use crate::configuration::Configuration;
use crate::dirty_bitmap::Chunk;
use crate::event::{Event, PayloadKind};
use crate::framing::{self, Content, SectionHeader, SectionKind};
use crate::hash_table::{self, HashTableRecord};
use crate::ram::{ListWords, RamError, RamRecord, RecordContext};
use crate::storage_attributes::StorageAttributesRecord;
use crate::vfio::{self, VfioRecord};
use crate::{Error, Reader};
use qevm_wire::Located;

impl Decoder {
    /// Reads one item; `None` at the end. Changes the state only on success.
    #[inline]
    pub(super) fn item<'a>(&mut self, reader: &mut Reader<'a>, at_end: bool) -> Result<Option<Event<'a>>, Error> {
        match self.state {
            State::Ram => self.ram_record(reader, at_end).map(Some),
            State::Item => self.section_or_command(reader),
            State::Footer => self.footer(reader, at_end).map(Some),
            State::Body { then, .. } => self.whole_body(reader, then, at_end).map(Some),
            State::Vfio(place) => self.vfio_record(reader, place, at_end).map(Some),
            State::DirtyBitmap => self.dirty_bitmap_chunk(reader).map(Some),
            State::BlockMigration => self.block_record(reader).map(Some),
            State::HashTable(place) => self.hash_table_record(reader, place).map(Some),
            State::StorageAttributes => self.storage_attributes_record(reader).map(Some),
            State::Header => self.header(reader).map(Some),
            State::AfterHeader => self.configuration(reader, at_end),
            State::AfterEof => self.description(reader, at_end),
            State::End => self.end(reader),
        }
    }

    fn header<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Event<'a>, Error> {
        let at = reader.offset();
        let found = reader.be32()?;
        if found != framing::MAGIC {
            return Err(Located::new(StreamError::Magic { found }.into(), at));
        }
        let at = reader.offset();
        let found = reader.be32()?;
        if found != framing::VERSION {
            return Err(Located::new(StreamError::Version { found }.into(), at));
        }
        self.state = State::AfterHeader;
        Ok(Event::Header)
    }

    fn configuration<'a>(&mut self, reader: &mut Reader<'a>, at_end: bool) -> Result<Option<Event<'a>>, Error> {
        if reader.clone().u8()? != framing::CONFIGURATION {
            let event = self.section_or_command(reader)?;
            return Ok(event);
        }
        reader.u8()?;
        let configuration = Configuration::decode(reader, &self.options.limits, at_end)
            .map_err(|error| error.within("configuration section"))?;
        if let Some(pages) = configuration.page_geometry() {
            self.pages = pages;
        }
        self.options.x_ignore_shared |= configuration.has_capability("x-ignore-shared");
        self.options.mapped_ram |= configuration.has_capability("mapped-ram");
        self.state = State::Item;
        Ok(Some(Event::Configuration(configuration)))
    }

    fn section_or_command<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Option<Event<'a>>, Error> {
        if self.package.is_some_and(|package| reader.offset() == package.end) {
            return Ok(None);
        }
        let at = reader.offset();
        let misplaced =
            |found, what, place| Err(Located::new(StreamError::Misplaced { found, what, place }.into(), at));
        match reader.u8()? {
            framing::SECTION_START => self.open(reader, SectionKind::Start).map(Some),
            framing::SECTION_FULL => self.open(reader, SectionKind::Full).map(Some),
            framing::SECTION_PART => self.go_on(reader, SectionKind::Part).map(Some),
            framing::SECTION_END => self.go_on(reader, SectionKind::End).map(Some),
            framing::COMMAND => self.command(reader).map(Some),
            found @ framing::EOF if self.package.is_some() => misplaced(found, "end of stream", "inside a package"),
            framing::EOF => {
                self.section = None;
                let last = !self.options.vmdesc || self.options.live && self.packaged;
                self.state = if last { State::End } else { State::AfterEof };
                Ok(Some(Event::Eof))
            }
            found @ framing::SUBSECTION => misplaced(found, "subsection", "outside a device section"),
            found @ framing::VMDESCRIPTION => misplaced(found, "description", "before the end of the stream"),
            found @ framing::CONFIGURATION => misplaced(found, "configuration section", "not after the header"),
            found => Err(Located::new(StreamError::SectionType { found }.into(), at)),
        }
    }

    /// START and FULL.
    fn open<'a>(&mut self, reader: &mut Reader<'a>, kind: SectionKind) -> Result<Event<'a>, Error> {
        let at = reader.offset();
        let section_id = reader.be32()?;
        let idstr = reader.counted_string("section name")?;
        let instance_id = reader.be32()?;
        let version_at = reader.offset();
        let header = SectionHeader { section_id, idstr, instance_id, version_id: reader.be32()? };
        let content = header.content();
        let path = |error: Located<StreamError>| {
            error.map(Into::into).within(format!("section {section_id} '{}'", header.idstr))
        };
        if let Some(expected) = content.version_id().filter(|expected| *expected != header.version_id) {
            let (idstr, found) = (header.idstr.clone(), header.version_id);
            let kind = StreamError::SectionVersion { idstr, found, expected };
            return Err(path(Located::new(kind, version_at)));
        }
        let known = self.sections.get(section_id);
        if let Some(known) = known.filter(|known| !header.is_same_handler(known)) {
            let (found, known) = (header.idstr.clone(), known.idstr.clone());
            return Err(Located::new(StreamError::SectionIdReused { section_id, found, known }.into(), at));
        }
        self.totals.section(&self.options.limits).map_err(|kind| Located::new(kind.into(), reader.offset()))?;
        self.enter(section_id, content, kind == SectionKind::Start);
        self.sections.open(kind, header.clone());
        Ok(Event::Section { kind, header })
    }

    /// PART and END.
    fn go_on<'a>(&mut self, reader: &mut Reader<'a>, kind: SectionKind) -> Result<Event<'a>, Error> {
        let at = reader.offset();
        let section_id = reader.be32()?;
        let Some(header) = self.sections.started(section_id) else {
            return Err(Located::new(StreamError::UnknownSection { kind, section_id }.into(), at));
        };
        self.enter(section_id, header.content(), false);
        Ok(Event::SectionPart { kind, section_id })
    }

    fn enter(&mut self, id: u32, content: Content, start: bool) {
        self.section = Some(CurrentSection { id, start });
        self.state = match content {
            Content::Ram => State::Ram,
            Content::Vfio => State::Vfio(vfio::Place::default()),
            Content::DirtyBitmap => State::DirtyBitmap,
            Content::BlockMigration => State::BlockMigration,
            Content::HashTable => State::HashTable(hash_table::Place::Start),
            Content::StorageAttributes => State::StorageAttributes,
            Content::Opaque => State::Body { scan: Scan::new(&[], id), then: AfterBody::Footer },
        };
    }

    fn command<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Event<'a>, Error> {
        let at = reader.offset();
        let command = Command::decode(reader, &self.options.limits)?;
        match &command {
            Command::PostcopyAdvise(Some(advise)) => {
                let (found, expected) = (advise.target_page_size, self.pages.size());
                if found != expected {
                    return Err(Located::new(StreamError::AdvisedPageSize { found, expected }.into(), at));
                }
                self.advised_page_sizes = advise.page_size_summary;
            }
            Command::RamDiscard(discard) => self.check_discard(discard, at)?,
            Command::RecvBitmap(name) if self.ram.blocks.find(name.as_bytes()).is_none() => {
                return Err(Located::new(RamError::UnknownBlock { name: name.clone() }.into(), at));
            }
            Command::Packaged { len } => {
                self.totals
                    .package((*len).into(), &self.options.limits)
                    .map_err(|kind| Located::new(kind.into(), at))?;
                self.expect_payload((*len).into(), PayloadKind::Package);
                self.postcopy |= self.advised_page_sizes != 0;
                self.packaged = true;
            }
            _ => {}
        }
        self.section = None;
        self.state = State::Item;
        Ok(Event::Command(command))
    }

    fn check_discard(&self, discard: &RamDiscard, at: u64) -> Result<(), Error> {
        let name = &discard.block;
        let block = self.ram.blocks.find(name.as_bytes()).and_then(|id| self.ram.blocks.get(id));
        let Some(block) = block else {
            return Err(Located::new(RamError::UnknownBlock { name: name.clone() }.into(), at));
        };
        let used_length = block.used_length;
        for range in &discard.ranges {
            let end = range.start.checked_add(range.len);
            let whole_pages = self.pages.split(range.start | range.len).1 == 0;
            if range.len == 0 || !whole_pages || end.is_none_or(|end| end > used_length) {
                let kind = StreamError::DiscardRange { start: range.start, len: range.len, used_length };
                return Err(Located::new(kind.into(), at).within(format!("block '{name}'")));
            }
        }
        Ok(())
    }

    #[inline]
    fn ram_record<'a>(&mut self, reader: &mut Reader<'a>, at_end: bool) -> Result<Event<'a>, Error> {
        let context = RecordContext {
            pages: self.pages,
            limits: &self.options.limits,
            words: ListWords {
                page_sizes: self.advised_page_sizes,
                address: self.options.x_ignore_shared,
                mapped_ram: self.options.mapped_ram,
            },
            start: self.section.is_some_and(|section| section.start),
            postcopy: self.postcopy,
            at_end,
        };
        let (record, payload) = self.ram.record(reader, &context)?;
        match &record {
            RamRecord::Page(page) => {
                self.expect_payload(payload, PayloadKind::Page { block: page.block, offset: page.offset });
            }
            RamRecord::Block(_) => self.expect_payload(payload, PayloadKind::MappedPages),
            _ => {}
        }
        if matches!(record, RamRecord::EndOfSection) {
            self.state = State::Footer;
        }
        Ok(Event::Ram(record))
    }

    fn vfio_record<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        place: vfio::Place,
        at_end: bool,
    ) -> Result<Event<'a>, Error> {
        if place == vfio::Place::MaybeEnded {
            let ended = if at_end && reader.is_empty() { true } else { reader.clone().u8()? != 0xff };
            if ended {
                return self.footer(reader, at_end);
            }
        }
        let record = VfioRecord::decode(reader, place)?;
        self.state = match record {
            VfioRecord::EndOfState | VfioRecord::InitDataSent => State::Footer,
            VfioRecord::Setup => State::Vfio(vfio::Place::Ending),
            VfioRecord::ConfigLoadReady => State::Vfio(vfio::Place::MaybeEnded),
            VfioRecord::Data { len } => {
                let section_id = self.section.map_or(0, |section| section.id);
                self.expect_payload(len, PayloadKind::DeviceData { section_id });
                State::Vfio(vfio::Place::Records)
            }
            VfioRecord::Config => {
                let id = self.section.map_or(0, |section| section.id);
                let scan = Scan::new(&vfio::flag::END_OF_STATE.to_be_bytes(), id);
                State::Body { scan, then: AfterBody::EndOfState }
            }
        };
        Ok(Event::Vfio(record))
    }

    fn dirty_bitmap_chunk<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Event<'a>, Error> {
        let chunk = Chunk::decode(reader, &mut self.bitmap_names)?;
        self.expect_payload(chunk.payload(), PayloadKind::DirtyBitmap);
        if chunk == Chunk::EndOfSection {
            self.state = State::Footer;
        }
        Ok(Event::DirtyBitmap(chunk))
    }

    fn block_record<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Event<'a>, Error> {
        let record = BlockRecord::decode(reader)?;
        self.expect_payload(record.payload(), PayloadKind::DiskSectors);
        if record == BlockRecord::EndOfSection {
            self.state = State::Footer;
        }
        Ok(Event::BlockMigration(record))
    }

    fn hash_table_record<'a>(&mut self, reader: &mut Reader<'a>, place: hash_table::Place) -> Result<Event<'a>, Error> {
        let record = HashTableRecord::decode(reader, place, self.hash_table_entries)?;
        self.expect_payload(record.payload(), PayloadKind::HashTableEntries);
        self.state = match record {
            HashTableRecord::Size(_) => {
                self.hash_table_entries = record.entries();
                State::Footer
            }
            HashTableRecord::EndOfChunks => State::Footer,
            HashTableRecord::Chunks | HashTableRecord::Chunk { .. } => State::HashTable(hash_table::Place::Chunks),
        };
        Ok(Event::HashTable(record))
    }

    fn storage_attributes_record<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Event<'a>, Error> {
        let record = StorageAttributesRecord::decode(reader)?;
        self.expect_payload(record.payload(), PayloadKind::StorageAttributes);
        if record == StorageAttributesRecord::EndOfSection {
            self.state = State::Footer;
        }
        Ok(Event::StorageAttributes(record))
    }

    /// Content of unknown length, up to the first place at which it may end.
    fn whole_body<'a>(&mut self, reader: &mut Reader<'a>, then: AfterBody, at_end: bool) -> Result<Event<'a>, Error> {
        let length = match self.find_body_end(reader.rest(), at_end) {
            Err(error) if error.kind == (StreamError::EndNotFound { searched: reader.remaining() as u64 }).into() => {
                self.doubtful_body_end().ok_or(error)?
            }
            found => found?,
        };
        let at = reader.offset();
        let body = reader.take(length as u64)?;
        self.totals.device_state(length as u64, &self.options.limits).map_err(|kind| Located::new(kind.into(), at))?;
        self.after_body(then);
        Ok(Event::Body(body))
    }

    fn footer<'a>(&mut self, reader: &mut Reader<'a>, at_end: bool) -> Result<Event<'a>, Error> {
        let section_id = self.section.map_or(0, |section| section.id);
        if self.footers == Footers::Detect {
            self.footers = self.detect_footers(reader, at_end)?;
        }
        if self.footers != Footers::Absent {
            let at = reader.offset();
            let found = reader.u8()?;
            if found != framing::FOOTER {
                return Err(Located::new(StreamError::NoFooter { found }.into(), at));
            }
            let found = reader.be32()?;
            if found != section_id {
                return Err(Located::new(StreamError::FooterId { found, expected: section_id }.into(), at + 1));
            }
        }
        self.section = None;
        self.state = State::Item;
        Ok(Event::SectionFooter { section_id, present: self.footers != Footers::Absent })
    }

    /// The end of the first section of known layout shows whether the stream has footers.
    fn detect_footers(&self, reader: &Reader<'_>, at_end: bool) -> Result<Footers, Error> {
        if reader.clone().u8()? == framing::FOOTER {
            return Ok(Footers::Present);
        }
        let around = super::Around {
            sections: &self.sections,
            options: &self.options,
            at_end,
            in_package: self.package.is_some(),
        };
        let without = super::scan::can_start_item(reader, &around)?;
        Ok(if without { Footers::Absent } else { Footers::Present })
    }

    fn description<'a>(&mut self, reader: &mut Reader<'a>, at_end: bool) -> Result<Option<Event<'a>>, Error> {
        if at_end && reader.is_empty() {
            self.state = State::End;
            return Ok(None);
        }
        if reader.clone().u8()? != framing::VMDESCRIPTION {
            return self.end(reader);
        }
        reader.u8()?;
        let len = reader.clone().be32()?;
        reader.within_limit("description length", len.into(), self.options.limits.vmdesc)?;
        reader.be32()?;
        self.expect_payload(len.into(), PayloadKind::Description);
        self.state = State::End;
        Ok(Some(Event::VmDescription { len }))
    }

    fn end<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Option<Event<'a>>, Error> {
        match reader.peek() {
            Some(found) if !self.options.allow_trailing && !self.options.live => {
                Err(Located::new(StreamError::TrailingBytes { found }.into(), reader.offset()))
            }
            _ => Ok(None),
        }
    }
}
