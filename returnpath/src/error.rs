//! The error kinds of this crate. Each idea has its own enum; [`ErrorKind`] is their union, and every function reports
//! it as [`Error`], with offset and path.

use crate::message::MessageType;
use crate::requests::RequestError;
use crate::session::SessionError;
use qevm_wire::{Blame, Fault, Located, WireError};

/// An error of this crate: what, at which byte of the return path, in which nested things.
pub type Error = Located<ErrorKind>;

/// The bounded reader of this crate's decoder.
pub type Reader<'a> = qevm_wire::Reader<'a, ErrorKind>;

/// What can go wrong on the return path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A primitive could not be read or written.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A page request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The order of messages.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Blame for ErrorKind {
    fn fault(&self) -> Fault {
        match self {
            ErrorKind::Wire(kind) => kind.fault(),
            ErrorKind::Message(kind) => kind.fault(),
            ErrorKind::Request(kind) => kind.fault(),
            ErrorKind::Session(kind) => kind.fault(),
        }
    }

    fn needed(&self) -> Option<u64> {
        match self {
            ErrorKind::Wire(kind) => kind.needed(),
            _ => None,
        }
    }
}

/// What is wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// A message type that no QEMU release up to 11.1 has.
    #[error("message type {found}, expected 1 (SHUT) to 7 (SWITCHOVER_ACK)")]
    Type {
        /// The type found.
        found: u16,
    },
    /// The length does not fit the type.
    #[error("length {found} of {message}, expected {expected}")]
    Length {
        /// The message.
        message: MessageType,
        /// The length found, in bytes.
        found: u16,
        /// The only legal length, in bytes.
        expected: u16,
    },
    /// The length is outside of what the type, whose length varies, can have.
    #[error("length {found} of {message}, expected {min} to {max}")]
    LengthRange {
        /// The message.
        message: MessageType,
        /// The length found, in bytes.
        found: u16,
        /// The lowest possible.
        min: u16,
        /// The highest possible.
        max: u16,
    },
    /// Bytes after SHUT, which is the last message.
    #[error("{found:#04x} and more after SHUT, which is the last message")]
    AfterShut {
        /// The first of them.
        found: u8,
    },
    /// An event was to be written in a place where it cannot be. The caller's fault.
    #[error("{what} {place}")]
    Order {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        place: &'static str,
    },
}

impl Blame for MessageError {
    fn fault(&self) -> Fault {
        match self {
            MessageError::Type { .. } => Fault::Unsupported,
            MessageError::Order { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
