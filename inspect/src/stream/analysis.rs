//! What is found in a migration.

use super::signs::Signs;
use crate::failure::Failure;
use crate::ram::GuestRam;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::{SectionHeader, SectionKind};

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
    /// Bytes of VFIO devices' own data, whose layout the devices alone know, on the main channel and on page channels.
    pub device_bytes: u64,
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
    pub signs: Signs,
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

    /// The machine type of the configuration section, escaped for printing.
    pub fn machine(&self) -> Option<String> {
        self.configuration.as_ref().map(|c| c.machine.escape_ascii().to_string())
    }
}
