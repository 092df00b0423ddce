//! What is found in a migration.

use super::layouts::Layouts;
use crate::bounds::Spool;
use crate::failure::Failure;
use crate::ram::{GuestRam, Keep, RamDigest};
use crate::report::{RamReport, Report, SectionReport};
use qevm_savevm::Event;
use qevm_savevm::command::Command;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::ram::RamBlock;
use qevm_savevm::vmdesc::Node;

/// What is to be done on the way.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What is kept of RAM pages.
    pub keep: Keep,
    /// Re-encode everything and compare.
    pub reencode: bool,
    /// Everything that belongs to the migration must be there; otherwise what is missing is only a note.
    pub complete: bool,
    /// The description of device sections must be whole and true; otherwise what is wrong with it is only a note.
    pub strict: bool,
    /// The source is alive: it waits for answers, so nothing may be read ahead, and further channels come elsewhere.
    pub live: bool,
    /// How device sections are read that no description tells about.
    pub layouts: Layouts,
    /// The room for temporary files.
    pub spool: Spool,
    /// Bytes of guest memory above which a stream is refused; `u64::MAX` where absent pages cost nothing.
    pub max_ram: u64,
}

/// Is told of things as they are read.
pub trait Observer {
    /// The main channel was read up to `offset`.
    fn position(&mut self, _offset: u64) {}
    /// Everything is read a second time.
    fn restarted(&mut self) {}
    /// Anything comes on the main channel.
    fn event(&mut self, _event: &Event<'_>) {}
    /// The configuration section is over; target pages have `page_size` bytes.
    fn configuration(&mut self, _page_size: u64) {}
    /// A section record starts.
    fn section(&mut self, _kind: SectionKind, _header: &SectionHeader, _offset: u64) {}
    /// A command came.
    fn command(&mut self, _command: &Command, _offset: u64) {}
    /// The stream is over; only a description may follow.
    fn end_of_stream(&mut self) {}
    /// The list of RAM blocks has `block`.
    fn ram_block(&mut self, _block: &RamBlock) {}
    /// The content of a device section, `body`, starts at `offset` of its file.
    fn body(&mut self, _header: &SectionHeader, _offset: u64, _body: &[u8]) {}
    /// The fields of a device section, once they are known: at the latest when the description comes.
    fn fields(&mut self, _header: &SectionHeader, _fields: &Node) {}
}

/// An observer that is not interested.
#[derive(Debug, Default)]
pub struct Ignore;
impl Observer for Ignore {}

/// One section: what a START or FULL opened.
#[derive(Debug, Clone)]
pub struct Section {
    /// START or FULL.
    pub kind: SectionKind,
    /// Name, ids and version.
    pub header: SectionHeader,
    /// Offset of its type byte.
    pub offset: u64,
    /// Bytes of all its records, from type byte to footer.
    pub size: u64,
    /// How many records: 1 for FULL, START and PARTs and END otherwise.
    pub records: u64,
    /// It is inside a package.
    pub packaged: bool,
}

/// One record of a section (START, PART, END, FULL) as [`Analysis::records`] lists them.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// Index into [`Analysis::sections`].
    pub section: usize,
    /// Which kind.
    pub kind: SectionKind,
    /// Offset of its type byte.
    pub offset: u64,
    /// Bytes from type byte to footer.
    pub size: u64,
}

/// What is found in a migration.
#[derive(Debug, Default)]
pub struct Analysis {
    /// Bytes accounted for, over all files.
    pub bytes: u64,
    /// Bytes of the main channel alone.
    pub main_bytes: u64,
    /// Bytes of device sections that belong to no named field.
    pub opaque_bytes: u64,
    /// What was re-encoded was identical.
    pub reencoded_identical: bool,
    /// The header was read.
    pub header: bool,
    /// The configuration section.
    pub configuration: Option<Configuration>,
    /// Whether sections have footers.
    pub footers: Option<bool>,
    /// The guest was moved by postcopy.
    pub postcopy: bool,
    /// Size of a target page.
    pub page_size: u64,
    /// The sections, in stream order.
    pub sections: Vec<Section>,
    /// Records of sections, in stream order; at most [`Analysis::MAX_RECORDS`].
    pub records: Vec<Record>,
    /// Commands as text, with their offsets; at most [`Analysis::MAX_RECORDS`].
    pub commands: Vec<(u64, String)>,
    /// How many commands there were.
    pub command_count: u64,
    /// Page records on the main channel, by kind.
    pub main_pages: PageCounts,
    /// The further channels, in words.
    pub channels: Vec<String>,
    /// The return paths, in words.
    pub return_path: Vec<String>,
    /// Pages came on channels that are not there, so no digest of RAM means anything.
    pub incomplete_ram: bool,
    /// Remarks that are no faults.
    pub notes: Vec<String>,
    /// How many there are beyond those that are kept.
    pub more_notes: u64,
    /// Offset and text of the description.
    pub description: Option<(u64, Vec<u8>)>,
    /// Signs of the writer's release.
    pub signs: super::writer::Signs,
    /// The guest's memory.
    pub ram: Option<GuestRam>,
    /// Why the stream is bad.
    pub failure: Option<Failure>,
}

/// Page records by kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct PageCounts {
    /// ZERO.
    pub zero: u64,
    /// PAGE.
    pub page: u64,
    /// XBZRLE.
    pub xbzrle: u64,
    /// COMPRESS_PAGE.
    pub compressed: u64,
    /// Pages of a mapped-ram file's page areas.
    pub mapped: u64,
}

impl Analysis {
    /// Lists that grow with the length of a migration stop growing here: 200 000 records are 5 MiB.
    pub const MAX_RECORDS: usize = 200_000;

    /// Remarks stop being kept here; the last one says how many more there are.
    const MAX_NOTES: usize = 5_000;

    /// Keeps a remark.
    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < Self::MAX_NOTES {
            self.notes.push(note);
        } else {
            self.more_notes += 1;
            self.notes.truncate(Self::MAX_NOTES);
            self.notes.push(format!("and {} more remarks of this kind", self.more_notes));
        }
    }

    pub(super) fn failed(failure: Failure) -> Self {
        Analysis { failure: Some(failure), ..Analysis::default() }
    }

    /// The report, with the given digest of each RAM block; none if page contents were jumped over or are missing.
    pub fn report(&mut self, digest: RamDigest) -> Report {
        let mut failure = self.failure.clone();
        let mut ram = Vec::new();
        if let Some(guest) = &mut self.ram {
            for index in 0..guest.blocks().len() {
                let value = match guest.keep() {
                    _ if self.incomplete_ram => None,
                    Keep::Nothing | Keep::Places => None,
                    _ => match guest.digest(index, digest) {
                        Ok(value) => Some((digest.key(), value)),
                        Err(error) => {
                            failure.get_or_insert_with(|| Failure::io("temporary file", 0, &error));
                            None
                        }
                    },
                };
                let block = &guest.blocks()[index];
                ram.push(RamReport {
                    name: block.name.clone(),
                    used_length: block.used_length,
                    pages: block.pages,
                    zero_pages: block.zero_pages,
                    digest: value,
                });
            }
        }
        Report {
            bytes: self.bytes,
            opaque_bytes: self.opaque_bytes,
            reencoded_identical: self.reencoded_identical,
            qemu_profile: super::writer::describe(self),
            sections: self.sections.iter().map(Section::report).collect(),
            ram,
            error: failure,
        }
    }

    /// The machine type of the configuration section, escaped for printing.
    pub fn machine(&self) -> Option<String> {
        self.configuration.as_ref().map(|c| c.machine.escape_ascii().to_string())
    }
}

impl Section {
    fn report(&self) -> SectionReport {
        SectionReport {
            idstr: self.header.idstr.to_string(),
            instance_id: self.header.instance_id,
            version_id: self.header.version_id,
            offset: self.offset,
            size: self.size,
        }
    }
}
