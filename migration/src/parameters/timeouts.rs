//! How long each side waits for what.

use std::time::Duration;

/// How long a source or a destination waits before a migration fails or, where the guest went before its memory, is
/// paused: parameters of this crate alone, beside QEMU's. All are in milliseconds, and 0 is for as long as it takes.
/// They may change while a migration runs.
///
/// The defaults suit a WAN: a round trip of a second, minutes without the link. Time for which this process is stopped
/// does not count where a connection is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// `x-connect-timeout`: for the look-up of the destination's name and for each connection to it.
    pub connect_ms: u64,
    /// `x-handshake-timeout`: for a TLS handshake, for a connection to say what it is, and for the next channel of a
    /// source.
    pub handshake_ms: u64,
    /// `x-idle-timeout`: for a connection to take a byte that is written, and at a destination for any connection of
    /// the migration to bring one.
    pub idle_ms: u64,
    /// `x-switchover-timeout`: for the destination's answers while the guest is paused, or at the destination before
    /// its memory.
    pub switchover_ms: u64,
    /// `x-handover-timeout`: for the peer's host to acknowledge the last word, and for a source to confirm it.
    pub handover_ms: u64,
    /// `x-tcp-user-timeout`: for the peer's host to acknowledge what was sent (TCP_USER_TIMEOUT). 0 is as long as
    /// `x-idle-timeout`, or as `keep-alive-*` says where an address has that on; see [`KeepAlive`](crate::KeepAlive).
    /// It counts from the next connection on.
    pub tcp_user_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            connect_ms: 30_000,
            handshake_ms: 10_000,
            idle_ms: 300_000,
            switchover_ms: 120_000,
            handover_ms: 10_000,
            tcp_user_ms: 0,
        }
    }
}

impl Timeouts {
    /// Those that no wait ends: as a QEMU waits.
    pub const NONE: Timeouts =
        Timeouts { connect_ms: 0, handshake_ms: 0, idle_ms: 0, switchover_ms: 0, handover_ms: 0, tcp_user_ms: 0 };

    /// `x-connect-timeout`, if there is one.
    pub fn connect(&self) -> Option<Duration> {
        limit(self.connect_ms)
    }

    /// `x-handshake-timeout`, if there is one.
    pub fn handshake(&self) -> Option<Duration> {
        limit(self.handshake_ms)
    }

    /// `x-idle-timeout`, if there is one.
    pub fn idle(&self) -> Option<Duration> {
        limit(self.idle_ms)
    }

    /// `x-switchover-timeout`, if there is one.
    pub fn switchover(&self) -> Option<Duration> {
        limit(self.switchover_ms)
    }

    /// `x-handover-timeout`, if there is one.
    pub fn handover(&self) -> Option<Duration> {
        limit(self.handover_ms)
    }

    /// What the system is told for a connection whose address says of keep-alive probes itself how they are, or not.
    pub(crate) fn tcp_user(&self, keep_alive: bool) -> Option<Duration> {
        limit(self.tcp_user_ms).or_else(|| self.idle().filter(|_| !keep_alive))
    }
}

fn limit(milliseconds: u64) -> Option<Duration> {
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}
