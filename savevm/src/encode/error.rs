//! What a writer refuses.

use crate::{Error, ErrorKind};
use qevm_wire::{Blame, Fault};

/// Why a [`StreamWriter`](crate::StreamWriter) refuses to write something. Always the caller's fault; nothing was
/// written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// No decoder takes this here, and what it would say.
    #[error("no decoder takes this here: {reason}")]
    Refused {
        /// The decoder's error.
        reason: Box<ErrorKind>,
    },
    /// A decoder takes the bytes for another event, such as a footer in a stream without any.
    #[error("a decoder takes this for something else here")]
    TakenForElse,
    /// Content of a device section where none is due.
    #[error("content of a device section where none is due")]
    Content,
    /// More payload than is due.
    #[error("{found} bytes of payload, {remaining} are due")]
    PayloadInExcess {
        /// How many were given.
        found: u64,
        /// How many are due.
        remaining: u64,
    },
    /// Some of the payload was given, and the rest is not.
    #[error("{remaining} bytes of payload are due before this")]
    PayloadMissing {
        /// How many are due.
        remaining: u64,
    },
}

impl Blame for WriteError {
    fn fault(&self) -> Fault {
        Fault::Misuse
    }
}

/// What cannot be written is never the peer's fault.
pub(super) fn misuse(error: Error) -> Error {
    match error.fault() {
        Fault::Misuse => error,
        _ => error.map(|kind| WriteError::Refused { reason: Box::new(kind) }.into()),
    }
}
