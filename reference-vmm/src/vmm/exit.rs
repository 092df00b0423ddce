//! Why the guest was reset or switched off, and why the monitor ends.

use super::Event;
use crate::machine::Stop;
use serde_json::json;

/// Why the guest was reset or switched off. The names are QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// QMP's `quit`.
    HostQmpQuit,
    /// QMP's `system_reset`.
    HostQmpSystemReset,
    /// A signal that ends processes.
    HostSignal,
    /// The guest asked to be switched off.
    GuestShutdown,
    /// The guest asked to be reset, or ran into a triple fault.
    GuestReset,
}

impl Cause {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::HostQmpQuit => "host-qmp-quit",
            Cause::HostQmpSystemReset => "host-qmp-system-reset",
            Cause::HostSignal => "host-signal",
            Cause::GuestShutdown => "guest-shutdown",
            Cause::GuestReset => "guest-reset",
        }
    }

    /// Whether the guest wanted it.
    pub fn is_guest(self) -> bool {
        matches!(self, Cause::GuestShutdown | Cause::GuestReset)
    }

    pub(super) fn event(self, name: &'static str) -> Event {
        Event::now(name, Some(json!({ "guest": self.is_guest(), "reason": self.as_str() })))
    }
}

/// Why the monitor ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// `quit`.
    Quit,
    /// An incoming migration failed, for this reason.
    IncomingFailed(String),
    /// A vCPU cannot go on.
    GuestStopped(Stop),
    /// The guest was switched off, or reset where that counts as the same.
    ShutDown {
        /// By whom.
        cause: Cause,
        /// Why the guest stopped, if it did so by itself.
        stop: Option<Stop>,
    },
    /// The guest could not be reset, for this reason.
    ResetFailed(String),
    /// A signal that ends processes was received.
    Signal {
        /// Its number.
        number: i32,
        /// The process that sent it, if one did.
        sender: Option<Sender>,
    },
}

/// The sender of a signal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sender {
    /// Its number.
    pub pid: i32,
    /// How it was called; empty if it has ended already.
    pub name: String,
}
