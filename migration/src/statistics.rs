//! What `query-migrate` reports, with QEMU's names (QMP reference of QEMU 11.1).

use std::time::Duration;

/// State of a migration. The names are QEMU's.
///
/// ```text
///  None ──▶ Setup ──▶ Active ─────────────────────▶ Device ──▶ Completed
///                       └──▶ PreSwitchover ──▶┘       │            ▲
///                   (pause-before-switchover)         ▼            │
///                                     PostcopyDevice ──▶ PostcopyActive
///                                                         │        ▲
///                                  (the connection ends)  ▼        │
///                          PostcopyRecoverSetup ◀── PostcopyPaused │
///                                   └──▶ PostcopyRecover ──────────┘
///
///  Setup to Device ──(`migrate_cancel`)──▶ Cancelling ──▶ Cancelled
///  any ──(a failure)──▶ Failing ──▶ Failed       a postcopy that runs is paused instead
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Status {
    /// No migration has been started.
    #[default]
    None,
    /// Connecting, listing RAM blocks.
    Setup,
    /// Rounds of dirty pages while the guest runs.
    Active,
    /// The guest has stopped and waits for `migrate-continue` (capability `pause-before-switchover`).
    PreSwitchover,
    /// The guest has stopped; the rest is on its way.
    Device,
    /// The guest goes before its memory: its devices are on their way, or are being loaded (10.2).
    PostcopyDevice,
    /// The guest runs at the destination, and not all of its memory is there.
    PostcopyActive,
    /// The connection was lost meanwhile, and another is waited for.
    PostcopyPaused,
    /// The operator has said where it goes on, and that is being connected to (9.1).
    PostcopyRecoverSetup,
    /// Another connection is there, and both sides find out what is missing.
    PostcopyRecover,
    /// The peer has taken over.
    Completed,
    /// Something went wrong, and is being cleared up (11.0).
    Failing,
    /// Something went wrong; the guest is still here.
    Failed,
    /// `migrate_cancel` was given and takes effect.
    Cancelling,
    /// Given up on request; the guest is still here.
    Cancelled,
}

impl Status {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::None => "none",
            Status::Setup => "setup",
            Status::Active => "active",
            Status::PreSwitchover => "pre-switchover",
            Status::Device => "device",
            Status::PostcopyDevice => "postcopy-device",
            Status::PostcopyActive => "postcopy-active",
            Status::PostcopyPaused => "postcopy-paused",
            Status::PostcopyRecoverSetup => "postcopy-recover-setup",
            Status::PostcopyRecover => "postcopy-recover",
            Status::Completed => "completed",
            Status::Failing => "failing",
            Status::Failed => "failed",
            Status::Cancelling => "cancelling",
            Status::Cancelled => "cancelled",
        }
    }

    /// Whether a migration is under way.
    pub fn is_running(self) -> bool {
        matches!(self, Status::Setup | Status::Active | Status::PreSwitchover | Status::Device | Status::Cancelling)
            || self.is_postcopy()
    }

    /// Whether the guest has gone, or is going, before its memory: that cannot be taken back.
    pub fn is_postcopy(self) -> bool {
        matches!(
            self,
            Status::PostcopyDevice
                | Status::PostcopyActive
                | Status::PostcopyPaused
                | Status::PostcopyRecoverSetup
                | Status::PostcopyRecover
        )
    }
}

/// Counters of guest memory, `ram` in `query-migrate`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RamStatistics {
    /// Bytes written to the channel since the migration began.
    pub transferred: u64,
    /// Bytes of dirty pages still to send.
    pub remaining: u64,
    /// Bytes of guest memory.
    pub total: u64,
    /// Pages sent as a record of zeroes.
    pub duplicate: u64,
    /// Pages sent in full.
    pub normal: u64,
    /// Pages per second that the guest dirtied in the last round.
    pub dirty_pages_rate: u64,
    /// Megabits per second that went out in the last window.
    pub mbps: f64,
    /// How often the dirty log was read.
    pub dirty_sync_count: u64,
    /// Bytes per page.
    pub page_size: u64,
    /// Pages per second that went out in the last window.
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes sent while it was paused.
    pub downtime_bytes: u64,
    /// Bytes sent while it ran at the destination.
    pub postcopy_bytes: u64,
    /// Requests for pages that the guest waited for there, with those that were repeated.
    pub postcopy_requests: u64,
    /// Bytes sent on page channels.
    pub multifd_bytes: u64,
    /// Synchronisations of a page channel before which the kernel had copied all pages, with capability
    /// `zero-copy-send`: within a host it does.
    pub dirty_sync_missed_zero_copy: u64,
}

/// What capability `xbzrle` has saved, `xbzrle-cache` in `query-migrate`. What counts how was seen of QEMU 11.1.3.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct XbzrleStatistics {
    /// Bytes of the cache (`xbzrle-cache-size`).
    pub cache_size: u64,
    /// Bytes of differences, each with the three before it that say how long it is, and of pages whose difference was
    /// too long.
    pub bytes: u64,
    /// Pages that were in the cache and not sent in full, whether there was a difference or not.
    pub pages: u64,
    /// Pages that were not in the cache.
    pub cache_miss: u64,
    /// What part of all pages those were, in the last period of at least a second.
    pub cache_miss_rate: f64,
    /// How many times as many bytes those pages have as was sent of them, in that period; 0 if there were none.
    pub encoding_rate: f64,
    /// Pages whose difference was longer than the page.
    pub overflow: u64,
}

/// A part of what is migrated: a RAM block, or a device whose state goes in parts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PartStatistics {
    /// The name of the block, or of the device.
    pub name: String,
    /// Bytes that remained when that was last reckoned.
    pub remaining: u64,
    /// By how many bytes a second that had shrunk since the time before; negative if it had grown.
    pub rate: i64,
    /// It is what does not shrink.
    pub stalled: bool,
}

/// One round: what was sent between two readings of the dirty log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundStatistics {
    /// When the round began, counted from the start of the migration.
    pub start: Duration,
    /// How long it took, with waiting for the rate limit.
    pub took: Duration,
    /// Dirty pages to send when it began.
    pub pages: u64,
    /// Bytes written to the channel.
    pub bytes: u64,
    /// Bytes per second that the guest dirtied during the round.
    pub dirty_rate: u64,
}

/// What the source's guest was paused for. Up to the destination's verdict the parts are the downtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DowntimeParts {
    /// Stopping the vCPUs.
    pub stop: Duration,
    /// Waiting for the operator (`pause-before-switchover`, `migrate-continue`).
    pub pre_switchover: Duration,
    /// Saving the devices, and what was left of those whose state goes in parts.
    pub device_state: Duration,
    /// Reading the dirty log for the last time, and sending the pages.
    pub last_round: Duration,
    /// Protecting memory against writes (`background-snapshot`).
    pub protect: Duration,
    /// Sending the devices, and the end of the stream or the package of postcopy.
    pub send: Duration,
    /// Waiting until the destination has loaded everything and says so.
    pub load: Duration,
    /// Telling a destination that waits for it that the guest is its own. It comes after the verdict, and is no part of
    /// [`Statistics::downtime`].
    pub confirm: Duration,
}

/// Everything about a migration that can be asked for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Statistics {
    /// State of the migration.
    pub status: Status,
    /// Guest memory.
    pub ram: RamStatistics,
    /// Time since the start, or up to the end.
    pub total_time: Duration,
    /// From the start to the first page.
    pub setup_time: Duration,
    /// From stopping the guest to the destination's verdict, or to the end of the stream where there is none; in
    /// postcopy to the moment when the destination had all that it needs to run it.
    pub downtime: Option<Duration>,
    /// What it consists of, so far.
    pub downtime_parts: DowntimeParts,
    /// How long the guest would have been paused if stopped at the last reading of the dirty log.
    pub expected_downtime: Duration,
    /// `CLOCK_MONOTONIC` when the last vCPU had stopped.
    pub stopped_at: Option<Duration>,
    /// For how many per cent of their time the vCPUs are paused, once `auto-converge` has slowed them down.
    pub throttled: Option<u8>,
    /// Bytes that remained of devices whose state goes in parts, when that was last reckoned.
    pub devices_remaining: u64,
    /// All parts, RAM blocks first, as of that time.
    pub parts: Vec<PartStatistics>,
    /// Bytes of such devices' state that were sent.
    pub device_bytes: u64,
    /// What differences have saved; with capability `xbzrle`.
    pub xbzrle: Option<XbzrleStatistics>,
    /// Why the migration failed, or is paused.
    pub error: Option<String>,
    /// What holds the migration up, with the name of the part: one that does not shrink, or a device whose initial data
    /// the destination has not loaded yet.
    pub stalled: Option<String>,
    /// Every round so far.
    pub rounds: Vec<RoundStatistics>,
}
