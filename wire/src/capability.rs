//! Migration capabilities: their names, the releases that have them, and the combinations that QEMU refuses.
//!
//! Source: `query-migrate-capabilities` of QEMU 5.2, 7.2, 10.0 and 11.1, and what their `migrate-set-capabilities`
//! accepts. [`check`] answers as the release does that is asked about; what a release does not check is not refused.

mod rules;
#[cfg(test)]
mod tests;

pub use rules::{Context, Rejection, check};

use crate::QemuVersion;
use core::fmt;
use core::str::FromStr;

macro_rules! capabilities {
    ($($(#[$doc:meta])* $variant:ident, $name:literal, $since:expr, $removed:expr;)*) => {
        /// A migration capability, with QEMU's name. All are off by default.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Capability {
            $($(#[$doc])* $variant,)*
        }

        impl Capability {
            /// Every capability of QEMU 5.2 to 11.1, in the order in which 10.0 lists them, with those that only older
            /// releases have where these list them.
            pub const ALL: &[Capability] = &[$(Capability::$variant),*];

            /// QEMU's name.
            pub fn name(self) -> &'static str {
                match self { $(Capability::$variant => $name,)* }
            }

            /// The first release that has it.
            pub fn since(self) -> QemuVersion {
                match self { $(Capability::$variant => version($since),)* }
            }

            /// The first release that has it no longer.
            pub fn removed(self) -> Option<QemuVersion> {
                let removed: Option<(u16, u16)> = match self { $(Capability::$variant => $removed,)* };
                removed.map(version)
            }
        }
    };
}

capabilities! {
    /// `xbzrle`: pages that were sent before travel as differences.
    Xbzrle, "xbzrle", (1, 2), None;
    /// `rdma-pin-all`: all memory is pinned for RDMA at the start.
    RdmaPinAll, "rdma-pin-all", (2, 0), None;
    /// `auto-converge`: vCPUs are slowed down until memory converges.
    AutoConverge, "auto-converge", (1, 6), None;
    /// `zero-blocks`: without effect for long.
    ZeroBlocks, "zero-blocks", (1, 6), Some((11, 0));
    /// `compress`: pages are compressed one by one on the main channel.
    Compress, "compress", (2, 4), Some((9, 1));
    /// `events`: status changes are QMP events.
    Events, "events", (2, 4), None;
    /// `postcopy-ram`: the guest may run at the destination before its memory is there.
    PostcopyRam, "postcopy-ram", (2, 6), None;
    /// `x-colo`: checkpoints for a standby machine.
    XColo, "x-colo", (2, 8), None;
    /// `release-ram`: the source frees pages that were sent in postcopy.
    ReleaseRam, "release-ram", (2, 9), None;
    /// `block`: disk images travel on the main channel.
    Block, "block", (2, 10), Some((9, 1));
    /// `return-path`: the destination answers on the main connection.
    ReturnPath, "return-path", (2, 10), None;
    /// `pause-before-switchover`: the source waits for `migrate-continue` before it switches over.
    PauseBeforeSwitchover, "pause-before-switchover", (2, 11), None;
    /// `multifd`: pages travel on channels of their own.
    Multifd, "multifd", (4, 0), None;
    /// `dirty-bitmaps`: block dirty bitmaps travel, too.
    DirtyBitmaps, "dirty-bitmaps", (2, 12), None;
    /// `postcopy-blocktime`: the destination measures how long vCPUs wait for pages.
    PostcopyBlocktime, "postcopy-blocktime", (3, 0), None;
    /// `late-block-activate`: block devices are activated when the guest starts.
    LateBlockActivate, "late-block-activate", (3, 0), None;
    /// `x-ignore-shared`: shared memory does not travel.
    XIgnoreShared, "x-ignore-shared", (4, 0), None;
    /// `validate-uuid`: both machines must have the same UUID.
    ValidateUuid, "validate-uuid", (4, 2), None;
    /// `background-snapshot`: a snapshot of the moment at which it was started.
    BackgroundSnapshot, "background-snapshot", (6, 0), None;
    /// `zero-copy-send`: page channels send from guest memory without copying.
    ZeroCopySend, "zero-copy-send", (7, 1), None;
    /// `postcopy-preempt`: requested pages travel on a channel of their own.
    PostcopyPreempt, "postcopy-preempt", (7, 1), None;
    /// `switchover-ack`: the destination's devices agree to the switchover.
    SwitchoverAck, "switchover-ack", (8, 1), None;
    /// `dirty-limit`: vCPUs are slowed down by their dirty rate.
    DirtyLimit, "dirty-limit", (8, 1), None;
    /// `mapped-ram`: pages have fixed places in a file.
    MappedRam, "mapped-ram", (9, 0), None;
}

const fn version((major, minor): (u16, u16)) -> QemuVersion {
    QemuVersion::new(major, minor)
}

impl Capability {
    /// True if the release has it.
    ///
    /// ```
    /// use qevm_wire::{Capability, QemuVersion};
    ///
    /// assert!(Capability::Compress.exists_in(QemuVersion::new(7, 2)));
    /// assert!(!Capability::Compress.exists_in(QemuVersion::new(10, 0)));
    /// assert!(!Capability::MappedRam.exists_in(QemuVersion::new(7, 2)));
    /// ```
    pub fn exists_in(self, qemu: QemuVersion) -> bool {
        qemu >= self.since() && self.removed().is_none_or(|removed| qemu < removed)
    }

    fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is no capability of QEMU 5.2 to 11.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown migration capability")]
pub struct UnknownCapability;

impl FromStr for Capability {
    type Err = UnknownCapability;

    fn from_str(name: &str) -> Result<Self, UnknownCapability> {
        Self::ALL.iter().copied().find(|capability| capability.name() == name).ok_or(UnknownCapability)
    }
}

/// The capabilities that are on.
///
/// ```
/// use qevm_wire::{Capabilities, Capability};
///
/// let on: Capabilities = [Capability::Multifd, Capability::ReturnPath].into_iter().collect();
/// assert!(on.contains(Capability::Multifd));
/// assert!(!on.contains(Capability::Xbzrle));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Capabilities(u32);

impl Capabilities {
    /// None is on.
    pub const NONE: Capabilities = Capabilities(0);

    /// True if this one is on.
    pub fn contains(self, capability: Capability) -> bool {
        self.0 & capability.bit() != 0
    }

    /// The same with this one switched.
    #[must_use]
    pub fn with(self, capability: Capability, on: bool) -> Self {
        if on { Capabilities(self.0 | capability.bit()) } else { Capabilities(self.0 & !capability.bit()) }
    }

    /// Those that are on, in the order of [`Capability::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Capability> {
        Capability::ALL.iter().copied().filter(move |capability| self.contains(*capability))
    }
}

impl FromIterator<Capability> for Capabilities {
    fn from_iter<I: IntoIterator<Item = Capability>>(capabilities: I) -> Self {
        capabilities.into_iter().fold(Capabilities::NONE, |on, capability| on.with(capability, true))
    }
}
