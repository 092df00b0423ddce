//! What goes wrong with a device in a migration.

use super::DeviceState;
use rustix::io::Errno;

/// Why a device cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VFIO device '{device}': {failure}")]
pub struct VfioError {
    /// Its name.
    pub device: String,
    /// What went wrong.
    pub failure: Failure,
}

/// What went wrong with a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// A change of the state.
    #[error("its driver refused to go from {from} to {to} ({errno}) and left it in {left}")]
    Arc {
        /// The state before.
        from: DeviceState,
        /// The state that it was to go to.
        to: DeviceState,
        /// Where the kernel has left it; ERROR if that cannot be learnt either.
        left: DeviceState,
        /// The kernel's answer.
        errno: Errno,
    },
    /// No descriptor came where the protocol has one.
    #[error("its driver went from {from} to {to} and gave no descriptor for its state")]
    NoData {
        /// The state before.
        from: DeviceState,
        /// The state now.
        to: DeviceState,
    },
    /// A read.
    #[error("its state cannot be read in {state} after {done} bytes ({errno})")]
    Read {
        /// The state of the device.
        state: DeviceState,
        /// Bytes read before.
        done: u64,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A write.
    #[error("it refused its state after {done} bytes ({errno})")]
    Write {
        /// Bytes written before.
        done: u64,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The guest went on although the rest of the state was being sent already.
    #[error("its guest was stopped and went on after {done} bytes of its state had been sent, which are of no use now")]
    BrokenOff {
        /// Bytes sent.
        done: u64,
    },
    /// A question about the size of the state.
    #[error("{query} failed in {state} ({errno})")]
    Query {
        /// The kernel's name of the call.
        query: &'static str,
        /// The state of the device.
        state: DeviceState,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The log of the pages that it writes to.
    #[error("{call} failed ({errno})")]
    Log {
        /// The kernel's name of the call.
        call: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// An answer that cannot be true.
    #[error("its driver is wrong: {query} says {found}, expected {expected}")]
    Implausible {
        /// The kernel's name of the call.
        query: &'static str,
        /// What it said.
        found: u64,
        /// What can be true.
        expected: &'static str,
    },
    /// It is in a state in which this cannot be done.
    #[error("it is in {state}, in which it is impossible to {what}")]
    Misplaced {
        /// Its state.
        state: DeviceState,
        /// What was tried.
        what: &'static str,
    },
    /// It has failed, and a reset did not bring it back.
    #[error("it is in ERROR after {cause}; the reset failed, too ({errno}), so its guest stays paused")]
    Lost {
        /// What failed first.
        cause: Box<Failure>,
        /// Why it was not reset.
        errno: Errno,
    },
    /// It can be migrated not at all.
    #[error("its driver offers no migration ({0})")]
    Unsupported(Errno),
}
