//! Checkpoints of COLO: what follows the end of a stream whose guest has a standby machine that takes its place.
//!
//! Of each come the memory that has changed and all device sections. A destination has to have the whole checkpoint
//! before the first of its pages counts, so the whole ones are found first; then everything is read again, with the
//! device sections of the last one in place of the stream's own.

use crate::source::Source;
use qevm_savevm::framing::{self, SectionKind};
use qevm_savevm::{Decoder, Event};
use qevm_wire::{DriveError, next_event};
use std::io;

/// What the source says at a checkpoint: messages 1 (request) and 3 (state comes), then the last part of a section.
const BEGINNING: [u8; 9] = [0, 0, 0, 1, 0, 0, 0, 3, framing::SECTION_END];
/// Bytes of the two messages.
pub(super) const MESSAGES: u64 = 8;
/// Message 4 (the size of the device sections), which that size follows in eight bytes.
const DEVICES: [u8; 4] = [0, 0, 0, 4];
const DEVICES_LEN: usize = 12;

/// Checkpoints that are whole, and what is needed to read them.
#[derive(Debug, Clone)]
pub(super) struct Checkpoints {
    /// Where the stream's own device sections start, after its memory.
    pub(super) instead_of: u64,
    /// Where the stream ended, and the first checkpoint starts.
    pub(super) start: u64,
    /// Where the last one ends.
    end: u64,
    /// How many there are.
    pub(super) count: u64,
    /// The stream's description, and its offset.
    pub(super) description: Option<(u64, Vec<u8>)>,
}

/// True if a checkpoint is next in `source`. What cannot be read is none.
pub(super) fn follow(source: &mut Source) -> bool {
    source.fill(BEGINNING.len()).is_ok() && source.window().starts_with(&BEGINNING)
}

impl Checkpoints {
    /// Those that follow the end of the stream that `decoder` has read, from where `source` is on. `None` if none is
    /// whole.
    pub(super) fn find(
        source: &mut Source,
        decoder: &Decoder,
        instead_of: u64,
        description: Option<(u64, Vec<u8>)>,
    ) -> io::Result<Option<Self>> {
        let start = source.offset();
        let mut found = Checkpoints { instead_of, start, end: start, count: 0, description };
        let mut last = decoder.checkpoint(start);
        while follow(source) {
            source.skip(MESSAGES)?;
            let mut memory = last.checkpoint(source.offset());
            if !pass(source, &mut memory, Part::Memory)? {
                break;
            }
            let Some(len) = devices_len(source)? else { break };
            let devices_at = source.offset();
            let is_whole = pass(source, &mut memory.checkpoint(devices_at), Part::Devices)?;
            if !is_whole || source.offset() - devices_at != len {
                break;
            }
            (found.end, found.count, last) = (source.offset(), found.count + 1, memory);
        }
        Ok((found.count > 0).then_some(found))
    }

    /// What is to be said of them, in a file of `total` bytes.
    pub(super) fn note(&self, total: Option<u64>) -> String {
        let Checkpoints { start, end, count, .. } = self;
        let rest = match total.unwrap_or(*end).saturating_sub(*end) {
            0 => String::new(),
            rest => format!("; {rest} bytes after it are no whole checkpoint"),
        };
        format!(
            "COLO checkpoints follow the end of the stream at byte {start}: memory and devices are those of number {count}, which is the last \
             and ends at byte {end}{rest}"
        )
    }
}

/// What a part of a checkpoint holds.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// Last parts of sections that the stream has opened.
    Memory,
    /// Device sections.
    Devices,
}

impl Part {
    fn may_hold(self, event: &Event<'_>) -> bool {
        match event {
            Event::Section { kind, .. } => matches!(self, Part::Devices) && *kind == SectionKind::Full,
            Event::SectionPart { kind, .. } => matches!(self, Part::Memory) && *kind == SectionKind::End,
            Event::Command(_) => false,
            _ => true,
        }
    }
}

/// Passes over a part of a checkpoint. False if something is wrong with it, or the input ends.
fn pass(source: &mut Source, decoder: &mut Decoder, part: Part) -> io::Result<bool> {
    loop {
        let (is_end, len) = match next_event(source, decoder) {
            Ok(Some((event, _))) if !part.may_hold(&event) => return Ok(false),
            Ok(Some((event, read))) => (event == Event::Eof, read.len()),
            Err(DriveError::Io(error)) => return Err(error),
            Ok(None) | Err(_) => return Ok(false),
        };
        source.consume(len);
        if is_end {
            return Ok(true);
        }
    }
}

/// Takes the message that tells how many bytes of device sections come; `None` if another is next.
pub(super) fn devices_len(source: &mut Source) -> io::Result<Option<u64>> {
    source.fill(DEVICES_LEN)?;
    let len = match source.window().first_chunk::<DEVICES_LEN>() {
        Some([message @ .., a, b, c, d, e, f, g, h]) if message == &DEVICES => {
            u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])
        }
        _ => return Ok(None),
    };
    source.consume(DEVICES_LEN);
    Ok(Some(len))
}
