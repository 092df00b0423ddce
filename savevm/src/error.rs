//! The error kinds of this crate. Each module has its own enum next to the code that raises it; [`ErrorKind`] is their
//! union, and every function reports it as [`Error`], with offset and path.

use qevm_wire::{Blame, Fault, Located, WireError};

/// An error of this crate: what, at which byte, in which nested things.
pub type Error = Located<ErrorKind>;

/// The bounded reader of this crate's decoders.
pub type Reader<'a> = qevm_wire::Reader<'a, ErrorKind>;

/// What can go wrong on the main channel, one variant for each module that raises errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A primitive could not be read or written.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl Blame for ErrorKind {
    fn fault(&self) -> Fault {
        match self {
            ErrorKind::Wire(kind) => kind.fault(),
        }
    }
}
