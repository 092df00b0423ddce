//! What can go wrong when channels synchronise.

use super::{FlushMode, Waiting};
use qevm_wire::{Blame, Fault};

/// What went wrong when channels were to synchronise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// A channel was closed although the main channel has announced a synchronisation that it must take part in.
    #[error("channel {channel} ended before its SYNC packet for synchronisation {number} of the main channel")]
    MissingSync {
        /// Number of the channel, from 0.
        channel: u8,
        /// Number of the synchronisation, from 0.
        number: u64,
    },
    /// A channel sent one SYNC packet more than the main channel announced.
    #[error("channel {channel} sent SYNC packet {number}, but the main channel announced only {number} from 0")]
    ExtraSync {
        /// Number of the channel, from 0.
        channel: u8,
        /// Number of the SYNC packet, from 0: how many the main channel announced.
        number: u64,
    },
    /// The source synchronises at other places than this machine expects.
    #[error("the source flushes multifd {found}, expected {expected} (multifd-flush-after-each-section)")]
    Mode {
        /// What the source does.
        found: FlushMode,
        /// What was configured here.
        expected: FlushMode,
    },
    /// The peer was silent for longer than the caller wants to wait.
    #[error("nothing came for too long: {waiting}")]
    TimedOut {
        /// What was being waited for.
        waiting: Waiting,
    },
    /// A reader has given up, so a reader that waits for it would wait for ever. Here too nothing more comes from the
    /// channel, whatever the reason: that is reported by the reader that gave up.
    #[error("a reader has given up: {reason}")]
    Aborted {
        /// Why.
        reason: String,
    },
    /// The main channel went on with memory after it had said that this is over.
    #[error("{what} comes after the end of memory")]
    AfterEnd {
        /// What came.
        what: &'static str,
    },
    /// A channel number that does not exist. The caller's fault.
    #[error("channel number {found}, but there are {channels} channels")]
    UnknownChannel {
        /// The number found, from 0.
        found: u8,
        /// How many channels there are.
        channels: u8,
    },
    /// A reader continued although the barrier told it to wait, or a step was taken out of order. The caller's fault.
    #[error("{what} {place}")]
    Order {
        /// What was done.
        what: &'static str,
        /// Why it is wrong here.
        place: &'static str,
    },
}

impl Blame for SyncError {
    fn fault(&self) -> Fault {
        match self {
            SyncError::Mode { .. } => Fault::Mismatch,
            SyncError::MissingSync { .. } | SyncError::TimedOut { .. } | SyncError::Aborted { .. } => Fault::Truncated,
            SyncError::UnknownChannel { .. } | SyncError::Order { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
