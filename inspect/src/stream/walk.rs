//! All files of a migration in their order, and what each event of a main channel means.

use super::analysis::{Analysis, Observer, Record, Section, Settings};
use super::bodies::Bodies;
use super::channels::Channels;
use super::connection::Connection;
use super::inputs::{Inputs, Named};
use super::memory::Memory;
use super::page_size;
use super::return_path;
use crate::bounds::Exceeded;
use crate::failure::Failure;
use crate::open::Container;
use crate::ram::Keep;
use crate::source::Source;
use qevm_savevm::command::Command;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionKind;
use qevm_savevm::ram::{MappedRamHeader, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, Event, Footers, StreamError};
use qevm_wire::{Decode, PageGeometry, Writer};
use std::collections::HashMap;
use std::io;

/// How reading ended.
pub(super) enum Outcome {
    /// At the end, or at a fault.
    Done(Box<Analysis>),
    /// At an XBZRLE page, which needs the contents of pages, and they were not kept.
    NeedsImage,
}

/// Why reading stops before the end.
pub(super) enum Halt {
    /// The stream is bad.
    Failure(Failure),
    /// See [`Outcome::NeedsImage`].
    NeedsImage,
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Halt::Failure(failure)
    }
}

/// Reads all files of a migration.
pub(super) fn run(inputs: &mut Inputs, settings: &Settings, observer: &mut dyn Observer) -> Outcome {
    let mut walk = Walk {
        analysis: Analysis { reencoded_identical: settings.reencode, page_size: 4096, ..Analysis::default() },
        memory: None,
        channels: Channels::default(),
        settings,
        observer,
        open: HashMap::new(),
        record: None,
        bodies: Bodies::new(!settings.live, settings.strict, settings.layouts.clone(), settings.spool.clone()),
        pings: HashMap::new(),
        pages_untold: false,
        ended: false,
        flush_seen: false,
        first_flush: None,
        bytes_before: 0,
    };
    let result = walk.all(inputs);
    let Walk { mut analysis, memory, channels, .. } = walk;
    analysis.ram = memory.map(Memory::into_ram);
    analysis.channels = channels.describe();
    analysis.reencoded_identical &= settings.reencode;
    match result {
        Ok(()) => {}
        Err(Halt::NeedsImage) => return Outcome::NeedsImage,
        Err(Halt::Failure(failure)) => {
            // What was not read to its end is not known to be identical.
            analysis.reencoded_identical = false;
            analysis.failure = Some(failure);
        }
    }
    Outcome::Done(Box::new(analysis))
}

/// The state of reading a migration, over all its files.
pub(super) struct Walk<'s> {
    pub(super) analysis: Analysis,
    pub(super) memory: Option<Memory>,
    channels: Channels,
    pub(super) settings: &'s Settings,
    pub(super) observer: &'s mut dyn Observer,
    /// Section id to index into the analysis' sections.
    open: HashMap<u32, usize>,
    /// The section record being read.
    record: Option<Record>,
    pub(super) bodies: Bodies,
    /// Values of the PINGs sent, and how often each.
    pings: HashMap<u32, u64>,
    /// Nothing has told the size of target pages yet.
    pages_untold: bool,
    /// The end of the stream came: only a description may follow.
    ended: bool,
    /// MULTIFD_FLUSH came: the channels are in step with it, and not with the ends of sections.
    flush_seen: bool,
    /// Where the first one came, if there are no multifd channels that it could wait for.
    first_flush: Option<u64>,
    /// Bytes of the files that are done with.
    bytes_before: u64,
}

/// What the payload after an event is.
pub(super) enum Payload {
    None,
    Page { block: usize, offset: u64 },
    MappedRam { block: usize, header: MappedRamHeader, used_length: u64 },
    Package,
    Description,
    Other,
}

impl Walk<'_> {
    fn all(&mut self, inputs: &mut Inputs) -> Result<(), Halt> {
        let Inputs { main, offset, containers, pages, channels, recovery, return_path } = inputs;
        self.channels = Channels::open(channels, self.settings.reencode)?;
        let can_break = !recovery.is_empty();
        let skipped = main.source.skip(*offset).map_err(|e| Failure::io(&main.name, 0, &e))?;
        if skipped < *offset {
            let kind = "truncated";
            let message = format!("the file ends here, before the stream's start at --offset {offset}");
            let file = main.name.clone();
            return Err(Failure { file, kind, offset: skipped, path: String::new(), message }.into());
        }
        let looked = self.bodies.look_ahead(&mut main.source);
        looked.map_err(|error| Failure::io(&main.name, *offset, &error))?;
        let told = pages.or_else(|| self.bodies.page_size().and_then(PageGeometry::from_size));
        let pages = told.unwrap_or(PageGeometry::X86);
        self.pages_untold = told.is_none() && !self.settings.live;
        self.analysis.page_size = pages.size();
        let options = DecoderOptions { offset: *offset, pages, live: self.settings.live, ..DecoderOptions::default() };
        let (mut last, mut encoder) = self.connection(main, Decoder::new(options), Encoder::new(pages), can_break)?;
        self.analysis.main_bytes = self.analysis.bytes;
        containers.iter().filter_map(Container::remark).for_each(|remark| self.analysis.note(remark));
        let resumed = recovery.len();
        for (number, named) in recovery.iter_mut().enumerate() {
            let (decoder, resumed_encoder) = (last.recovery(), encoder.recovery());
            (last, encoder) = self.connection(named, decoder, resumed_encoder, number + 1 < resumed)?;
        }
        if let Some(at) = self.first_flush.filter(|_| !self.settings.live) {
            self.analysis.incomplete_ram = true;
            let missing = "the main channel waits for multifd channels, but none was given (--channel)";
            match self.settings.complete {
                true => return Err(Failure::mismatch(&main.name, at, "section 'ram'", missing).into()),
                false => self.analysis.note(format!("{missing}: pages that came on them are missing here")),
            }
        }
        if let Some(memory) = &mut self.memory {
            self.channels.finish(memory, &last, self.analysis.postcopy, can_break)?;
        }
        self.analysis.opaque_bytes += self.channels.device_bytes();
        self.bytes_before += self.channels.bytes();
        self.analysis.bytes = self.bytes_before;
        for (number, named) in return_path.iter_mut().enumerate() {
            let mut context = return_path::Context {
                pings: &mut self.pings,
                blocks: last.ram_blocks(),
                pages: last.page_geometry(),
                can_break: number < resumed,
                reencode: self.settings.reencode,
            };
            let read = return_path::read(named, &mut context)?;
            self.analysis.return_path.push(read.description);
            self.bytes_before += read.bytes;
            self.analysis.bytes = self.bytes_before;
        }
        Ok(())
    }

    /// Reads one connection to its end and returns its decoder.
    fn connection(
        &mut self,
        named: &mut Named,
        decoder: Decoder,
        encoder: Encoder,
        can_break: bool,
    ) -> Result<(Decoder, Encoder), Halt> {
        let start = decoder.offset();
        let mut connection = Connection {
            file: named.name.clone(),
            source: &mut named.source,
            decoders: vec![decoder],
            encoder,
            writer: Writer::new(),
        };
        let result = connection.read(self);
        let Connection { mut decoders, encoder, .. } = connection;
        let end = decoders.last().map_or(start, Decoder::offset);
        let outermost = decoders.swap_remove(0);
        self.bytes_before += end - start;
        self.analysis.bytes = self.bytes_before;
        self.bodies.finish(&mut self.analysis, self.observer);
        match result {
            Err(Halt::Failure(failure)) if can_break && failure.kind == "truncated" && failure.file == named.name => {
                let note = format!("{}: the connection broke at byte {end}, as a resumed postcopy's does", named.name);
                self.analysis.note(note);
                self.record = None;
            }
            Err(Halt::Failure(mut failure)) => {
                self.close_record(end);
                failure.offset = failure.offset.max(start);
                return Err(failure.into());
            }
            Err(halt) => return Err(halt),
            Ok(()) => {}
        }
        Ok((outermost, encoder))
    }

    /// The configuration section is over; what it tells of the size of target pages, and what the machine type does.
    pub(super) fn configured(&mut self, configuration: &Configuration) -> Option<PageGeometry> {
        self.pages_untold &= configuration.page_geometry().is_none();
        let pages = page_size::of_machine(&configuration.machine).filter(|_| self.pages_untold)?;
        self.pages_untold = false;
        Some(pages)
    }

    /// If a record of a page is next in `source`, and nothing has told the size of pages, what it shows.
    pub(super) fn sniff_pages(&mut self, source: &mut Source) -> io::Result<Option<PageGeometry>> {
        if !self.pages_untold {
            return Ok(None);
        }
        let pages = page_size::of_records(source)?;
        let counts = &self.analysis.main_pages;
        self.pages_untold = pages.is_none() && counts.zero + counts.page == 0;
        let (Some(pages), Some(_)) = (pages, &self.memory) else { return Ok(None) };
        self.set_pages(pages)?;
        Ok(Some(pages))
    }

    /// If an error comes of pages that have another size than was assumed, which nothing has told before: that size.
    pub(super) fn pages_by(&mut self, error: &Error) -> io::Result<Option<PageGeometry>> {
        let Some(pages) = page_size::of_error(error).filter(|_| self.pages_untold) else { return Ok(None) };
        self.pages_untold = false;
        self.set_pages(pages)?;
        Ok(Some(pages))
    }

    fn set_pages(&mut self, pages: PageGeometry) -> io::Result<()> {
        self.analysis.page_size = pages.size();
        self.observer.configuration(pages.size());
        match &mut self.memory {
            Some(memory) => memory.set_page_size(pages.size(), self.settings.keep, self.settings.spool.clone()),
            None => Ok(()),
        }
    }

    /// True, with a note, if an error at `at` is none of the stream's, because that is over: something else follows it, or its
    /// description is cut, which no QEMU reads.
    pub(super) fn after_end(&mut self, error: &Error, at: u64, total: Option<u64>) -> bool {
        if !self.ended || self.settings.live {
            return false;
        }
        if let ErrorKind::Stream(StreamError::TrailingBytes { .. }) = error.kind {
            let count = total.map_or("more".into(), |total| total.saturating_sub(at).to_string());
            self.analysis
                .note(format!("{count} bytes follow the end of the stream at byte {at}: they are not part of it"));
            return true;
        }
        let cut = error.is_truncated() && !self.settings.strict;
        if cut {
            self.analysis.note(format!("the description of device sections is cut at the end of the file: {error}"));
        }
        cut
    }

    /// Notes what an event says and does what it asks for.
    pub(super) fn event(
        &mut self,
        event: &Event<'_>,
        at: u64,
        decoder: &Decoder,
        packaged: bool,
        file: &str,
    ) -> Result<Payload, Halt> {
        self.observer.event(event);
        match event {
            Event::Ram(record) => return self.ram_record(record, at, decoder, file),
            Event::Header => self.analysis.header = true,
            Event::Configuration(configuration) => {
                self.analysis.page_size = decoder.page_geometry().size();
                self.analysis.configuration = Some(configuration.clone());
                self.observer.configuration(self.analysis.page_size);
            }
            Event::Section { kind, header } => {
                self.observer.section(*kind, header, at);
                self.analysis.signs.section(header);
                if *kind == SectionKind::Full && !packaged {
                    self.bodies.open(header);
                }
                let known = self.open.get(&header.section_id).copied();
                // A resumed stream may open a section again; a new entry is right for everything else.
                let index = known.filter(|_| *kind == SectionKind::Start).unwrap_or_else(|| {
                    self.analysis.sections.push(Section {
                        kind: *kind,
                        header: header.clone(),
                        offset: at,
                        size: 0,
                        records: 0,
                        packaged,
                    });
                    self.analysis.sections.len() - 1
                });
                self.open.insert(header.section_id, index);
                self.record = Some(Record { section: index, kind: *kind, offset: at, size: 0 });
            }
            Event::SectionPart { kind, section_id } => {
                if let Some(section) = self.open.get(section_id).copied() {
                    self.observer.section(*kind, &self.analysis.sections[section].header, at);
                    self.record = Some(Record { section, kind: *kind, offset: at, size: 0 });
                }
                self.bodies.iterated();
                if *kind == SectionKind::End {
                    self.analysis.signs.end();
                }
            }
            Event::Body(body) => {
                if let Some(header) = decoder.current_section() {
                    self.body(&header.clone(), at, body, packaged, file)?;
                }
            }
            Event::SectionFooter { .. } => {
                self.analysis.footers = Some(decoder.footers() != Footers::Absent);
                self.close_record(decoder.offset());
            }
            Event::Command(command) => return self.command(command, at, decoder, file),
            Event::VmDescription { .. } => return Ok(Payload::Description),
            Event::Eof => {
                self.ended |= !packaged;
                self.observer.end_of_stream();
            }
            _ => {}
        }
        Ok(if decoder.payload_remaining() > 0 { Payload::Other } else { Payload::None })
    }

    pub(super) fn body(
        &mut self,
        header: &qevm_savevm::framing::SectionHeader,
        at: u64,
        body: &[u8],
        packaged: bool,
        file: &str,
    ) -> Result<(), Halt> {
        self.observer.body(header, at, body);
        self.analysis.signs.body(header, body);
        let read = self.bodies.read(header, at, body, packaged, file, &self.analysis)?;
        self.analysis.opaque_bytes += read.opaque;
        read.note.into_iter().for_each(|note| self.analysis.note(note));
        if let Some(fields) = &read.fields {
            self.observer.fields(header, fields);
        }
        Ok(())
    }

    fn command(&mut self, command: &Command, at: u64, decoder: &Decoder, file: &str) -> Result<Payload, Halt> {
        self.analysis.command_count += 1;
        self.observer.command(command, at);
        self.analysis.signs.command(command);
        if self.analysis.commands.len() < Analysis::MAX_RECORDS {
            self.analysis.commands.push((at, describe_command(command)));
        }
        match command {
            Command::Ping(value) => *self.pings.entry(*value).or_default() += 1,
            Command::RamDiscard(discard) => {
                if let (Some(memory), Some(block)) =
                    (&mut self.memory, decoder.ram_blocks().find(discard.block.as_bytes()))
                {
                    for range in &discard.ranges {
                        memory
                            .ram
                            .discard(block.index(), range.start, range.len)
                            .map_err(|error| Failure::io(file, at, &error))?;
                    }
                }
            }
            Command::Packaged { .. } => {
                self.analysis.postcopy = true;
                return Ok(Payload::Package);
            }
            _ => {}
        }
        Ok(Payload::None)
    }

    fn ram_record(&mut self, record: &RamRecord<'_>, at: u64, decoder: &Decoder, file: &str) -> Result<Payload, Halt> {
        let keep = self.settings.keep;
        let page_size = decoder.page_geometry().size();
        let io = |error: io::Error| Failure::io(file, at, &error);
        if let RamRecord::MemSize { total } = record {
            if self.memory.is_some() {
                let mut failure = Failure::mismatch(file, at, "section 'ram'", "a second list of RAM blocks");
                failure.kind = "unsupported";
                return Err(failure.into());
            }
            if *total > self.settings.max_ram {
                return Err(
                    Failure::exceeded(file, at, "section 'ram'", Exceeded::ram(*total, self.settings.max_ram)).into()
                );
            }
            self.memory = Some(Memory::new(page_size, keep, self.settings.spool.clone()).map_err(io)?);
            return Ok(Payload::None);
        }
        let pages = &mut self.analysis.main_pages;
        let Some(memory) = &mut self.memory else {
            // Only the end of a section can come without a list.
            return Ok(Payload::None);
        };
        match record {
            RamRecord::Block(block) => {
                self.observer.ram_block(block);
                let index = memory.ram.add_block(block.name.to_string(), block.used_length);
                if let Some(header) = block.mapped_ram {
                    return Ok(Payload::MappedRam { block: index, header, used_length: block.used_length });
                }
            }
            RamRecord::Page(page) => {
                pages.page += 1;
                return Ok(Payload::Page { block: page.block.index(), offset: page.offset });
            }
            RamRecord::Zero(page) => {
                pages.zero += 1;
                memory.ram.put_zero(page.block.index(), page.offset).map_err(io)?;
            }
            RamRecord::Xbzrle { page, data } => {
                pages.xbzrle += 1;
                if keep == Keep::Digests {
                    return Err(Halt::NeedsImage);
                }
                let place = memory.place(page);
                memory
                    .xbzrle(page, data, decoder.offset() - data.len() as u64)
                    .map_err(|fault| fault.failure(file, at, &place))?;
            }
            RamRecord::Compressed { page, data } => {
                pages.compressed += 1;
                let place = memory.place(page);
                memory.compressed(page, data).map_err(|fault| fault.failure(file, at, &place))?;
            }
            RamRecord::MultifdFlush => {
                self.flush_seen = true;
                if !self.channels.any_multifd() && self.first_flush.is_none() {
                    self.first_flush = Some(at);
                }
                self.analysis.signs.flush();
                self.channels.sync(memory, decoder, at)?;
            }
            RamRecord::EndOfSection if !self.flush_seen && self.channels.any_multifd() => {
                self.channels.sync(memory, decoder, at)?;
            }
            _ => {}
        }
        Ok(Payload::None)
    }

    fn close_record(&mut self, end: u64) {
        if let Some(mut record) = self.record.take() {
            record.size = end.saturating_sub(record.offset);
            let section = &mut self.analysis.sections[record.section];
            section.size += record.size;
            section.records += 1;
            if self.analysis.records.len() < Analysis::MAX_RECORDS {
                self.analysis.records.push(record);
            }
        }
    }
}

/// A command as people read it.
fn describe_command(command: &Command) -> String {
    match command {
        Command::Ping(value) => format!("PING {value}"),
        Command::PostcopyAdvise(Some(advise)) => {
            format!(
                "POSTCOPY_ADVISE page sizes {:#x}, target page {}",
                advise.page_size_summary, advise.target_page_size
            )
        }
        Command::RamDiscard(discard) => {
            let bytes = discard.ranges.iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
            format!("POSTCOPY_RAM_DISCARD {}: {} ranges, {bytes} bytes", discard.block, discard.ranges.len())
        }
        Command::Packaged { len } => format!("PACKAGED {len} bytes"),
        Command::RecvBitmap(block) => format!("RECV_BITMAP {block}"),
        command => command.name().to_owned(),
    }
}
