//! What makes the framing of a stream unreadable.

use crate::framing::{self, SectionKind};
use qevm_wire::{Blame, CountedString, Fault};

/// What makes the framing of a stream unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The input is no QEMU migration stream.
    #[error("stream magic {found:#010x}, expected {:#010x} ('QEVM')", framing::MAGIC)]
    Magic {
        /// The word found.
        found: u32,
    },
    /// A stream of another version.
    #[error("stream version {found}, expected {}", framing::VERSION)]
    Version {
        /// The version found.
        found: u32,
    },
    /// The byte where a section, a command or the end must start is none of the type bytes.
    #[error("section type {found:#04x}, expected START (1), PART (2), END (3), FULL (4), COMMAND (8) or the end (0)")]
    SectionType {
        /// The byte found.
        found: u8,
    },
    /// An item that is only legal elsewhere in a stream.
    #[error("{what} (type {found:#04x}) {place}")]
    Misplaced {
        /// The type byte found.
        found: u8,
        /// Its name.
        what: &'static str,
        /// Why it is wrong here.
        place: &'static str,
    },
    /// A PART or END of a section that no START opened.
    #[error("{} of section {section_id}, which no START opened", kind.as_str())]
    UnknownSection {
        /// PART or END.
        kind: SectionKind,
        /// The id found.
        section_id: u32,
    },
    /// A section in a version that no QEMU release writes.
    #[error("version {found} of section '{idstr}', expected {expected}")]
    SectionVersion {
        /// Name of the section.
        idstr: CountedString,
        /// The version found.
        found: u32,
        /// The only version known.
        expected: u32,
    },
    /// What follows a section's content is no footer.
    #[error("byte {found:#04x} after the section's content, expected a footer ({:#04x})", framing::FOOTER)]
    NoFooter {
        /// The byte found.
        found: u8,
    },
    /// The footer is that of another section.
    #[error("footer of section {found}, expected {expected}")]
    FooterId {
        /// The id found.
        found: u32,
        /// Id of the section that ends.
        expected: u32,
    },
    /// No footer of the section is in the rest of the input, or none that a plausible item follows.
    #[error("no end of the section's content found in {searched} bytes")]
    EndNotFound {
        /// How many bytes of the content were searched.
        searched: u64,
    },
    /// The stream has no footers, so the end of this content can only come from a description of the device.
    #[error("the stream has no section footers: the length of the content must come from a description or schema")]
    LengthUnknown,
    /// The content of a package goes on past its end.
    #[error("the package ends {missing} bytes before its content does")]
    PackageTooShort {
        /// How many bytes the item at fault still needs.
        missing: u64,
    },
    /// A section id is used for another handler than before.
    #[error("section id {section_id} of '{found}', which was that of '{known}' before")]
    SectionIdReused {
        /// The id.
        section_id: u32,
        /// Name of the section that uses it now.
        found: CountedString,
        /// Name of the section that used it before.
        known: CountedString,
    },
    /// A page size of the advice is not this stream's.
    #[error("target page size {found:#x} in POSTCOPY_ADVISE, expected {expected:#x}")]
    AdvisedPageSize {
        /// The size found.
        found: u64,
        /// The size of the stream's target pages.
        expected: u64,
    },
    /// A range to be discarded that is empty, not whole pages, or not in its block.
    #[error(
        "range of {len:#x} bytes at {start:#x}, expected whole pages inside the block's used length {used_length:#x}"
    )]
    DiscardRange {
        /// Start of the range in bytes.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// Length of the block in bytes.
        used_length: u64,
    },
    /// Bytes after the end of the stream.
    #[error(
        "{found:#04x} and more after the end of the stream, expected a description ({:#04x}) or nothing",
        framing::VMDESCRIPTION
    )]
    TrailingBytes {
        /// The first of them.
        found: u8,
    },
    /// A length was given where no content of unknown length is. The caller's fault.
    #[error("the length of a section's content was given where none is expected")]
    NoBody,
}

impl Blame for StreamError {
    fn fault(&self) -> Fault {
        match self {
            StreamError::Version { .. } | StreamError::SectionVersion { .. } | StreamError::LengthUnknown => {
                Fault::Unsupported
            }
            StreamError::AdvisedPageSize { .. } => Fault::Mismatch,
            StreamError::NoBody => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
