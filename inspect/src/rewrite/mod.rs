//! Writing a migration again in another form: what `qevm convert` and `qevm send` do.
//!
//! Whatever form a migration came in (plain, multifd, mapped-ram, XBZRLE, postcopy), reading it gives a [`SavedGuest`]:
//! memory, device sections and description as a destination would have them. [`stream`] and [`mapped`] write that guest
//! as a new stream; [`mapped_file`] gives parts of the latter without writing it. Device sections keep their bytes;
//! memory is written once, each page in its last content.

mod capability;
pub mod channels;
mod front;
mod iterables;
pub mod mapped;
pub mod mapped_file;
pub mod stream;
mod unwritable;

use self::capability::{MAPPED_RAM, without_capability};
use self::iterables::Iterable;
use self::unwritable::{cannot_write, unsupported};
use crate::bounds::{Bounds, Spool};
use crate::failure::Error;
use crate::ram::{Copying, GuestRam, Keep, OrderedCopy, Stretch};
use crate::stream::{Inputs, Layouts, Observer, Settings, analyze};
use qevm_multifd::Uuid;
use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::ram::RamBlock;
use qevm_savevm::{Encoder, Event, StreamWriter};
use qevm_wire::PageGeometry;
use std::fs::File;

/// A guest as a migration left it.
#[derive(Debug)]
pub struct SavedGuest {
    /// The configuration section, without the capabilities that only concern the form.
    configuration: Option<Configuration>,
    /// Sections end in footers.
    footers: bool,
    pages: PageGeometry,
    ram_section: SectionHeader,
    /// The RAM blocks, without the words that only concern the form.
    blocks: Vec<RamBlock>,
    ram: GuestRam,
    /// Iterable sections beside `ram`.
    iterables: Vec<Iterable>,
    devices: Vec<Device>,
    description: Option<Vec<u8>>,
}

/// A device section.
#[derive(Debug)]
struct Device {
    header: SectionHeader,
    body: Vec<u8>,
    /// It came before the guest's memory and has to go there again.
    early: bool,
}

const RAM: &str = "ram";
/// A stream that is longer than the memory by more than this has pages twice.
const NOT_MEMORY: u64 = 64 << 20;

impl SavedGuest {
    /// Reads a migration to its end, and tells `position` how far the main channel was read.
    ///
    /// # Errors
    /// [`Error::Bad`] if the migration is bad, or has sections whose content depends on the form: state of devices that
    /// was still being read (VFIO), disks (`block`) and their bitmaps (`dirty-bitmap`).
    pub fn read(inputs: &mut Inputs, bounds: &Bounds, position: &mut dyn FnMut(u64)) -> Result<SavedGuest, Error> {
        Self::read_with(inputs, Keep::Contents, bounds.spool(), bounds.max_ram, position, None)
    }

    /// As [`read`](Self::read), to write it to a mapped-ram file: its pages go there as they come where that can be
    /// told beforehand, so that they need not be read twice. [`write_mapped`](Self::write_mapped) does the rest.
    ///
    /// # Errors
    /// As [`read`](Self::read); of kind `io` if the file, which is called `name` in errors, cannot be written.
    pub fn read_to_mapped(
        inputs: &mut Inputs,
        bounds: &Bounds,
        (file, name): (&File, &str),
        position: &mut dyn FnMut(u64),
    ) -> Result<SavedGuest, Error> {
        let wanted = Wanted { file, name, form: Form::Mapped };
        Self::read_with(inputs, Keep::Contents, bounds.spool(), bounds.max_ram, position, Some(wanted))
    }

    /// As [`read_to_mapped`](Self::read_to_mapped), to write it to a file as a plain stream. Pages go there only as
    /// long as each comes once and they come in order, as those of a guest that is stopped do.
    /// [`write_plain`](Self::write_plain) does the rest.
    ///
    /// # Errors
    /// As [`read_to_mapped`](Self::read_to_mapped).
    pub fn read_to_plain(
        inputs: &mut Inputs,
        bounds: &Bounds,
        (file, name): (&File, &str),
        position: &mut dyn FnMut(u64),
    ) -> Result<SavedGuest, Error> {
        let wanted = Wanted { file, name, form: Form::Plain { total: inputs.main.source.total() } };
        Self::read_with(inputs, Keep::Contents, bounds.spool(), bounds.max_ram, position, Some(wanted))
    }

    /// As [`read`](Self::read), with what `keep` says of memory.
    fn read_with(
        inputs: &mut Inputs,
        keep: Keep,
        spool: Spool,
        max_ram: u64,
        position: &mut dyn FnMut(u64),
        wanted: Option<Wanted<'_>>,
    ) -> Result<SavedGuest, Error> {
        let mut capture = Capture { wanted, ..Capture::new(position) };
        let settings = Settings {
            keep,
            reencode: false,
            complete: true,
            strict: false,
            live: false,
            layouts: Layouts::default(),
            spool,
            max_ram,
        };
        let mut analysis = analyze(inputs, &settings, &mut capture);
        if let Some(failure) = analysis.failure.take() {
            return Err(failure.into());
        }
        let file = &inputs.main.name;
        if let Some((header, offset)) = capture.unwritable {
            let message =
                "the content of this iterable section depends on how the migration went: it cannot be rewritten";
            return Err(unsupported(file, offset, &header.idstr.to_string(), message));
        }
        let (Some(ram), Some(ram_section)) = (analysis.ram.take(), capture.ram_section) else {
            return Err(unsupported(file, 0, "", "the stream has no 'ram' section: nothing to rewrite"));
        };
        Ok(SavedGuest {
            configuration: analysis.configuration.take().map(|c| without_capability(c, MAPPED_RAM)),
            footers: analysis.footers.unwrap_or(true),
            pages: PageGeometry::from_size(analysis.page_size).unwrap_or(PageGeometry::X86),
            ram_section,
            blocks: capture.blocks,
            ram,
            iterables: capture.iterables,
            devices: capture.devices,
            description: analysis.description.take().map(|(_, text)| text),
        })
    }

    /// The machine type, as the stream carries it; empty if it does not.
    pub fn machine(&self) -> String {
        self.configuration.as_ref().map_or(String::new(), |c| String::from_utf8_lossy(&c.machine).into_owned())
    }

    /// The guest's UUID (capability `validate-uuid`), all zero if the stream does not tell it.
    pub fn uuid(&self) -> Uuid {
        let subsections = self.configuration.iter().flat_map(|c| &c.subsections);
        let mut uuids = subsections.filter_map(|s| match s {
            ConfigurationSubsection::Uuid(uuid) => Some(Uuid(*uuid)),
            _ => None,
        });
        uuids.next_back().unwrap_or_default()
    }

    /// Size of a target page.
    pub fn page_geometry(&self) -> PageGeometry {
        self.pages
    }

    /// Bytes of memory that are not zero, to within the last pages: what a progress bar counts to.
    pub fn data_len(&self) -> u64 {
        self.ram.blocks().iter().map(|b| (b.pages - b.zero_pages) * self.pages.size()).sum()
    }

    /// Bytes of the stream after its end mark: the description, with its own mark and length.
    pub fn description_len(&self) -> u64 {
        self.description.as_ref().map_or(0, |text| text.len() as u64 + 5)
    }

    fn stream(&self) -> StreamWriter {
        StreamWriter::new(Encoder::new(self.pages), self.footers)
    }

    /// Calls `page` for each page that came, in order: block, offset in it, and content (`None` for zeroes).
    fn each_page(
        &mut self,
        block: usize,
        mut page: impl FnMut(u64, Option<&[u8]>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (size, len) = (self.pages.size(), self.blocks[block].used_length);
        self.ram.stretches(block, 0, len, |offset, stretch| match stretch {
            Stretch::Absent(_) => Ok(()),
            Stretch::Zero(pages) => (0..pages).try_for_each(|number| page(offset + number * size, None)),
            Stretch::Data(contents) => {
                let mut offsets = (offset..).step_by(size as usize);
                let mut contents = contents.chunks_exact(size as usize);
                contents.try_for_each(|content| page(offsets.next().unwrap_or(offset), Some(content)))
            }
        })
    }

    fn devices(&self, early: bool) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(move |device| device.early == early)
    }
}

/// A file that is to be written.
struct Wanted<'p> {
    file: &'p File,
    /// As errors call it.
    name: &'p str,
    form: Form,
}

enum Form {
    Mapped,
    Plain {
        /// Length of the input.
        total: Option<u64>,
    },
}

struct Capture<'p> {
    wanted: Option<Wanted<'p>>,
    configuration: Option<Configuration>,
    position: &'p mut dyn FnMut(u64),
    ram_section: Option<SectionHeader>,
    blocks: Vec<RamBlock>,
    devices: Vec<Device>,
    iterables: Vec<Iterable>,
    /// An iterable section that cannot be rewritten.
    unwritable: Option<(SectionHeader, u64)>,
    /// Number of the iterable section that is being read.
    current: Option<usize>,
    memory_came: bool,
}

impl<'p> Capture<'p> {
    fn new(position: &'p mut dyn FnMut(u64)) -> Self {
        Capture {
            wanted: None,
            configuration: None,
            position,
            ram_section: None,
            blocks: Vec::new(),
            devices: Vec::new(),
            iterables: Vec::new(),
            unwritable: None,
            current: None,
            memory_came: false,
        }
    }
}

impl Observer for Capture<'_> {
    fn position(&mut self, offset: u64) {
        (self.position)(offset);
    }

    fn restarted(&mut self) {
        (self.ram_section, self.unwritable, self.memory_came) = (None, None, false);
        self.iterables.clear();
        self.blocks.clear();
        self.devices.clear();
    }

    fn copy(&mut self, ram: &GuestRam, _: Option<usize>) -> Option<Copying> {
        let (Wanted { file, name, form }, section) = (self.wanted.as_ref()?, self.ram_section.as_ref()?);
        let configuration = self.configuration.clone().map(|c| without_capability(c, MAPPED_RAM));
        let pages = PageGeometry::from_size(ram.page_size())?;
        match form {
            Form::Mapped => front::copy(configuration, section, &self.blocks, pages, file, name),
            Form::Plain { total } => {
                let memory: u64 = self.blocks.iter().map(|block| block.used_length).sum();
                if total.is_some_and(|total| total > memory + memory / 256 + NOT_MEMORY) {
                    return None;
                }
                let mut stream = StreamWriter::new(Encoder::new(pages), true);
                let guest = (configuration.as_ref(), section, &self.blocks[..]);
                stream::front(&mut stream, guest, &self.iterables, &self.devices).ok()?;
                // If they cannot be copied now, they will be written later.
                OrderedCopy::new(file, name, stream, pages.size()).ok().map(|copy| Copying::Ordered(Box::new(copy)))
            }
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        if let Event::Configuration(configuration) = event {
            self.configuration = Some(configuration.clone());
        }
        if let Some(iterable) = self.current.and_then(|current| self.iterables.get_mut(current)) {
            iterable.event(event);
        }
    }

    fn payload(&mut self, bytes: &[u8]) {
        if let Some(iterable) = self.current.and_then(|current| self.iterables.get_mut(current)) {
            iterable.payload(bytes);
        }
    }

    fn section(&mut self, kind: SectionKind, header: &SectionHeader, offset: u64) {
        self.current = self.iterables.iter().position(|known| known.header.section_id == header.section_id);
        match kind {
            SectionKind::Start if header.idstr == RAM => self.ram_section = Some(header.clone()),
            SectionKind::Start if self.current.is_some() => {}
            SectionKind::Start => match Iterable::new(header) {
                Some(iterable) => {
                    self.current = Some(self.iterables.len());
                    self.iterables.push(iterable);
                }
                None => self.unwritable = Some((header.clone(), offset)),
            },
            SectionKind::Full => {}
            SectionKind::Part | SectionKind::End => self.memory_came = true,
        }
    }

    fn ram_block(&mut self, block: &RamBlock) {
        self.blocks.push(RamBlock { page_size: None, mapped_ram: None, ..block.clone() });
    }

    fn body(&mut self, header: &SectionHeader, _offset: u64, body: &[u8]) {
        self.devices.push(Device { header: header.clone(), body: body.to_vec(), early: !self.memory_came });
    }
}
