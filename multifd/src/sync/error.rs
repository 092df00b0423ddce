//! What a peer can do wrong when channels synchronise.

use qevm_wire::{Blame, Fault};

/// What went wrong when channels were to synchronise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// A channel number that does not exist. The caller's fault, not a peer's.
    #[error("channel number {found}, but there are {channels} channels")]
    UnknownChannel {
        /// The number found, from 0.
        found: u8,
        /// How many channels there are.
        channels: u8,
    },
}

impl Blame for SyncError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}
