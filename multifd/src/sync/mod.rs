//! The synchronisation between the main channel and the page channels.
//!
//! A page may travel on one channel in one round and on another in the next. So that the older copy is never loaded
//! over the newer one, the channels synchronise between rounds: the source puts a SYNC packet on *every* page channel
//! and a mark on the main channel. At the destination, a reader that meets its mark waits until all have, and only then
//! do all go on. Everything that was sent before a synchronisation is then loaded before anything that was sent after.
//!
//! [`SourceSync`] says what a source has to send, [`SyncBarrier`] who may go on at a destination. Neither knows of
//! threads, sockets or clocks.
//!
//! The mark is the flush record (`0x200`) of the `ram` section since QEMU 8.1, and every EOS of that section before and
//! with machine types up to 8.0: [`FlushMode`]. A destination counts marks; it must not expect them at certain places,
//! because 8.1 to 9.2 have one more at the end than other releases.

mod destination;
mod error;
#[cfg(test)]
mod model;
mod source;

pub use destination::{Progress, SyncBarrier, Waiting};
pub use error::SyncError;
pub use source::{SourceSync, SyncStep};

use core::fmt;
use qevm_wire::Profile;

/// Which records of the main channel are synchronisations (`multifd-flush-after-each-section`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlushMode {
    /// The flush record, once for each pass over all pages (8.1).
    PerRound,
    /// Each EOS of the `ram` section (before 8.1, and machine types up to 8.0).
    PerSection,
}

impl FlushMode {
    /// The mode of [`Profile::multifd_flush_after_each_section`].
    ///
    /// ```
    /// use qevm_multifd::FlushMode;
    /// use qevm_wire::{Profile, QemuVersion};
    ///
    /// assert_eq!(FlushMode::of(&Profile::new(QemuVersion::new(10, 0), "pc-q35-8.0")), FlushMode::PerSection);
    /// assert_eq!(FlushMode::of(&Profile::new(QemuVersion::new(10, 0), "microvm")), FlushMode::PerRound);
    /// ```
    pub fn of(profile: &Profile) -> Self {
        if profile.multifd_flush_after_each_section { FlushMode::PerSection } else { FlushMode::PerRound }
    }
}

impl fmt::Display for FlushMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FlushMode::PerRound => "once a round",
            FlushMode::PerSection => "after each section",
        })
    }
}
