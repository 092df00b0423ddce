//! Page requests of postcopy: what the destination's guest waits for, and what the source sends next.
//!
//! [`PageRequests`] is the queue at the source, [`PageFaults`] the book of the destination. Both count in *host pages*
//! of each RAM block (its `page_size`), which is what a fault needs to be complete.

mod blocks;
mod faults;
mod page_set;
mod queue;
#[cfg(test)]
mod tests;

pub use blocks::{RequestBlock, RequestBlocks};
pub use faults::PageFaults;
pub use queue::{PageRequest, PageRequests};

use qevm_wire::{Blame, CountedString, Fault};

/// What is wrong with a page request, or with the blocks that requests refer to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The block is not one of the source's.
    #[error("pages of RAM block '{name}' are requested, which the source does not have")]
    UnknownBlock {
        /// Name of the block.
        name: CountedString,
    },
    /// The first request must name its block.
    #[error("the first page request names no RAM block")]
    NoBlock,
    /// A place or length that is no multiple of the host page size.
    #[error("{what} {found:#x} of a page request in RAM block '{name}' is no multiple of {page_size:#x}")]
    Unaligned {
        /// Which of both.
        what: &'static str,
        /// The value found, in bytes.
        found: u64,
        /// The host page size that it must be a multiple of.
        page_size: u64,
        /// Name of the block.
        name: CountedString,
    },
    /// A request for no bytes, or for bytes outside of the block.
    #[error("{len:#x} bytes at {start:#x} are requested in RAM block '{name}', whose used length is {used_length:#x}")]
    Range {
        /// Start of the request in bytes.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// Length of the block in bytes.
        used_length: u64,
        /// Name of the block.
        name: CountedString,
    },
    /// A list of blocks in which requests could not be told apart. The caller's fault.
    #[error("RAM block '{name}' {what}")]
    Blocks {
        /// Name of the block.
        name: CountedString,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A place in the list of blocks that it does not have. The caller's fault.
    #[error("RAM block at place {found}, but the list has {blocks}")]
    NoSuchBlock {
        /// The place, from 0.
        found: usize,
        /// How many blocks there are.
        blocks: usize,
    },
    /// A page fault outside of its block. The caller's fault.
    #[error("page fault at {found:#x} in RAM block '{name}', whose used length is {used_length:#x}")]
    Outside {
        /// The offset in bytes.
        found: u64,
        /// Length of the block in bytes.
        used_length: u64,
        /// Name of the block.
        name: CountedString,
    },
    /// A host page size that no host has. The caller's fault.
    #[error("host page size {found:#x}, expected a power of two")]
    HostPageSize {
        /// The size given, in bytes.
        found: u64,
    },
}

impl Blame for RequestError {
    fn fault(&self) -> Fault {
        match self {
            RequestError::UnknownBlock { .. } => Fault::Mismatch,
            RequestError::Blocks { .. }
            | RequestError::NoSuchBlock { .. }
            | RequestError::Outside { .. }
            | RequestError::HostPageSize { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
