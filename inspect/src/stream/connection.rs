//! One main channel from its first byte to its last: what [`Decoder`] reads, and what becomes of it.

use super::checkpoints::{self, Checkpoints};
use super::halt::Halt;
use super::memory::Memory;
use super::reencode;
use super::walk::{Payload, Walk};
use crate::failure::Failure;
use crate::ram::Keep;
use crate::source::Source;
use qevm_savevm::framing::{self, Content, SectionHeader};
use qevm_savevm::{BodyEnds, Decoder, Encoder, Event, Footers};
use qevm_wire::{Decode, DriveError, Limits, Writer, next_event};
use std::io;

/// How many places in one section's content are tried that look like the start of the next item.
const MAX_UNMARKED_ENDS: usize = 64;

/// Bytes before each page of a run.
const PAGE_WORD: u16 = 8;

/// Bytes of payload that are held at a time.
const PIECE: u64 = 64 << 10;

/// One connection that carries a main channel.
pub(super) struct Connection<'c> {
    pub(super) file: String,
    pub(super) source: &'c mut Source,
    /// The decoder of the connection, and those of the packages in it.
    pub(super) decoders: Vec<Decoder>,
    pub(super) encoder: Encoder,
    pub(super) writer: Writer,
}

impl Connection<'_> {
    /// Reads to the end of the stream, or of the checkpoints that follow it, or to a fault.
    pub(super) fn read(&mut self, walk: &mut Walk<'_>) -> Result<(), Halt> {
        let Some(checkpoints) = walk.checkpoints.take() else { return self.read_to(None, walk) };
        self.read_to(Some(checkpoints.instead_of), walk)?;
        self.checkpoints(&checkpoints, walk)
    }

    /// Reads checkpoints after the memory of the stream: the memory of each, and the devices of the last.
    fn checkpoints(&mut self, checkpoints: &Checkpoints, walk: &mut Walk<'_>) -> Result<(), Halt> {
        let file = self.file.clone();
        let failed = |error: io::Error| Failure::io(&file, checkpoints.start, &error);
        self.source.jump(checkpoints.start).map_err(failed)?;
        for number in 1..=checkpoints.count {
            self.source.skip(checkpoints::MESSAGES).map_err(failed)?;
            self.part(walk)?;
            let len = checkpoints::devices_len(self.source).map_err(failed)?.unwrap_or_default();
            match number == checkpoints.count {
                true => self.part(walk)?,
                false => drop(self.source.skip(len).map_err(failed)?),
            }
        }
        if let Some((offset, text)) = &checkpoints.description {
            walk.bodies.description(text, *offset, &file, &mut walk.analysis, walk.observer)?;
        }
        walk.analysis.note(checkpoints.note(self.source.total()));
        Ok(())
    }

    /// Reads a part of a checkpoint, which is next.
    fn part(&mut self, walk: &mut Walk<'_>) -> Result<(), Halt> {
        let at = self.source.offset();
        self.decoders = self.decoders.first().map(|last| last.checkpoint(at)).into_iter().collect();
        self.read_to(None, walk)
    }

    /// Reads to the end of the stream, or to the item that starts at `stop`.
    fn read_to(&mut self, stop: Option<u64>, walk: &mut Walk<'_>) -> Result<(), Halt> {
        loop {
            if let Some(innermost) = self.decoders.last()
                && innermost.expects_body()
            {
                self.known_body(walk)?;
            }
            // The decoders around a package pass over what the one in it does, which a driver of that one cannot know.
            self.payload(Payload::Other, walk)?;
            let (Some((decoder, outer)), source) = (self.decoders.split_last_mut(), &mut *self.source) else {
                return Ok(());
            };
            let at = decoder.offset();
            if outer.is_empty() && stop == Some(at) {
                return Ok(());
            }
            if outer.is_empty() && decoder.expects_page() {
                let pages = walk.sniff_pages(source).map_err(|error| Failure::io(&self.file, at, &error))?;
                if let Some(pages) = pages {
                    decoder.set_page_geometry(pages);
                    self.encoder.set_page_geometry(pages);
                }
            }
            let total = source.total();
            let checkpoints = outer.is_empty() && walk.checkpoint_follows(source);
            if checkpoints
                && let Some(found) =
                    walk.checkpoints(source, decoder).map_err(|error| Failure::io(&self.file, at, &error))?
            {
                return Err(Halt::Checkpoints(found.into()));
            }
            let next = match next_event(source, decoder) {
                Ok(next) => next,
                Err(DriveError::Stream(error))
                    if outer.is_empty() && walk.after_end(&error, at, total, checkpoints) =>
                {
                    return Ok(());
                }
                Err(DriveError::Stream(error)) => {
                    let pages = walk.pages_by(&error).map_err(|error| Failure::io(&self.file, at, &error))?;
                    let Some(pages) = pages else { return Err(Failure::located(&self.file, error).into()) };
                    // It stays where it was, and reads again.
                    decoder.set_page_geometry(pages);
                    self.encoder.set_page_geometry(pages);
                    continue;
                }
                Err(error) => return Err(Failure::driven(&self.file, at, error).into()),
            };
            let Some((event, read)) = next else {
                match outer.is_empty() {
                    true => return Ok(()),
                    false => drop(self.decoders.pop()),
                }
                continue;
            };
            if let Event::Configuration(configuration) = &event {
                walk.configured(configuration).into_iter().for_each(|pages| decoder.set_page_geometry(pages));
                self.encoder = Encoder::new(decoder.page_geometry());
            }
            if walk.settings.reencode {
                compare(&mut self.encoder, &mut self.writer, &event, read, at, &self.file)?;
            }
            let payload = walk.event(&event, at, decoder, !outer.is_empty(), &self.file)?;
            let consumed = read.len();
            source.consume(consumed);
            for decoder in outer {
                skip(decoder, consumed as u64, &self.file)?;
            }
            self.payload(payload, walk)?;
            walk.observer.position(self.source.offset());
        }
    }

    /// If the description tells how long the device section's content is, takes exactly that; if nothing on the wire
    /// does, not even a footer, looks for an end up to which a known layout explains the content.
    fn known_body(&mut self, walk: &mut Walk<'_>) -> Result<(), Halt> {
        let nested = self.decoders.len() > 1;
        let Some((decoder, _)) = self.decoders.split_last_mut() else {
            return Ok(());
        };
        let Some(header) = decoder.current_section().cloned() else {
            return Ok(());
        };
        if nested || header.content() != Content::Opaque {
            return Ok(());
        }
        let at = decoder.offset();
        if !walk.bodies.is_known() {
            walk.bodies.spool_if_needed(self.source).map_err(|error| Failure::io(&self.file, at, &error))?;
            walk.bodies.open(&header);
        }
        if walk.bodies.locate(decoder, self.source).map_err(|error| Failure::io(&self.file, at, &error))? {
            walk.bodies.open(&header);
        }
        let footers = decoder.footers() != Footers::Absent;
        let Some(len) = walk.bodies.expected_len() else {
            return match unmarked_end(decoder, self.source, &self.file, |body| {
                walk.bodies.explains(&header, at, body, &walk.analysis)
            })? {
                Some(len) if !footers => self.take_body(len, &header, walk),
                _ => Ok(()),
            };
        };
        let whole = len.saturating_add(if footers { 5 } else { 0 });
        if len > Limits::default().device_section {
            return Ok(());
        }
        self.source.fill(whole as usize).map_err(|error| Failure::io(&self.file, at, &error))?;
        let Some(footer) = self.source.window().get(len as usize..whole as usize) else {
            return Ok(());
        };
        let is_footer = !footers || footer[0] == framing::FOOTER && footer[1..] == header.section_id.to_be_bytes();
        if !is_footer && ends_elsewhere(decoder, self.source, &self.file)? {
            // The description is wrong, or does not belong to this stream; the section's length will show that.
            return Ok(());
        }
        self.take_body(len, &header, walk)
    }

    /// Takes the next `len` bytes, which are held, for the content of the section.
    fn take_body(&mut self, len: u64, header: &SectionHeader, walk: &mut Walk<'_>) -> Result<(), Halt> {
        let Some(decoder) = self.decoders.last_mut() else {
            return Ok(());
        };
        let body = &self.source.window()[..len as usize];
        walk.body(header, decoder.offset(), body, false, &self.file)?;
        decoder.body(len).map_err(|error| Failure::located(&self.file, error))?;
        self.source.consume(len as usize);
        Ok(())
    }

    /// Moves the payload after an event.
    fn payload(&mut self, payload: Payload, walk: &mut Walk<'_>) -> Result<(), Halt> {
        let Some(decoder) = self.decoders.last() else { return Ok(()) };
        let remaining = decoder.payload_remaining();
        let at = decoder.offset();
        match payload {
            Payload::None => {}
            Payload::Page { block, offset } => {
                walk.ask_for_copy().map_err(|error| Failure::io(&self.file, at, &error))?;
                let Some(memory) = &mut walk.memory else { return Ok(()) };
                if memory.ram.keep() == Keep::Nothing {
                    memory.ram.put_unread(block, offset).map_err(|error| Failure::io(&self.file, at, &error))?;
                    return self.jump(remaining);
                }
                if memory.ram.keep().is_by_place() && self.source.is_seekable() && self.source.holds(remaining) {
                    if memory.ram.is_copied() {
                        let count = (!walk.settings.reencode).then_some(&mut walk.analysis.main_pages.page);
                        return self.read_pages(memory, (block, offset), remaining as usize, count);
                    }
                    let place = (self.file.as_str(), &*self.source, self.source.offset());
                    let kept = memory.ram.put_place(block, offset, remaining, place);
                    kept.map_err(|error| Failure::io(&self.file, at, &error))?;
                    return self.jump(remaining);
                }
                self.more(remaining as usize)?;
                if let Some(page) = self.source.window().get(..remaining as usize) {
                    memory.ram.put(block, offset, page).map_err(|error| Failure::io(&self.file, at, &error))?;
                    self.source.consume(remaining as usize);
                    self.skipped(remaining)?;
                }
            }
            Payload::MappedRam { block, header, used_length } => {
                let Some(memory) = &mut walk.memory else { return Ok(()) };
                let pages = memory.mapped_ram(&self.file, self.source, block, &header, used_length, walk.observer);
                let pages = pages.map_err(|fault| fault.failure(&self.file, self.source.offset(), "mapped-ram"))?;
                walk.analysis.main_pages.mapped += pages;
                walk.analysis.signs.mapped_ram();
                self.skipped(self.source.offset() - at)?;
                let left = self.decoders.last().map_or(0, Decoder::payload_remaining);
                self.jump(left)?;
            }
            Payload::Package => {
                let nested = decoder.nested().map_err(|error| Failure::located(&self.file, error))?;
                self.decoders.push(nested);
            }
            Payload::Description => {
                self.more(remaining as usize)?;
                if let Some(text) = self.source.window().get(..remaining as usize) {
                    walk.bodies.description(text, at, &self.file, &mut walk.analysis, walk.observer)?;
                    self.source.consume(remaining as usize);
                    self.skipped(remaining)?;
                }
            }
            Payload::Iterable => {
                let mut left = remaining;
                while left > 0 {
                    self.more(left.min(PIECE) as usize)?;
                    let piece = self.source.window();
                    let len = left.min(PIECE).min(piece.len() as u64);
                    if len == 0 {
                        break;
                    }
                    walk.observer.payload(&piece[..len as usize]);
                    self.source.consume(len as usize);
                    self.skipped(len)?;
                    left -= len;
                }
            }
            Payload::Other => self.jump(remaining)?,
        }
        Ok(())
    }

    /// Takes a page of `size` bytes that is copied, and could be read again. With it those that are held and follow it,
    /// which are added to `count`, unless every record is to be seen.
    fn read_pages(
        &mut self,
        memory: &mut Memory,
        (block, offset): (usize, u64),
        size: usize,
        count: Option<&mut u64>,
    ) -> Result<(), Halt> {
        self.more(size)?;
        let at = self.source.offset();
        if self.source.window().len() < size {
            return Ok(());
        }
        self.skipped(size as u64)?;
        let mut len = size;
        if let ([decoder], Some(count)) = (&mut self.decoders[..], count) {
            let next = offset.saturating_add(size as u64);
            let pages = decoder.take_pages(next, &self.source.window()[size..]);
            *count += pages;
            len += pages as usize * (usize::from(PAGE_WORD) + size);
        }
        let pages = &self.source.window()[..len];
        let kept = memory.ram.put_read(block, offset, pages, PAGE_WORD, (&self.file, self.source, at));
        kept.map_err(|error| Failure::io(&self.file, at, &error))?;
        self.source.consume(len);
        Ok(())
    }

    /// Jumps over payload; at the end of input the decoder's next answer is the error.
    fn jump(&mut self, bytes: u64) -> Result<(), Halt> {
        let at = self.source.offset();
        let jumped = self.source.skip(bytes).map_err(|error| Failure::io(&self.file, at, &error))?;
        self.skipped(jumped)?;
        if jumped < bytes {
            self.decoders.iter_mut().for_each(Decoder::end_of_input);
        }
        Ok(())
    }

    fn skipped(&mut self, bytes: u64) -> Result<(), Halt> {
        self.decoders.iter_mut().try_for_each(|decoder| skip(decoder, bytes, &self.file))
    }

    /// Reads on until the window has `bytes` bytes; if there are no more, the decoders are told.
    fn more(&mut self, bytes: usize) -> Result<(), Halt> {
        let at = self.source.offset();
        self.source.fill(bytes).map_err(|error| Failure::io(&self.file, at, &error))?;
        if self.source.at_end() {
            self.decoders.iter_mut().for_each(Decoder::end_of_input);
        }
        Ok(())
    }
}

/// True if the content of the section, which does not end where it is described to end, has an end elsewhere. If it has
/// none, the footer at the described place is what is wrong.
fn ends_elsewhere(decoder: &Decoder, source: &mut Source, file: &str) -> Result<bool, Failure> {
    next_end(&mut decoder.body_ends(), source, file).map(|found| found.is_some())
}

/// The length of the content up to the next place where it may end, if there is a further one.
fn next_end(ends: &mut BodyEnds, source: &mut Source, file: &str) -> Result<Option<u64>, Failure> {
    match next_event(source, ends) {
        Ok(found) => Ok(found.map(|(length, _)| length)),
        Err(DriveError::Stream(_)) => Ok(None),
        Err(error) => Err(Failure::driven(file, ends.offset(), error)),
    }
}

/// The length of a section's content in a stream without footers and without a description: up to the first place where
/// another item may start and that makes the content one that `explains` knows; the first such place if none does.
fn unmarked_end(
    decoder: &Decoder,
    source: &mut Source,
    file: &str,
    mut explains: impl FnMut(&[u8]) -> bool,
) -> Result<Option<u64>, Failure> {
    if decoder.footers() != Footers::Absent {
        return Ok(None);
    }
    let (mut ends, mut first) = (decoder.body_ends(), None);
    for _ in 0..MAX_UNMARKED_ENDS {
        let Some(found) = next_end(&mut ends, source, file)? else { break };
        if source.window().get(..found as usize).is_some_and(&mut explains) {
            return Ok(Some(found));
        }
        first.get_or_insert(found);
    }
    Ok(first)
}

fn skip(decoder: &mut Decoder, bytes: u64, file: &str) -> Result<(), Halt> {
    decoder.skip_payload(bytes).map_err(|error| Failure::located(file, error).into())
}

/// Encodes `event` again and compares it with the bytes it was read from.
fn compare(
    encoder: &mut Encoder,
    writer: &mut Writer,
    event: &Event<'_>,
    read: &[u8],
    at: u64,
    file: &str,
) -> Result<(), Failure> {
    writer.clear();
    encoder.encode(event, writer).map_err(|error| {
        let message = format!("what was read cannot be written again: {}", error.kind);
        reencode::failure(file, at, message)
    })?;
    reencode::compare(writer.as_bytes(), read, at, file)
}
