//! What a source is to do next.

use crate::{MigrationError, Status};
use qevm_savevm::ram::RamBlock;
use std::ops::Range;
use std::time::Duration;

/// Pages of one RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRange {
    /// Number of the block, in the order of the stream.
    pub block: usize,
    /// Page numbers in the block.
    pub pages: Range<u64>,
}

/// Pages to send in one go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// What is reset in the dirty log before any of the pages is read; nothing once the guest is paused.
    pub resets: Vec<BlockRange>,
    /// The pages, in the order in which they are sent.
    pub runs: Vec<BlockRange>,
    /// The pages may travel as differences to what was sent of them before (capability `xbzrle`). What does that
    /// sees every page that is sent from here on until the guest goes, or this is `None` for the first time after it
    /// was not. In full is always right.
    pub differences: Option<DifferencePass>,
}

/// The pass that pages may travel in as differences; see [`Cache`](qevm_savevm::xbzrle::Cache).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DifferencePass {
    /// Its number: how often the dirty log was read.
    pub number: u64,
    /// The guest has stopped: every page is sent for the last time.
    pub last: bool,
}

/// What ends a wait early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// The operator cancels or changes a parameter.
    Operator,
    /// The operator lets the switchover happen (`migrate-continue`), or cancels.
    Continue,
    /// Something came on the return path.
    Answers,
}

/// One step. It is done before the machine is polled again; what it is answered with stands at each.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action {
    /// Prepare the guest and start to log which pages change.
    StartLog,
    /// Prepare the guest for a snapshot: find out whether its memory can be protected against writes.
    PrepareSnapshot,
    /// Protect all memory of the paused guest against writes. From here on a thread that writes to a page waits until
    /// it was copied, and [`Pages`](Action::Pages) has all that is in its batch copied before it is sent, and what was
    /// copied meanwhile with it.
    Protect,
    /// Send what was copied and not sent: [`sent`](super::SourceCore::sent). Every page was copied, and the protection
    /// ends.
    Unprotect,
    /// Read the dirty log: [`found`](super::SourceCore::found) for every word.
    ReadLog,
    /// Reset these ranges of the dirty log.
    Reset(Vec<BlockRange>),
    /// The dirty log is of no more use.
    StopLog,
    /// Prepare this iterative device.
    BeginDevice(usize),
    /// Ask every iterative device for its size: [`device_sizes`](super::SourceCore::device_sizes).
    AskDevices {
        /// At whatever cost.
        exact: bool,
    },
    /// Read the next state of an iterative device: [`device_state`](super::SourceCore::device_state).
    ReadDevice {
        /// Its number.
        device: usize,
        /// Most bytes.
        limit: usize,
    },
    /// From now on send what is left of these iterative devices over page channels, beside whatever follows, and after
    /// it these configurations, each as the last piece of its device.
    TransferDevices(Vec<(usize, Vec<u8>)>),
    /// Wait until all of that was sent: [`sent`](super::SourceCore::sent) and
    /// [`devices_transferred`](super::SourceCore::devices_transferred).
    FinishTransfers,
    /// List these RAM blocks in the stream with places for their pages in the file, which begins with the stream.
    PlaceBlocks(Vec<RamBlock>),
    /// Send what [`stream`](super::SourceCore::stream) holds, on the main channel: [`sent`](super::SourceCore::sent).
    Send {
        /// What that is, for messages.
        doing: &'static str,
    },
    /// Send these pages, each in full or as a record of zeroes: [`sent`](super::SourceCore::sent).
    Pages(Batch),
    /// Open the preempt channel.
    OpenPreempt,
    /// From here on the thread that receives a request may send the pages on the preempt channel at once, without the
    /// core: [`next_urgent`](super::Answers::next_urgent). What it does not take comes as
    /// [`UrgentPages`](Action::UrgentPages).
    ServeRequests,
    /// Send these pages, which the guest waits for, on the preempt channel
    /// ([`preempt_writer`](qevm_savevm::StreamWriter::preempt_writer) has the records):
    /// [`sent`](super::SourceCore::sent).
    UrgentPages(Batch),
    /// Give the memory of these pages back to the host: the destination has them and the guest (capability
    /// `release-ram`).
    Release(Vec<BlockRange>),
    /// Send EOS on the preempt channel: nothing more comes there.
    EndPreempt,
    /// From here on send pages on the main channel; the page channels stay open, and carry nothing more.
    LeaveChannels,
    /// Send all pages that are queued for page channels and a SYNC packet on each: [`sent`](super::SourceCore::sent).
    SyncChannels,
    /// Write to the file which pages are there: [`sent`](super::SourceCore::sent).
    FinishFile,
    /// Say how many sent bytes have not reached the peer's host: [`backlog`](super::SourceCore::backlog).
    MeasureBacklog {
        /// On all channels, not only on the main one.
        all: bool,
    },
    /// Pause the guest: [`paused`](super::SourceCore::paused).
    Pause,
    /// Throttle the vCPUs by this percentage.
    Throttle(u8),
    /// Limit the dirty rate of each vCPU.
    LimitDirtyRate {
        /// The most, in MiB per second.
        mib_per_second: u64,
        /// Over which it is measured.
        period: Duration,
    },
    /// Let the vCPUs run at full speed again.
    Unthrottle {
        /// They are throttled.
        throttled: bool,
        /// Their dirty rate is limited.
        limited: bool,
    },
    /// Report that the dirty log was read for the n-th time.
    Pass(u64),
    /// Report a status.
    Status(Status),
    /// Save the devices of the paused guest: [`devices_saved`](super::SourceCore::devices_saved).
    SaveDevices {
        /// The guest is to run at the destination.
        running: bool,
    },
    /// Leave the guest's disks to the destination.
    Inactivate,
    /// Send the end of the stream: [`end_sent`](super::SourceCore::end_sent).
    SendEnd,
    /// Wait until everything has been taken: [`settled`](super::SourceCore::settled).
    Settle,
    /// From here on it is too late to cancel: [`committed`](super::SourceCore::committed).
    Commit,
    /// Send this on the main channel; without it the destination does not run the guest:
    /// [`confirmed`](super::SourceCore::confirmed).
    Confirm(Vec<u8>),
    /// Do nothing until then, or for as long as it takes, or until something happens.
    Wait {
        /// The latest time.
        until: Option<Duration>,
        /// What may come before.
        wake: Wake,
    },
    /// Close all channels, in both directions.
    Close,
    /// The connection was lost when the guest had gone before its memory, and nothing else is lost. Report
    /// [`Status::PostcopyPaused`] with the reason, and wait as long as it takes for another connection:
    /// [`reconnected`](super::SourceCore::reconnected). A driver that polls without one has given up: the migration has
    /// failed then.
    AwaitConnection {
        /// Why, and where the guest is.
        why: String,
    },
    /// Let the guest run on: [`resumed`](super::SourceCore::resumed).
    Resume,
    /// The guest, which did not run before, stays as it was.
    StayStopped,
    /// Take the guest's disks back: [`resumed`](super::SourceCore::resumed).
    Activate,
    /// The guest has gone, or may have: it stays paused here. After a postcopy that was given up it stays paused
    /// without this: who has it is known, and it must never run here again.
    LeaveGuest,
    /// The migration is over. Last.
    End(Result<(), MigrationError>),
}

/// Counts of what was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes on all channels.
    pub bytes: u64,
    /// Pages in full.
    pub normal: u64,
    /// Pages as a record of zeroes.
    pub zero: u64,
    /// Pages as a difference to what was sent of them before, or not at all because there is none.
    pub differences: u64,
}
