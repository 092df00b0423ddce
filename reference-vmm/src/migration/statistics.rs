//! What `query-migrate` reports, with QEMU's names (QMP reference of QEMU 11.1).

use serde_json::{Map, Value, json};
use std::time::Duration;

/// State of a migration. The names are QEMU's.
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
    /// Bytes sent while it stood still.
    pub downtime_bytes: u64,
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
    /// From stopping the guest to the destination's verdict, or to the end of the stream where there is none.
    pub downtime: Option<Duration>,
    /// How long the guest would have stood still if stopped at the last reading of the dirty log.
    pub expected_downtime: Duration,
    /// `CLOCK_MONOTONIC` when the last vCPU had stopped.
    pub stopped_at: Option<Duration>,
    /// For how many per cent of their time the vCPUs stand still, once `auto-converge` has slowed them down.
    pub throttled: Option<u8>,
    /// Bytes that remained of devices whose state goes in parts, when that was last reckoned.
    pub devices_remaining: u64,
    /// Bytes of such devices' state that were sent.
    pub device_bytes: u64,
    /// Why the migration failed.
    pub error: Option<String>,
    /// What does not shrink, when the guest dirties faster than the link carries.
    pub stalled: Option<String>,
    /// Every round so far.
    pub rounds: Vec<RoundStatistics>,
}

impl Statistics {
    /// The object that `query-migrate` returns at the source. It is empty before the first migration.
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        if self.status == Status::None {
            return object.into();
        }
        let mut put = |name: &str, value: Value| drop(object.insert(name.into(), value));
        put("status", self.status.as_str().into());
        let under_way = self.status.is_running() && self.status != Status::Setup;
        if under_way {
            put("expected-downtime", millis(self.expected_downtime));
            // RAM, and devices whose state goes in parts; that of the others is a few kilobytes at the end.
            put("remaining", self.ram.remaining.saturating_add(self.devices_remaining).into());
            if let Some(per_cent) = self.throttled {
                put("cpu-throttle-percentage", per_cent.into());
            }
        }
        if under_way || self.status == Status::Completed {
            put("total-time", millis(self.total_time));
            put("setup-time", millis(self.setup_time));
            put("ram", self.ram.to_json());
            if self.device_bytes > 0 {
                put("vfio", json!({ "transferred": self.device_bytes }));
            }
        }
        if let (Status::Completed, Some(downtime)) = (self.status, self.downtime) {
            put("downtime", millis(downtime));
        }
        if let Some(error) = &self.error {
            put("error-desc", error.as_str().into());
        }
        object.into()
    }

    /// The object that `query-migrate` returns at the destination.
    pub fn to_json_incoming(&self) -> Value {
        match (self.status, &self.error) {
            (Status::None, _) => json!({}),
            (status, None) => json!({ "status": status.as_str() }),
            (status, Some(error)) => json!({ "status": status.as_str(), "error-desc": error }),
        }
    }
}

impl RamStatistics {
    fn to_json(self) -> Value {
        json!({
            "total": self.total,
            "postcopy-requests": 0,
            "dirty-sync-count": self.dirty_sync_count,
            "multifd-bytes": 0,
            "pages-per-second": self.pages_per_second,
            "downtime-bytes": self.downtime_bytes,
            "page-size": self.page_size,
            "remaining": self.remaining,
            "postcopy-bytes": 0,
            "mbps": self.mbps,
            "transferred": self.transferred,
            "dirty-sync-missed-zero-copy": 0,
            "precopy-bytes": self.precopy_bytes,
            "duplicate": self.duplicate,
            "dirty-pages-rate": self.dirty_pages_rate,
            "normal-bytes": self.normal * self.page_size,
            "normal": self.normal,
        })
    }
}

fn millis(duration: Duration) -> Value {
    (duration.as_millis() as u64).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_has_what_qemu_gives_in_each_state() {
        assert_eq!(Statistics::default().to_json(), json!({}));
        let mut statistics = Statistics { status: Status::Active, ..Statistics::default() };
        let names = |s: &Statistics| s.to_json().as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        // As seen of QEMU 11.1.3.
        let active = ["status", "expected-downtime", "remaining", "total-time", "setup-time", "ram"];
        assert_eq!(names(&statistics), active);
        // The counters of the QMP reference of 11.1, in any order.
        assert_eq!(statistics.to_json()["ram"].as_object().unwrap().len(), 17);
        statistics.status = Status::Completed;
        statistics.downtime = Some(Duration::from_micros(2900));
        assert_eq!(statistics.to_json()["downtime"], 2);
        assert_eq!(names(&statistics), ["status", "total-time", "setup-time", "ram", "downtime"]);
        statistics.status = Status::Failed;
        statistics.error = Some("connection lost".into());
        assert_eq!(statistics.to_json(), json!({ "status": "failed", "error-desc": "connection lost" }));
        assert_eq!(statistics.to_json_incoming(), statistics.to_json());
        statistics.status = Status::Setup;
        statistics.error = None;
        assert_eq!(statistics.to_json(), json!({ "status": "setup" }));
    }
}
