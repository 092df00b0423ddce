//! What can be wrong with a description, or with a device section that is read with one.

use qevm_wire::{Blame, Fault};

/// Errors of the description and of the sections it describes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmdescError {
    /// The text is not JSON.
    #[error("the description is not JSON here: {expected} expected, {} found", found.map_or_else(|| "the end".to_owned(), |c| format!("{:?}", char::from(c))))]
    Json {
        /// What the grammar allows here.
        expected: &'static str,
        /// The byte found, `None` at the end of the text.
        found: Option<u8>,
    },
    /// An object of the description lacks a key without which it means nothing.
    #[error("{object} of the description has no \"{key}\"")]
    MissingKey {
        /// The kind of object, e.g. `"field"`.
        object: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A subsection starts with another byte than its marker.
    #[error("subsection '{name}' must start with {expected:#04x}, found {found:#04x}")]
    SubsectionMarker {
        /// Name of the subsection that the description puts here.
        name: String,
        /// The byte found.
        found: u8,
        /// The marker.
        expected: u8,
    },
    /// The stream holds another subsection than its description says.
    #[error("subsection is '{found}', expected '{expected}'")]
    SubsectionName {
        /// The name found, escaped.
        found: String,
        /// The name in the description.
        expected: String,
    },
    /// The stream holds another version of a subsection than its description says.
    #[error("subsection '{name}' has version {found}, expected {expected}")]
    SubsectionVersion {
        /// The subsection.
        name: String,
        /// The version found.
        found: u32,
        /// The version in the description.
        expected: u32,
    },
    /// What a structure contains does not add up to the size the description gives for it.
    #[error("the content of '{vmsd_name}' takes {content} bytes, but its description says {declared}")]
    StructSize {
        /// Name of the structure's VMSD.
        vmsd_name: String,
        /// Bytes its fields and subsections take.
        content: u64,
        /// Bytes the description gives.
        declared: u64,
    },
    /// A section's length differs from what its description adds up to.
    #[error("the section is {found} bytes long, its description adds up to {expected}")]
    SectionSize {
        /// Bytes of the section body.
        found: u64,
        /// Bytes its description adds up to.
        expected: u64,
    },
    /// A list or tree in a section disagrees with its description or has a bad element marker.
    #[error("{what} is {found}, expected {expected}")]
    List {
        /// What disagrees, e.g. `"element marker"`.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The value expected.
        expected: u64,
    },
}

impl Blame for VmdescError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}
