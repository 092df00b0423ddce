//! How far a destination is.
//!
//! ```text
//!  Opening
//!    ▼
//!  Stream ◀──▶ Section, Block, MappedBlock, Synchronising,   each asks the guest or waits,
//!    │         Package, Place                                and the stream goes on
//!    │
//!    ├──(page channels)──▶ EndOfMemory ──┐
//!    ▼                                   ▼
//!  memory is complete ──(state of devices over page channels)──▶ DeviceStates ──┐
//!    │  │                                                                       ▼
//!    │  └──────────────────────────────────────────────────────────────▶ LoadingDevices
//!    │                                                                          ▼
//!    │ (postcopy: the guest is started                   (not with late-block-activate) Activating
//!    │  while the stream is read)                                               │
//!    ▼                                                                          │
//!  AwaitingStart ──▶ Telling ◀──────────────────────────────────────────────────┤
//!                      │ SHUT 0                                                 │ without a return path
//!                      ├──(agreed on)──▶ Confirming ──▶ Arrived ◀───────────────┘
//!                      └──(else)────────────────────────────▲
//!
//!  any, on a failure ──▶ Failing (SHUT 1) ──▶ Lingering ──▶ Over
//!                   └──(no return path; the guest runs here, or may run at either end)──▶ Over
//! ```

use super::SectionUse;
use crate::core::Mark;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{PageAt, RamBlock};
use std::time::Duration;

/// Where a destination is.
#[derive(Debug)]
pub(super) enum Phase {
    /// Nothing is known of the peer.
    Opening,
    /// The stream is read.
    Stream,
    /// The guest says whether it has a use for a section.
    Section { header: SectionHeader, usage: Option<SectionUse> },
    /// The guest says whether a RAM block fits.
    Block(RamBlock),
    /// The pages of a block are fetched from their places in the file.
    MappedBlock(RamBlock),
    /// A package of `len` bytes is being received.
    Package { len: u64 },
    /// A page that is missing is waited for, and placed.
    Place { page: PageAt, zero: bool },
    /// The stream is over, and the guest has not been started.
    AwaitingStart,
    /// The page channels are waited for.
    Synchronising(Mark),
    /// The page channels are told that memory is complete.
    EndOfMemory,
    /// What is left of the state of devices that comes over page channels is loaded.
    DeviceStates,
    /// The guest takes over the state of its devices.
    LoadingDevices,
    /// The guest takes over its disks.
    Activating { running: bool },
    /// SHUT 0 is being sent to the source.
    Telling { running: bool },
    /// The source has been told, and confirms until then that it will not run the guest again.
    Confirming { running: bool, until: Duration },
    /// The guest is here and nowhere else.
    Arrived { running: bool },
    /// The source learns that the migration has failed.
    Failing,
    /// The source may read and close until then.
    Lingering { until: Duration },
    /// Everything is over, and the guest must not run.
    Over,
}

/// Whose payload is next on the main channel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Payload {
    Page(PageAt),
    /// Of a device, or not needed.
    Other,
}
