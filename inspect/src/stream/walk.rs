//! What each event of a main channel means.

use super::analysis::{Analysis, Record, Section};
use super::bodies::Bodies;
use super::channels::Channels;
use super::checkpoints::{self, Checkpoints};
use super::halt::Halt;
use super::memory::Memory;
use super::observer::Observer;
use super::page_size;
use super::settings::Settings;
use crate::bounds::Exceeded;
use crate::failure::Failure;
use crate::ram::Keep;
use crate::source::Source;
use qevm_savevm::command::Command;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionKind;
use qevm_savevm::ram::{MappedRamHeader, RamRecord};
use qevm_savevm::vfio::VfioRecord;
use qevm_savevm::{Decoder, Error, ErrorKind, Event, Footers, StreamError};
use qevm_wire::{Decode, PageGeometry};
use std::collections::HashMap;
use std::io;

/// The state of reading a migration, over all its files.
pub(super) struct Walk<'s> {
    pub(super) analysis: Analysis,
    pub(super) memory: Option<Memory>,
    pub(super) channels: Channels,
    pub(super) settings: &'s Settings,
    pub(super) observer: &'s mut dyn Observer,
    /// Section id to index into the analysis' sections.
    pub(super) open: HashMap<u32, usize>,
    /// The section record being read.
    pub(super) record: Option<Record>,
    pub(super) bodies: Bodies,
    /// Values of the PINGs sent, and how often each.
    pub(super) pings: HashMap<u32, u64>,
    /// Nothing has told the size of target pages yet.
    pub(super) pages_untold: bool,
    /// The end of the stream came: only a description may follow.
    pub(super) ended: bool,
    /// The observer was asked where pages are to be copied.
    pub(super) copy_asked: bool,
    /// Where the device sections after the memory start.
    pub(super) own_devices: Option<u64>,
    /// Everything can be read a second time.
    pub(super) may_restart: bool,
    /// Checkpoints that are to be read after the memory.
    pub(super) checkpoints: Option<Checkpoints>,
    /// MULTIFD_FLUSH came: the channels are in step with it, and not with the ends of sections.
    pub(super) flush_seen: bool,
    /// Where the first one came, if there are no multifd channels that it could wait for.
    pub(super) first_flush: Option<u64>,
    /// Bytes of the files that are done with.
    pub(super) bytes_before: u64,
}

/// What the payload after an event is.
pub(super) enum Payload {
    None,
    Page {
        block: usize,
        offset: u64,
    },
    MappedRam {
        block: usize,
        header: MappedRamHeader,
        used_length: u64,
    },
    Package,
    Description,
    /// Of an iterable section beside `ram`.
    Iterable,
    Other,
}

impl Walk<'_> {
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

    /// True if the stream is over and a checkpoint of COLO follows it. A live source may have nothing more to say, and
    /// is not waited for.
    pub(super) fn checkpoint_follows(&self, source: &mut Source) -> bool {
        self.ended && !self.settings.live && checkpoints::follow(source)
    }

    /// The checkpoints of COLO that are next in `source` and whole, if they can be read in a second go.
    pub(super) fn checkpoints(&self, source: &mut Source, decoder: &Decoder) -> io::Result<Option<Checkpoints>> {
        let Some(own_devices) = self.own_devices.filter(|_| self.may_restart && !self.channels.any_multifd()) else {
            return Ok(None);
        };
        let here = source.offset();
        let found = Checkpoints::find(source, decoder, own_devices, self.analysis.description.clone())?;
        source.jump(here)?;
        Ok(found)
    }

    /// True, with a note, if an error at `at` is none of the stream's, because that is over: something else follows it,
    /// or its description is cut, which no QEMU reads.
    /// `checkpoints`: what [`checkpoint_follows`](Self::checkpoint_follows) said.
    pub(super) fn after_end(&mut self, error: &Error, at: u64, total: Option<u64>, checkpoints: bool) -> bool {
        if !self.ended || self.settings.live {
            return false;
        }
        if let ErrorKind::Stream(StreamError::TrailingBytes { .. }) = error.kind {
            let count = total.map_or("more".into(), |total| total.saturating_sub(at).to_string());
            self.analysis.note(match checkpoints {
                true => format!(
                    "COLO checkpoints follow the end of the stream at byte {at} ({count} bytes), of which none is whole, or which can be read \
                     only once: memory and devices are those of the stream"
                ),
                false => format!("{count} bytes follow the end of the stream at byte {at}: they are not part of it"),
            });
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
                    self.own_devices.get_or_insert(at);
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
                self.own_devices = None;
                if *kind == SectionKind::End {
                    self.analysis.signs.end();
                }
            }
            Event::Body(body) => {
                if let Some(header) = decoder.current_section() {
                    self.body(&header.clone(), at, body, packaged, file)?;
                }
            }
            Event::Vfio(VfioRecord::Data { len }) => self.analysis.device_bytes += len,
            Event::SectionFooter { .. } => {
                self.analysis.footers = Some(decoder.footers() != Footers::Absent);
                self.close_record(decoder.offset());
            }
            Event::Command(command) => return self.command(command, at, decoder, file),
            Event::HashTable(_) | Event::StorageAttributes(_) => return Ok(Payload::Iterable),
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
                if let Some(header) = block.mapped_ram.filter(|header| !header.is_absent()) {
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
                let place = memory.page_path(page);
                memory
                    .xbzrle(page, data, decoder.offset() - data.len() as u64)
                    .map_err(|fault| fault.failure(file, at, &place))?;
            }
            RamRecord::Compressed { page, data } => {
                pages.compressed += 1;
                let place = memory.page_path(page);
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

    /// The first page is next that could be read where it lies: asks where pages are to be copied as they come.
    pub(super) fn ask_for_copy(&mut self) -> io::Result<()> {
        let asked = std::mem::replace(&mut self.copy_asked, true);
        let Some(memory) = self.memory.as_mut().filter(|_| !asked) else { return Ok(()) };
        let is_first = memory.ram.blocks().iter().all(|block| block.pages == block.zero_pages);
        if memory.ram.keep() != Keep::Contents || !is_first {
            return Ok(());
        }
        let copying = self.observer.copy(&memory.ram, self.bodies.cpus());
        copying.map_or(Ok(()), |copying| memory.ram.copy_to(copying))
    }

    pub(super) fn close_record(&mut self, end: u64) {
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
