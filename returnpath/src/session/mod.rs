//! The return path as a whole, seen from the source: which message may come when, and what is missing.

mod source;
#[cfg(test)]
mod tests;

pub use source::{Action, SourceSession, Stage};

use crate::switchover::SwitchoverError;
use alloc::string::String;
use qevm_wire::{Blame, CountedString, Fault};

/// A message that came at the wrong time, or did not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// A message after SHUT, which is the last one.
    #[error("{message} came after SHUT, which is the last message")]
    AfterShut {
        /// The message.
        message: &'static str,
    },
    /// The destination said that it has loaded everything before it was sent.
    #[error("the destination has finished (SHUT 0) before everything was sent")]
    EarlyShut,
    /// A PONG to a PING that was not sent, or that was answered before.
    #[error("PONG {value:#x} answers no PING")]
    Pong {
        /// Its value.
        value: u32,
    },
    /// A page request although no guest runs at the destination.
    #[error("pages are requested although postcopy has not started")]
    RequestInPrecopy,
    /// A bitmap that was not asked for, or that came before.
    #[error("the received bitmap of RAM block '{block}' came, but was not asked for")]
    BitmapNotAsked {
        /// Name of the block.
        block: CountedString,
    },
    /// A bitmap that does not fit its block.
    #[error("the received bitmap of RAM block '{block}' is {found} bytes long, expected {expected}")]
    BitmapLength {
        /// Name of the block.
        block: CountedString,
        /// Its length in bytes.
        found: u64,
        /// The length for this block.
        expected: u64,
    },
    /// RESUME_ACK although it was not asked for.
    #[error("RESUME_ACK came, but was not asked for")]
    ResumeAck,
    /// A switchover ack at the wrong time.
    #[error(transparent)]
    Switchover(#[from] SwitchoverError),
    /// The return path was closed before SHUT.
    #[error("the return path ended before SHUT: {waiting}")]
    Ended {
        /// What was missing.
        waiting: String,
    },
    /// The destination was silent for longer than the caller wants to wait.
    #[error("nothing came on the return path for too long: {waiting}")]
    TimedOut {
        /// What was missing.
        waiting: String,
    },
    /// A step was taken out of order. The caller's fault.
    #[error("{what} {place}")]
    Order {
        /// What was done.
        what: &'static str,
        /// Why it is wrong here.
        place: &'static str,
    },
}

impl Blame for SessionError {
    fn fault(&self) -> Fault {
        match self {
            SessionError::Switchover(error) => error.fault(),
            SessionError::BitmapLength { .. } => Fault::Mismatch,
            SessionError::Ended { .. } | SessionError::TimedOut { .. } => Fault::Truncated,
            SessionError::Order { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
