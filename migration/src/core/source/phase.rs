//! How far a migration is at its source.
//!
//! ```text
//!  Setup ──(background-snapshot)──▶ Snapshot ──▶ Over
//!    ▼
//!  Precopy ◀──▶ AwaitAck         the guest runs; what remains is little enough: the destination has to agree
//!    ▼             ▼
//!  Stopping ──▶ PreSwitchover    with pause-before-switchover
//!    ▼             ▼
//!  Stopped ──(postcopy-ram)──▶ Postcopy ──▶ HandedOver     Lost, Paused and Recover, where its connection breaks
//!    ▼
//!  Completing
//!    ▼
//!  AwaitAnswers
//!    ▼
//!  Ending                        from here on the destination may run the guest
//!    ▼
//!  AwaitVerdict ──▶ Settling     without a return path
//!    ▼                ▼
//!  Committing ──▶ Confirming     where both ends have agreed on it
//!    ▼                ▼
//!  HandedOver ──▶ Over
//!
//!  any, on a failure ──▶ AwaitExplanation, where the channel broke ──▶ BackOut ──▶ Over
//! ```

use crate::switchover::{Reason, Switchover};
use crate::{GuestError, MigrationError, SavedDevices};
use std::io;
use std::time::Duration;

/// The phases in their order, each with what is known in it alone.
#[derive(Debug)]
pub(crate) enum Phase {
    /// The stream is opened.
    Setup(Setup),
    /// The guest runs, and its memory is sent pass by pass.
    Precopy(Precopy, Step),
    /// What remains is little enough. The destination has to answer and to agree before the guest is paused.
    AwaitAck {
        /// When the guest's memory is sent on.
        until: Duration,
        precopy: Precopy,
    },
    /// The guest is being paused.
    Stopping,
    /// The guest is paused and waits for the operator (`pause-before-switchover`).
    PreSwitchover,
    /// The guest is paused: its devices are saved, and the dirty log is read once more.
    Stopped(Stopped),
    /// The rest is sent.
    Completing(Completing),
    /// The guest goes before its memory does (capability `postcopy-ram`).
    Postcopy(Postcopy),
    /// The guest runs on, and its memory and devices are sent as of one instant (capability `background-snapshot`).
    Snapshot(Snapshot),
    /// Everything but the end of the stream was sent. The destination has to answer before it gets that.
    AwaitAnswers { devices: SavedDevices, since: Duration },
    /// The end of the stream is being sent: from here on the destination may run the guest.
    Ending,
    /// The destination has everything, as far as is known.
    /// A destination that was kept waiting is heard out until `heard_out`.
    AwaitVerdict { sent: Result<(), MigrationError>, since: Duration, heard_out: Option<Duration> },
    /// There is no return path: what was written is being taken.
    Settling(Option<io::Result<()>>),
    /// The destination has the guest, and it is asked whether the operator has cancelled before.
    Committing { unsettled: bool, committed: Option<Result<(), MigrationError>> },
    /// The destination has the guest and waits for the confirmation.
    Confirming { sent: Option<io::Result<()>>, deadline: Duration },
    /// The channel broke. The destination may say why.
    AwaitExplanation { error: MigrationError, until: Duration },
    /// The migration has failed, and the guest goes on here (unless it may run at the destination).
    BackOut { error: MigrationError, back: Option<Back> },
    /// The migration has succeeded.
    HandedOver,
    /// Nothing is left to do.
    Over,
}

/// Steps of [`Phase::Setup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setup {
    Begin,
    List,
    CloseList,
    Done,
}

/// The passes over the guest's memory.
#[derive(Debug, Default)]
pub(crate) struct Precopy {
    pub(super) switchover: Switchover,
    /// The part whose stall was logged.
    pub(super) warned_of: Option<String>,
    /// When the pass began: its dirty log was read.
    pub(super) begin: Duration,
    /// Bytes that had been sent by then.
    pub(super) bytes_before: u64,
    /// Pages that were to be sent then.
    pub(super) pages: u64,
    /// When to look ahead in the dirty log again.
    pub(super) look_at: Duration,
}

/// Steps of a pass.
#[derive(Debug)]
pub(crate) enum Step {
    /// The dirty log was read for the first time.
    FirstRead,
    /// Between sections.
    Sweep,
    /// The dirty log was read ahead of the sweep; `since` is when.
    Looked { since: Duration },
    /// …and what was found was reset.
    LookedAhead { since: Duration },
    /// In a section that was opened at `since`: a batch may go.
    Section { since: Duration },
    /// A batch has gone.
    Batched { since: Duration },
    /// The section was sent.
    SectionSent,
    /// The turn of a device, whose size was asked for.
    Device { device: usize },
    /// This many bytes of a device's state are left in this pass.
    DeviceLeft { device: usize, left: u64 },
    /// A record was read.
    DeviceRead { device: usize, left: u64 },
    /// Everything was sent, and it is asked what is still on its way.
    Drain,
    /// The wait for that is over.
    DrainAgain,
    /// The dirty log was read.
    Read { sent_at: Duration },
    /// vCPUs were throttled where that was due.
    Measure { sent_at: Duration, new: u64 },
    /// The sizes of devices were asked for.
    Sized(RoundEnd),
    /// …exactly, by `reason` if the guest could be paused by the estimates.
    SizedExactly(RoundEnd, Option<Reason>),
    /// A pause that says nothing about the link is over.
    Paced,
    /// The next pass begins.
    Begin,
}

/// What was measured at the end of a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoundEnd {
    pub(super) at: Duration,
    pub(super) took: Duration,
    pub(super) overhead: Duration,
    pub(super) new: u64,
}

/// Steps of [`Phase::Postcopy`].
#[derive(Debug)]
pub(crate) enum Postcopy {
    /// The guest is paused, its devices are saved and its dirty pages known.
    Begin(SavedDevices),
    /// It is asked whether the operator has cancelled before the guest goes.
    Committing { devices: SavedDevices, committed: Option<Result<(), MigrationError>> },
    /// The package of its devices was sent: it runs at the destination from here on.
    Departed,
    /// Pages are sent, those first that the guest waits for.
    Serve,
    /// A section was opened for pages, which were sent.
    Sent,
    /// The end of the stream is being sent.
    Ending(Option<Result<(), MigrationError>>),
    /// The destination has everything, as far as is known.
    AwaitShut { since: Duration },
    /// The connection was lost, for this reason.
    Lost(MigrationError),
    /// Another is waited for.
    Paused(MigrationError),
    /// Another is there.
    Recover(Recovery),
}

/// Steps of [`Postcopy::Recover`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recovery {
    /// Nothing was sent on it.
    Begin,
    /// The destination was asked what it has, and has not answered for `left` blocks.
    AwaitBitmaps { since: Duration, left: usize },
    /// It is known what is missing.
    Resume,
    /// The destination was told that all goes on.
    AwaitAck { since: Duration },
}

/// Steps of [`Phase::Snapshot`].
#[derive(Debug)]
pub(crate) enum Snapshot {
    /// The blocks are listed.
    Begin,
    /// The guest is paused.
    Stopped,
    /// Its devices are saved.
    Saved(Option<SavedDevices>),
    /// Its memory is protected, and it was let go on.
    GoesOn { devices: SavedDevices, result: Result<(), GuestError> },
    /// Pages are sent as they were.
    Pages(SavedDevices),
    /// All pages were sent.
    AllCopied(SavedDevices),
    /// Everything was sent.
    Sent,
    /// Everything was taken, or not.
    Settled(io::Result<()>),
}

/// Steps of [`Phase::Stopped`].
#[derive(Debug)]
pub(crate) enum Stopped {
    Save,
    Saved(Option<SavedDevices>),
    ReadLast(SavedDevices),
}

/// The rest, which is sent while the guest is paused.
#[derive(Debug)]
pub(crate) struct Completing {
    pub(super) devices: SavedDevices,
    pub(super) step: Rest,
}

/// Steps of [`Phase::Completing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    Begin,
    Pages,
    Device(usize),
    DeviceRead(usize),
    Sent,
}

/// How the guest comes back.
#[derive(Debug)]
pub(crate) enum Back {
    /// It was told to, and how that went is not known.
    Asked { doing: &'static str },
    /// It did, or did not have to.
    Done,
}
