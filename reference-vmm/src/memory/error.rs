//! What can be wrong with a memory backend.

use std::io;
use std::path::PathBuf;

/// Why a memory backend cannot be used. The texts are those of QEMU 11.1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The machine is to have memory of another size.
    #[error("Machine memory size does not match the size of the memory backend")]
    Size,
    /// Huge pages come in powers of two.
    #[error("Hugepage size must be a power of 2")]
    HugePageSize,
    /// The host has no such huge pages.
    #[error("failed to create memfd: {}", words(.0))]
    Create(io::Error),
    /// The length does not go with the file, as one that is no multiple of its huge pages.
    #[error("failed to resize memfd to {size}: {}", words(.cause))]
    Resize {
        /// Bytes.
        size: u64,
        /// The system's reason.
        cause: io::Error,
    },
    /// The file cannot be opened.
    #[error("can't open backing store {} for guest RAM: {}", .path.display(), words(.cause))]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// The file is there and too short.
    #[error(
        "{id} backing store size {len:#x} is too small for 'size' option {size:#x} plus 'offset' option {offset:#x}"
    )]
    Short {
        /// The backend.
        id: String,
        /// Bytes of the file.
        len: u64,
        /// Bytes wanted.
        size: u64,
        /// From where.
        offset: u64,
    },
    /// The host has not so much memory of that kind.
    #[error("unable to map backing store for guest RAM: {}", words(.0))]
    Map(io::Error),
    /// The host cannot back all of it.
    #[error("preallocating memory failed: {}", words(.0))]
    Preallocate(io::Error),
    /// The predecessor of `cpr-transfer` has not passed this memory, so that it is not known where it is. A QEMU goes
    /// on with memory of its own.
    #[error("the source has passed no descriptor of RAM block '{0}': the guest's memory would be lost")]
    NotPassed(String),
    /// What the predecessor of `cpr-transfer` has passed has another length.
    #[error("the source has passed {found} bytes for RAM block '{name}', which has {expected} here")]
    PassedLength {
        /// The RAM block.
        name: String,
        /// Bytes of the file.
        found: u64,
        /// Bytes wanted.
        expected: u64,
    },
    /// Memory of a machine that is to take over from a predecessor, of which a part would be private.
    #[error("aux-ram-share=on and, for memory-backend objects, share=on are required to take a guest by cpr-transfer")]
    Private,
    /// The name is that of another RAM block.
    #[error("RAMBlock \"{0}\" already registered")]
    Name(String),
}

/// The system's words without their number, as QEMU gives them.
pub(super) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words).into()
}
