//! What can be wrong with a payload.

use super::method::Compression;
use qevm_wire::{Blame, Fault};

/// What is wrong with the payload of a packet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompressionError {
    /// The payload is not what its method makes.
    #[error("payload is no {method} data: {what}")]
    Corrupt {
        /// The method.
        method: Compression,
        /// What is wrong.
        what: &'static str,
    },
    /// The payload gives fewer or more bytes than its pages are long.
    #[error("payload gives {found} bytes, expected {expected}")]
    Length {
        /// Bytes that came out; one too many if there would be more.
        found: u64,
        /// Bytes of the pages.
        expected: u64,
    },
    /// Bytes of the payload are left when all pages are complete.
    #[error("{left} of {len} bytes of the payload are left over after its pages")]
    LeftOver {
        /// Bytes left.
        left: u64,
        /// Length of the payload.
        len: u64,
    },
    /// The length of a page's data, in front of the data of `qpl` and `uadk`.
    #[error("length of page {index} is {found}, expected at most {max}")]
    PageLength {
        /// The page's place in the packet, from 0.
        index: u32,
        /// The length found, in bytes.
        found: u64,
        /// The highest possible.
        max: u64,
    },
    /// The payload needs hardware to be read.
    #[error("{method} data cannot be read without its hardware: {what}")]
    Hardware {
        /// The method.
        method: Compression,
        /// What was found.
        what: &'static str,
    },
    /// The library of the method was left out when this program was built.
    #[error("{method} data cannot be handled: qevm-multifd was built without feature `{feature}`")]
    NotBuilt {
        /// The method.
        method: Compression,
        /// The feature of this crate that has it.
        feature: &'static str,
    },
    /// A level that the method does not have. The caller's fault.
    #[error("level {found} of {method}, expected {min} to {max}")]
    Level {
        /// The method.
        method: Compression,
        /// The level found.
        found: i32,
        /// The lowest level.
        min: i32,
        /// The highest level.
        max: i32,
    },
    /// A payload was not taken as it is to be. The caller's fault.
    #[error("{what} {place}")]
    Order {
        /// What was done.
        what: &'static str,
        /// Why it is wrong here.
        place: &'static str,
    },
}

impl Blame for CompressionError {
    fn fault(&self) -> Fault {
        match self {
            CompressionError::Hardware { .. } | CompressionError::NotBuilt { .. } => Fault::Unsupported,
            CompressionError::Level { .. } | CompressionError::Order { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
