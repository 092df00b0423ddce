//! What a destination may not say.

use qevm_returnpath::{RequestError, SessionError};
use qevm_wire::{Blame, Fault};

/// Why a message on the return path is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReturnPathError {
    /// A message could not be read.
    #[error(transparent)]
    Message(#[from] qevm_returnpath::ErrorKind),
    /// A message that was not asked for, or that has no place at this time.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The destination speaks TLS, and what it says is an alert: it has taken the stream for a bad handshake.
    #[error(
        "the destination answers with an alert of TLS, which is off here (set 'tls-creds' at both sides, or at neither)"
    )]
    TlsAlert,
    /// A request for pages that there are not.
    #[error(transparent)]
    Request(#[from] RequestError),
}

impl Blame for ReturnPathError {
    fn fault(&self) -> Fault {
        match self {
            ReturnPathError::Message(kind) => kind.fault(),
            ReturnPathError::Session(kind) => kind.fault(),
            ReturnPathError::TlsAlert => Fault::Mismatch,
            ReturnPathError::Request(kind) => kind.fault(),
        }
    }
}
