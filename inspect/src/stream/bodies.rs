//! Where the contents of device sections end, and which fields they have.
//!
//! The length of a device's vmstate is not on the wire. The description at the end of the stream tells it, so it is
//! looked up first: at the end of a file, or, where the input cannot be jumped in, after the rest of the stream has
//! been put into an unlinked temporary file as soon as the first device section comes. Without a description the
//! decoder looks for footers, and [`Layouts`] for the fields.

use super::analysis::Analysis;
use super::layouts::{Layouts, Read};
use super::observer::Observer;
use super::reencode::first_difference;
use crate::bounds::Spool;
use crate::failure::Failure;
use crate::source::Source;
use qevm_savevm::framing::{Content, SectionHeader};
use qevm_savevm::vmdesc::{Description, VmdescError};
use qevm_savevm::{Decoder, ErrorKind, Event, Footers};
use qevm_wire::{Decode, DriveError, Limits, next_event};
use std::collections::{HashMap, VecDeque};
use std::io;

/// How much of the end of a file is looked at for a description, in steps: most have some ten KiB.
const TAIL_STEPS: [u64; 3] = [64 << 10, 2 << 20, u64::MAX];
/// Bytes before the description's text: end of stream, type, length.
const DESCRIPTION_HEADER: u64 = 6;
/// Contents that are held until a description comes after them.
const MAX_PENDING: usize = 16 << 20;

/// What is known about device sections.
#[derive(Debug)]
pub(super) struct Bodies {
    limits: Limits,
    /// For sections that no description tells about.
    layouts: Layouts,
    known: Option<Known>,
    /// What is wrong with a description is an error, and not a remark.
    strict: bool,
    /// [`locate`] has looked for the description that belongs to the stream.
    located: bool,
    /// The section being read, as index into the description's devices.
    current: Option<usize>,
    /// Sections whose content came before any description was known, or that none tells about.
    pending: Vec<Pending>,
    pending_bytes: usize,
    /// A PART or END came: what follows on a pipe is little enough to be put aside.
    iterated: bool,
    may_read_ahead: bool,
    spool: Spool,
}

#[derive(Debug)]
struct Known {
    /// Offset of the text in the file.
    offset: u64,
    description: Description,
    /// Devices of a name and instance that no section came for yet.
    waiting: HashMap<(Vec<u8>, u32), VecDeque<usize>>,
}

#[derive(Debug)]
struct Pending {
    header: SectionHeader,
    offset: u64,
    body: Vec<u8>,
    /// It is in a package, which no description tells about.
    packaged: bool,
}

impl Bodies {
    /// Nothing is known so far. `may_read_ahead`: all input is there, so that reading ahead waits for no peer.
    pub(super) fn new(may_read_ahead: bool, strict: bool, layouts: Layouts, spool: Spool) -> Self {
        Bodies {
            limits: Limits::default(),
            layouts,
            known: None,
            strict,
            located: false,
            current: None,
            pending: Vec::new(),
            pending_bytes: 0,
            iterated: false,
            may_read_ahead,
            spool,
        }
    }

    /// Looks for a description at the end of `source`, if that is possible without waiting.
    pub(super) fn look_ahead(&mut self, source: &mut Source) -> io::Result<()> {
        if self.known.is_none() && source.is_seekable() && self.may_read_ahead && !self.layouts.no_description {
            self.known = find(source, &self.limits)?;
        }
        Ok(())
    }

    /// The first device section after the guest's memory is next in `source`, for `decoder` to read. What was found at
    /// the end of the file need not belong to this stream, and what belongs to it need not be at the end of the file:
    /// volumes are longer than the stream in them, and hold what was in them before. So the device sections are gone
    /// through once in advance. True if that gave another description than the end of the file, or took it away.
    pub(super) fn locate(&mut self, decoder: &mut Decoder, source: &mut Source) -> io::Result<bool> {
        let wanted = self.iterated && self.may_read_ahead && !self.layouts.no_description && source.is_seekable();
        if self.located || !wanted {
            return Ok(false);
        }
        self.located = true;
        let mut end = ahead(decoder.ahead(), source)?;
        if end == Ahead::Lost && decoder.footers() != Footers::Absent {
            // Perhaps bytes that belong to something else follow the end of the stream.
            let mut tolerant = decoder.ahead();
            tolerant.allow_trailing();
            end = ahead(tolerant, source)?;
            if end != Ahead::Lost {
                decoder.allow_trailing();
            }
        }
        match end {
            Ahead::Description { offset, .. } if self.known.as_ref().is_some_and(|known| known.offset == offset) => {
                return Ok(false);
            }
            Ahead::Description { offset, text } => {
                // One that cannot be read is reported when the stream has come to it.
                let description = Description::parse_at(&text, offset, &self.limits).ok();
                self.known = description.map(|description| Known::new(offset, description));
            }
            Ahead::NoDescription => self.known = None,
            Ahead::Lost => return Ok(false),
        }
        Ok(true)
    }

    /// Size of a target page, as a description tells it that was found.
    pub(super) fn page_size(&self) -> Option<u64> {
        self.known.as_ref()?.description.page_size
    }

    /// How many CPUs the description tells of that was found.
    pub(super) fn cpus(&self) -> Option<usize> {
        Some(self.known.as_ref()?.description.devices.iter().filter(|device| device.name == "cpu").count())
    }

    /// A description was found.
    pub(super) fn is_known(&self) -> bool {
        self.known.is_some()
    }

    /// A PART or END came.
    pub(super) fn iterated(&mut self) {
        self.iterated = true;
    }

    /// A device section is next in `source`: on a pipe, puts aside what comes, to find the description.
    pub(super) fn spool_if_needed(&mut self, source: &mut Source) -> io::Result<()> {
        let wanted = self.known.is_none() && !self.layouts.no_description;
        if wanted && self.iterated && self.may_read_ahead && !source.is_seekable() {
            source.spool(&self.spool, self.limits.behind_memory())?;
            self.look_ahead(source)?;
        }
        Ok(())
    }

    /// A FULL section that is not in a package opens.
    pub(super) fn open(&mut self, header: &SectionHeader) {
        self.current = self.known.as_mut().and_then(|known| known.take(header));
    }

    /// How long the content of the open section is according to the description.
    pub(super) fn expected_len(&self) -> Option<u64> {
        let known = self.known.as_ref()?;
        Some(known.description.devices.get(self.current?)?.wire_size())
    }

    /// True if a layout that does not come from this stream explains `body` to its last byte.
    pub(super) fn explains(&self, header: &SectionHeader, offset: u64, body: &[u8], analysis: &Analysis) -> bool {
        self.layouts.read(header, offset, body, analysis).opaque == 0
    }

    /// Reads the content of a section, which is in a package or not. `analysis` is what was found before it.
    pub(super) fn read(
        &mut self,
        header: &SectionHeader,
        offset: u64,
        body: &[u8],
        packaged: bool,
        file: &str,
        analysis: &Analysis,
    ) -> Result<Read, Failure> {
        if let (Some(known), Some(index)) = (&self.known, self.current.take().filter(|_| !packaged)) {
            return known
                .read(index, header, offset, body, file, &self.limits)
                .or_else(|failure| self.doubt(failure, body));
        }
        // A description may still come, and even without one what follows can tell which release wrote the stream.
        if self.pending_bytes + body.len() <= MAX_PENDING {
            self.pending_bytes += body.len();
            self.pending.push(Pending { header: header.clone(), offset, body: body.to_vec(), packaged });
            return Ok(Read::opaque(body));
        }
        Ok(self.layouts.read(header, offset, body, analysis))
    }

    /// The stream is over, or nothing more can be read of it: what waits for a description is read without.
    pub(super) fn finish(&mut self, analysis: &mut Analysis, observer: &mut dyn Observer) {
        self.pending_bytes = 0;
        for Pending { header, offset, body, .. } in std::mem::take(&mut self.pending) {
            let read = self.layouts.read(&header, offset, &body, analysis);
            replace_opaque(read, &header, body.len(), analysis, observer);
        }
    }

    /// The description came, with its text at `offset`.
    pub(super) fn description(
        &mut self,
        text: &[u8],
        offset: u64,
        file: &str,
        analysis: &mut Analysis,
        observer: &mut dyn Observer,
    ) -> Result<(), Failure> {
        analysis.signs.description(text);
        analysis.description = Some((offset, text.to_vec()));
        if self.layouts.no_description {
            return Ok(());
        }
        if self.known.as_ref().is_none_or(|known| known.offset != offset) {
            self.known = None;
            match Description::parse_at(text, offset, &self.limits) {
                Ok(description) => self.known = Some(Known::new(offset, description)),
                Err(error) => {
                    let failure = Failure::located(file, error);
                    let read = self.doubt(failure, &[])?;
                    read.note.into_iter().for_each(|note| analysis.note(note));
                    return Ok(());
                }
            }
        }
        let strict = self.strict;
        let Some(known) = &mut self.known else { return Ok(()) };
        for pending in std::mem::take(&mut self.pending) {
            let index = if pending.packaged { None } else { known.take(&pending.header) };
            let Some(index) = index else {
                self.pending.push(pending);
                continue;
            };
            let Pending { header, offset, body, .. } = pending;
            let read = known.read(index, &header, offset, &body, file, &self.limits);
            let read = read.or_else(|failure| doubt(strict, failure, &body))?;
            replace_opaque(read, &header, body.len(), analysis, observer);
        }
        match known.first_waiting() {
            None => Ok(()),
            Some(device) => {
                let message = format!("it lists '{}' instance {}, which no section holds", device.0, device.1);
                let failure = Failure::mismatch(file, offset, "description", message);
                let read = self.doubt(failure, &[])?;
                read.note.into_iter().for_each(|note| analysis.note(note));
                Ok(())
            }
        }
    }

    /// The description is bad, or does not fit to the section with this content.
    fn doubt(&self, failure: Failure, body: &[u8]) -> Result<Read, Failure> {
        doubt(self.strict, failure, body)
    }
}

fn doubt(strict: bool, failure: Failure, body: &[u8]) -> Result<Read, Failure> {
    match strict {
        true => Err(failure),
        false => Ok(Read { note: Some(failure.to_string()), ..Read::opaque(body) }),
    }
}

/// What a look ahead came to.
#[derive(Debug, PartialEq, Eq)]
enum Ahead {
    Description {
        offset: u64,
        text: Vec<u8>,
    },
    NoDescription,
    /// It did not come to the end of the stream.
    Lost,
}

/// Goes through `source` with `decoder` up to the description or the end of the stream, and back to where it was.
fn ahead(mut decoder: Decoder, source: &mut Source) -> io::Result<Ahead> {
    let here = source.offset();
    let found = loop {
        let (event, read) = match next_event(source, &mut decoder) {
            Ok(Some(next)) => next,
            Ok(None) => break Ahead::NoDescription,
            Err(DriveError::Io(error)) => return Err(error),
            Err(_) => break Ahead::Lost,
        };
        let (is_description, consumed) = (matches!(event, Event::VmDescription { .. }), read.len());
        source.consume(consumed);
        if is_description {
            let (offset, payload) = (source.offset(), decoder.payload_remaining());
            source.fill(payload as usize)?;
            break match source.window().get(..payload as usize) {
                Some(text) => Ahead::Description { offset, text: text.to_vec() },
                None => Ahead::NoDescription,
            };
        }
    };
    source.jump(here)?;
    Ok(found)
}

impl Known {
    fn new(offset: u64, description: Description) -> Self {
        let mut waiting: HashMap<_, VecDeque<usize>> = HashMap::new();
        for (index, device) in description.devices.iter().enumerate() {
            waiting.entry((device.name.clone().into_bytes(), device.instance_id)).or_default().push_back(index);
        }
        Known { offset, description, waiting }
    }

    fn take(&mut self, header: &SectionHeader) -> Option<usize> {
        self.waiting.get_mut(&(header.idstr.as_bytes().to_vec(), header.instance_id))?.pop_front()
    }

    fn first_waiting(&self) -> Option<(&str, u32)> {
        let index = self.waiting.values().flatten().min()?;
        self.description.devices.get(*index).map(|device| (device.name.as_str(), device.instance_id))
    }

    fn read(
        &self,
        index: usize,
        header: &SectionHeader,
        offset: u64,
        body: &[u8],
        file: &str,
        limits: &Limits,
    ) -> Result<Read, Failure> {
        let Some(device) = self.description.devices.get(index) else {
            return Ok(Read::opaque(body));
        };
        let path = || format!("section {} '{}'", header.section_id, header.idstr);
        if let Some(expected) = device.version()
            && expected != header.version_id
        {
            let message = format!("version {}, expected {expected} as described", header.version_id);
            return Err(Failure::mismatch(file, offset - 4, path(), message));
        }
        if header.content() == Content::Vfio {
            return Ok(Read::vfio(header, offset, body));
        }
        if header.content() != Content::Opaque && device.wire_size() != body.len() as u64 {
            // The description counts the records around a VFIO device's state as well.
            return Ok(Read::opaque(body));
        }
        match device.decode(body, offset, limits) {
            Ok(fields) => {
                let mut written = Vec::with_capacity(body.len());
                let encoded = fields.encode(&mut written);
                if let Some((place, message)) = first_difference(&written, body).filter(|_| encoded.is_ok()) {
                    let (file, kind) = (file.to_owned(), "reencode");
                    return Err(Failure { file, kind, offset: offset + place, path: path(), message });
                }
                Ok(Read { opaque: fields.opaque_bytes(), fields: Some(fields), note: None })
            }
            // QEMU 7.2 leaves entries of arrays out of the description that it writes all the same.
            Err(error) if matches!(error.kind, ErrorKind::Vmdesc(VmdescError::SectionSize { .. })) => {
                let note =
                    Some(format!("shown raw, as its description does not tell all of it: {}", error.within(path())));
                Ok(Read { note, ..Read::opaque(body) })
            }
            Err(error) if is_fault(&error.kind) => Err(Failure::located(file, error.within(path()))),
            Err(error) => {
                let note = Some(format!("not understood: {}", error.within(path())));
                Ok(Read { note, ..Read::opaque(body) })
            }
        }
    }
}

/// What a section of `len` bytes, which was opaque so far, is after all.
fn replace_opaque(
    read: Read,
    header: &SectionHeader,
    len: usize,
    analysis: &mut Analysis,
    observer: &mut dyn Observer,
) {
    analysis.opaque_bytes = analysis.opaque_bytes + read.opaque - len as u64;
    read.note.into_iter().for_each(|note| analysis.note(note));
    if let Some(fields) = &read.fields {
        observer.fields(header, fields);
    }
}

/// True if the section itself is wrong. Other errors can come from a description that does not tell the whole layout of
/// a type, which its sizes nevertheless bound.
fn is_fault(kind: &ErrorKind) -> bool {
    use VmdescError::{List, SubsectionMarker, SubsectionName, SubsectionVersion};
    matches!(
        kind,
        ErrorKind::Vmdesc(SubsectionMarker { .. } | SubsectionName { .. } | SubsectionVersion { .. } | List { .. })
    )
}

/// Looks for a description that ends where the file does.
fn find(source: &mut Source, limits: &Limits) -> io::Result<Option<Known>> {
    let total = source.total().unwrap_or(0);
    for step in TAIL_STEPS {
        let step = step.min(limits.vmdesc + DESCRIPTION_HEADER);
        let tail = source.tail(step)?;
        if tail.last() != Some(&b'}') {
            return Ok(None);
        }
        if let Some(start) = Description::find_at_end(&tail) {
            let text = &tail[start..];
            let offset = total - text.len() as u64;
            // A description that cannot be read is reported when the stream has come to it.
            return Ok(Description::parse_at(text, offset, limits)
                .ok()
                .map(|description| Known::new(offset, description)));
        }
    }
    Ok(None)
}
