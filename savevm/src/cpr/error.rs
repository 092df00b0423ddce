//! What can be wrong with a side channel.

use qevm_wire::{Blame, CountedString, Fault};

/// The subsection with VFIO devices that are attached to an iommufd (11.1; 10.0 has none).
pub const VFIO_DEVICES: &str = "CprState/vfio devices";

/// What makes a side channel unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CprError {
    /// A byte that stands between two elements of a list is neither.
    #[error("the list has byte {found:#04x}, expected 1 (an element follows) or 0 (its end)")]
    List {
        /// The byte found.
        found: u8,
    },
    /// A byte that can only be one thing is another.
    #[error("{what} is {found:#04x}, expected {expected:#04x}")]
    Byte {
        /// What was read.
        what: &'static str,
        /// The byte found.
        found: u8,
        /// The only legal byte.
        expected: u8,
    },
    /// A name does not end with a zero byte, or has one before its end.
    #[error("a name of {len} bytes without a zero byte at its end, and there alone")]
    Name {
        /// Its length on the wire.
        len: u32,
    },
    /// A subsection that is not known, or came before.
    #[error("subsection '{found}', expected '{VFIO_DEVICES}', once")]
    Subsection {
        /// Its name.
        found: CountedString,
    },
}

impl Blame for CprError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}
