//! Finding the end of content whose length the wire does not tell.
//!
//! The vmstate of a device carries no length. A reader that knows the device decodes it; any other has to look for the
//! footer: the byte `0x7e` and the section's id. Content can hold these five bytes by chance, so a place only counts
//! as the end if what follows it can start the next item of the stream.

use super::sections::Sections;
use super::{DecoderOptions, StreamError};
use crate::{Error, Reader, command, framing};
use qevm_wire::{Located, WireError};

/// Where the search in one section's content is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scan {
    /// What ends the content: bytes that belong to the section's layout (VFIO), then the footer.
    needle: [u8; Self::MAX_NEEDLE],
    needle_len: usize,
    /// The first position that was not looked at.
    position: usize,
    /// The first place with a footer that nothing plausible follows.
    doubtful: Option<usize>,
}

/// What is known about the surroundings of the content.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) sections: &'a Sections,
    pub(crate) options: &'a DecoderOptions,
    /// The input is all that there is of the stream or package.
    pub(crate) at_end: bool,
    pub(crate) in_package: bool,
}

enum Follows {
    Yes,
    No,
    /// This number of bytes must be there to know.
    Needs(usize),
}

impl Scan {
    const MAX_NEEDLE: usize = 13;

    /// A search for `layout` (at most 8 bytes) and the footer of section `section_id`.
    pub(crate) fn new(layout: &[u8], section_id: u32) -> Self {
        let mut needle = [0; Self::MAX_NEEDLE];
        let footer = [&[framing::FOOTER][..], &section_id.to_be_bytes()].concat();
        let mut needle_len = 0;
        for (slot, byte) in needle.iter_mut().zip(layout.iter().chain(&footer)) {
            *slot = *byte;
            needle_len += 1;
        }
        Scan { needle, needle_len, position: 0, doubtful: None }
    }

    /// The length of the content according to the first place at which it may end and that was not reported before.
    ///
    /// `content` starts at stream offset `at`.
    pub(crate) fn next_end(&mut self, content: &[u8], at: u64, around: &Around<'_>) -> Result<usize, Error> {
        let needle = &self.needle[..self.needle_len];
        loop {
            let rest = content.get(self.position..).unwrap_or_default();
            let Some(skipped) = rest.iter().position(|byte| *byte == needle[0]) else {
                self.position = self.position.max(content.len());
                return Err(self.need(content, content.len() as u64 + 1, at, around));
            };
            self.position += skipped;
            let candidate = &rest[skipped..];
            let known = candidate.len().min(needle.len());
            if candidate[..known] == needle[..known] {
                if known < needle.len() {
                    return Err(self.need(content, (self.position + needle.len()) as u64, at, around));
                }
                match follows(&candidate[needle.len()..], around) {
                    Follows::Yes => {
                        let length = self.position;
                        self.within_limit(length, at, around)?;
                        self.position += 1;
                        return Ok(length);
                    }
                    Follows::No => self.doubtful = self.doubtful.or(Some(self.position)),
                    Follows::Needs(bytes) => {
                        return Err(self.need(content, (self.position + needle.len() + bytes) as u64, at, around));
                    }
                }
            }
            self.position += 1;
        }
    }

    /// As [`next_end`](Scan::next_end) in a stream without footers: the content may end wherever the header of another
    /// section or the end of the stream follows.
    pub(crate) fn next_start(&mut self, content: &[u8], at: u64, around: &Around<'_>) -> Result<usize, Error> {
        loop {
            let rest = content.get(self.position..).unwrap_or_default();
            let answer = match rest {
                [] if around.in_package && around.at_end && self.position == content.len() => Follows::Yes,
                [] => return Err(self.need(content, content.len() as u64 + 1, at, around)),
                [framing::EOF, next @ ..] => match end_follows(next, around) {
                    // Zeroes are all over: only the last byte of the input can be taken for the end by itself.
                    Follows::Yes if next.is_empty() && !around.at_end => Follows::Needs(2),
                    Follows::Yes => yes_if(matches!(next, [] | [framing::VMDESCRIPTION, ..])),
                    Follows::Needs(bytes) => Follows::Needs(bytes + 1),
                    Follows::No => Follows::No,
                },
                [framing::SECTION_START | framing::SECTION_FULL, next @ ..] => match header_follows(next, around) {
                    Follows::Needs(bytes) => Follows::Needs(bytes + 1),
                    answer => answer,
                },
                _ => Follows::No,
            };
            match answer {
                Follows::Yes => {
                    let length = self.position;
                    self.within_limit(length, at, around)?;
                    self.position += 1;
                    return Ok(length);
                }
                // Half a header at the end of all input is none.
                Follows::Needs(bytes) if !around.at_end => {
                    return Err(self.need(content, (self.position + bytes) as u64, at, around));
                }
                Follows::Needs(_) | Follows::No => self.position += 1,
            }
        }
    }

    /// Where the content ends if no place is followed by a plausible item: then that item is likely to be what is
    /// broken, and not the footer.
    pub(crate) fn doubtful_end(&self) -> Option<usize> {
        self.doubtful
    }

    /// The error that asks for more input; at the end of all input, and above the limit, another.
    fn need(&self, content: &[u8], bytes: u64, at: u64, around: &Around<'_>) -> Error {
        if let Err(error) = self.within_limit(self.position, at, around) {
            return error;
        }
        if around.at_end {
            let searched = content.len() as u64;
            return Located::new(StreamError::EndNotFound { searched }.into(), at);
        }
        Located::new(WireError::Truncated { needed: bytes, available: content.len() as u64 }.into(), at)
    }

    fn within_limit(&self, length: usize, at: u64, around: &Around<'_>) -> Result<(), Error> {
        let (found, limit) = (length as u64, around.options.limits.device_section);
        if found > limit {
            let kind = WireError::LimitExceeded { what: "length of a device section", found, limit };
            return Err(Located::new(kind.into(), at));
        }
        Ok(())
    }
}

/// Whether what is left in `reader` can start the next item of the stream.
pub(crate) fn can_start_item(reader: &Reader<'_>, around: &Around<'_>) -> Result<bool, Error> {
    match follows(reader.rest(), around) {
        Follows::Yes => Ok(true),
        Follows::No => Ok(false),
        // That many are not there: the reader words the request for more.
        Follows::Needs(bytes) => reader.clone().take(bytes as u64).map(|_| true),
    }
}

/// Whether `rest` can start the next item of the stream.
fn follows(rest: &[u8], around: &Around<'_>) -> Follows {
    let Some(&first) = rest.first() else {
        return if around.at_end { Follows::Yes } else { Follows::Needs(1) };
    };
    let answer = match first {
        framing::EOF => end_follows(&rest[1..], around),
        framing::SECTION_START | framing::SECTION_FULL => header_follows(&rest[1..], around),
        framing::SECTION_PART | framing::SECTION_END => part_follows(&rest[1..], around),
        framing::COMMAND => command_follows(&rest[1..]),
        _ => Follows::No,
    };
    match answer {
        // The input is cut off inside what could be an item: nothing speaks against it.
        Follows::Needs(_) if around.at_end => Follows::Yes,
        Follows::Needs(bytes) => Follows::Needs(bytes + 1),
        answer => answer,
    }
}

fn end_follows(rest: &[u8], around: &Around<'_>) -> Follows {
    if around.in_package {
        return Follows::No;
    }
    if !around.options.vmdesc {
        // No reader waits for what may come after this end, so it must not be asked for, nor count if it is there.
        return Follows::Yes;
    }
    match rest.first() {
        None if around.at_end => Follows::Yes,
        None => Follows::Needs(1),
        Some(&framing::VMDESCRIPTION) => match rest.get(1..6) {
            None => Follows::Needs(6),
            Some(length) => {
                let bytes = u64::from(u32::from_be_bytes([length[0], length[1], length[2], length[3]]));
                yes_if(bytes <= around.options.limits.vmdesc && length[4] == b'{')
            }
        },
        Some(_) => yes_if(around.options.allow_trailing),
    }
}

fn header_follows(rest: &[u8], around: &Around<'_>) -> Follows {
    let Some((id, name)) = rest.split_first_chunk::<4>() else {
        return Follows::Needs(5);
    };
    let Some((&length, name)) = name.split_first() else {
        return Follows::Needs(5);
    };
    let length = usize::from(length);
    let whole = 5 + length + 8;
    // Names are checked as far as they are there, so that a chance match does not wait for a name's end.
    let shown = &name[..length.min(name.len())];
    if length == 0 || !shown.iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return Follows::No;
    }
    if let Some(known) = around.sections.get(u32::from_be_bytes(*id)) {
        let known = known.idstr.as_bytes();
        if known.len() != length || !known.starts_with(shown) {
            return Follows::No;
        }
    }
    // Versions say nothing: `eeprom` has 20061112.
    if name.len() < length + 8 { Follows::Needs(whole) } else { Follows::Yes }
}

fn part_follows(rest: &[u8], around: &Around<'_>) -> Follows {
    match rest.first_chunk::<4>() {
        None => Follows::Needs(4),
        Some(id) => yes_if(around.sections.started(u32::from_be_bytes(*id)).is_some()),
    }
}

fn command_follows(rest: &[u8]) -> Follows {
    match rest.first_chunk::<4>() {
        None => Follows::Needs(4),
        Some(&[a, b, c, d]) => {
            let shape = command::shape(u16::from_be_bytes([a, b]));
            yes_if(shape.is_some_and(|(_, lengths)| lengths.allow(u16::from_be_bytes([c, d]))))
        }
    }
}

fn yes_if(condition: bool) -> Follows {
    if condition { Follows::Yes } else { Follows::No }
}
