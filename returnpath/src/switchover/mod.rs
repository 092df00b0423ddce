//! The switchover gate: capability `switchover-ack` (QEMU 8.1). The source does not stop its guest for the switchover
//! before the destination's devices have agreed to it.
//!
//! Who counts depends on the machine type, and both sides must do the same (`migration.switchover-ack-legacy`):
//!
//! | flow | the source waits for | the destination sends |
//! |---|---|---|
//! | legacy (8.1 to 11.0) | one ack, always | one ack, when the last of its devices has agreed; at once if it has none |
//! | counted (11.1) | one ack for each request of one of its devices | one ack each time a device agrees |

mod destination;
mod source;

use alloc::string::String;
pub use destination::{Ack, DestinationGate};
pub use qevm_wire::profile::SwitchoverAckFlow;
pub use source::{AckWait, SourceGate};

use qevm_wire::{Blame, Fault};

/// What went wrong with switchover acks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchoverError {
    /// An ack, although the capability is off at the source.
    #[error("a switchover ack came, but capability switchover-ack is off at the source")]
    Off,
    /// An ack, although no device asked for one.
    #[error(
        "a switchover ack came before any device asked for one: the destination acks on its own \
         (switchover-ack-legacy=on there, off here)"
    )]
    BeforeRequest,
    /// More acks than were asked for.
    #[error("{received} switchover acks came, expected {expected}")]
    TooMany {
        /// Acks that came.
        received: u64,
        /// Acks that were asked for.
        expected: u64,
    },
    /// The destination is gone or has finished without the acks.
    #[error("the return path ended: {waiting}")]
    Missing {
        /// What was missing.
        waiting: AckWait,
    },
    /// The acks did not come in the time that the caller gave them.
    #[error("no switchover ack came for too long: {waiting}")]
    TimedOut {
        /// What was missing.
        waiting: AckWait,
    },
    /// A device asked for an ack when the guest was stopped already. The caller's fault: the device is the source's
    /// own.
    #[error("device '{device}' asked for a switchover ack when the guest was stopped for the switchover already")]
    RequestAfterStop {
        /// The device.
        device: String,
    },
    /// A device agreed that never said it would.
    #[error(
        "device '{device}' is said to have loaded its initial data, and takes no part in switchover acks here (a VFIO device without PRE_COPY \
         does not): both sides need the same device"
    )]
    UnknownDevice {
        /// The device.
        device: String,
    },
    /// A device agreed for the second time.
    #[error("device '{device}' agreed to the switchover twice")]
    Repeated {
        /// The device.
        device: String,
    },
    /// The source opened the return path a second time.
    #[error("OPEN_RETURN_PATH came twice")]
    OpenedTwice,
    /// A device agreed, but the source does not hear it: what it agreed to came without a return path.
    #[error("device '{device}' agreed to the switchover, but the source has opened no return path")]
    NoReturnPath {
        /// The device.
        device: String,
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

impl Blame for SwitchoverError {
    fn fault(&self) -> Fault {
        match self {
            SwitchoverError::Off
            | SwitchoverError::BeforeRequest
            | SwitchoverError::NoReturnPath { .. }
            | SwitchoverError::UnknownDevice { .. } => Fault::Mismatch,
            SwitchoverError::Missing { .. } | SwitchoverError::TimedOut { .. } => Fault::Truncated,
            SwitchoverError::RequestAfterStop { .. } | SwitchoverError::Order { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}

#[cfg(test)]
mod tests;
