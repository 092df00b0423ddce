//! The error kinds of this crate, reported as [`Error`], with offset and path.

use qevm_wire::{Blame, Fault, Located, WireError};

/// An error of this crate: what, at which byte of what the peer sent, in which nested things.
pub type Error = Located<ErrorKind>;

/// The bounded reader of this crate's decoders.
pub type Reader<'a> = qevm_wire::Reader<'a, ErrorKind>;

/// What can go wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A primitive could not be read.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The protocol.
    #[error(transparent)]
    Nbd(#[from] NbdError),
}

impl Blame for ErrorKind {
    fn fault(&self) -> Fault {
        match self {
            ErrorKind::Wire(kind) => kind.fault(),
            ErrorKind::Nbd(kind) => kind.fault(),
        }
    }

    fn needed(&self) -> Option<u64> {
        match self {
            ErrorKind::Wire(kind) => kind.needed(),
            ErrorKind::Nbd(_) => None,
        }
    }
}

/// What is wrong with what a peer says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// A chunk has a type that was not asked for.
    #[error("chunk type {found}, expected 0 (NONE) to 2 (OFFSET_HOLE) or an error")]
    ChunkType {
        /// The type found.
        found: u16,
    },
    /// A chunk has flags that no chunk has.
    #[error("chunk flags {found:#x}, expected 0 or 1 (DONE)")]
    ChunkFlags {
        /// The flags found.
        found: u16,
    },
    /// A chunk's length does not fit its type.
    #[error("length {found} of a chunk of type {chunk}, expected {expected}")]
    ChunkLength {
        /// The chunk's type.
        chunk: u16,
        /// The length found, in bytes.
        found: u32,
        /// The length expected, or the least of them.
        expected: u32,
    },
    /// A reply is to a request that was not made.
    #[error("a reply to request {found:#x}, expected one to {expected:#x}")]
    Cookie {
        /// The cookie found.
        found: u64,
        /// The cookie of the request that was made.
        expected: u64,
    },
    /// A reply has bytes that were not asked for.
    #[error("bytes {found:#x} to {found_end:#x} in a reply, expected some of {start:#x} to {end:#x}")]
    Range {
        /// The first byte found.
        found: u64,
        /// The byte after the last one.
        found_end: u64,
        /// The first byte asked for.
        start: u64,
        /// The byte after the last one.
        end: u64,
    },
}

impl Blame for NbdError {
    fn fault(&self) -> Fault {
        match self {
            NbdError::ChunkType { .. } => Fault::Unsupported,
            NbdError::Cookie { .. } | NbdError::Range { .. } => Fault::Mismatch,
            _ => Fault::Malformed,
        }
    }
}
