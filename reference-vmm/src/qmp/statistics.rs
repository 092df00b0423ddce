//! What `query-migrate` returns, with QEMU's names (QMP reference of QEMU 11.1).

use qevm_migration::{BlockTimes, PartStatistics, RamStatistics, Statistics, Status, XbzrleStatistics};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Every status that QEMU 11.1 has a name for.
pub(super) const STATUSES: [&str; 17] = [
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failing",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
];

/// The object that `query-migrate` returns at the source. It is empty before the first migration.
pub(crate) fn outgoing(statistics: &Statistics) -> Value {
    let mut object = Map::new();
    if statistics.status == Status::None {
        return object.into();
    }
    let mut put = |name: &str, value: Value| drop(object.insert(name.into(), value));
    put("status", statistics.status.as_str().into());
    let under_way = statistics.status.is_running() && statistics.status != Status::Setup;
    let postcopy = statistics.status.is_postcopy();
    if under_way && !postcopy {
        put("expected-downtime", millis(statistics.expected_downtime));
    }
    if under_way {
        // RAM, and devices whose state goes in parts; that of the others is a few kilobytes at the end.
        put("remaining", statistics.ram.remaining.saturating_add(statistics.devices_remaining).into());
        if !statistics.parts.is_empty() {
            put("x-parts", statistics.parts.iter().map(part).collect());
        }
        if let Some(stalled) = statistics.stalled.as_ref().filter(|_| statistics.status == Status::Active) {
            put("x-stalled", stalled.as_str().into());
        }
        if let Some(per_cent) = statistics.throttled {
            put("cpu-throttle-percentage", per_cent.into());
        }
    }
    if under_way || statistics.status == Status::Completed {
        put("total-time", millis(statistics.total_time));
        put("setup-time", millis(statistics.setup_time));
        put("ram", ram(&statistics.ram));
        if let Some(told) = &statistics.xbzrle {
            put("xbzrle-cache", xbzrle(told));
        }
        if statistics.device_bytes > 0 {
            put("vfio", json!({ "transferred": statistics.device_bytes }));
        }
    }
    if let Some(downtime) = statistics.downtime.filter(|_| postcopy || statistics.status == Status::Completed) {
        put("downtime", millis(downtime));
    }
    if let Some(error) = &statistics.error {
        put("error-desc", error.as_str().into());
    }
    object.into()
}

/// The object that `query-migrate` returns at the destination.
pub(super) fn incoming(statistics: &Statistics) -> Value {
    match (statistics.status, &statistics.error) {
        (Status::None, _) => json!({}),
        (status, None) => json!({ "status": status.as_str() }),
        (status, Some(error)) => json!({ "status": status.as_str(), "error-desc": error }),
    }
}

/// An extension: what QEMU's `remaining` consists of.
fn part(part: &PartStatistics) -> Value {
    json!({ "name": part.name, "remaining": part.remaining, "rate": part.rate, "stalled": part.stalled })
}

/// Adds how long the guest has waited for its memory.
pub(super) fn add_block_times(object: &mut Value, times: &BlockTimes) {
    let nanos = |duration: &Duration| Value::from(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    object["postcopy-blocktime"] = millis(times.all_vcpus);
    object["postcopy-vcpu-blocktime"] = times.vcpus.iter().copied().map(millis).collect();
    object["postcopy-latency"] = nanos(&times.latency);
    object["postcopy-latency-dist"] = times.distribution.to_vec().into();
    object["postcopy-vcpu-latency"] = times.vcpu_latency.iter().map(nanos).collect();
    object["postcopy-non-vcpu-latency"] = nanos(&times.other_latency);
}

fn ram(ram: &RamStatistics) -> Value {
    json!({
        "total": ram.total,
        "postcopy-requests": ram.postcopy_requests,
        "dirty-sync-count": ram.dirty_sync_count,
        "multifd-bytes": ram.multifd_bytes,
        "pages-per-second": ram.pages_per_second,
        "downtime-bytes": ram.downtime_bytes,
        "page-size": ram.page_size,
        "remaining": ram.remaining,
        "postcopy-bytes": ram.postcopy_bytes,
        "mbps": ram.mbps,
        "transferred": ram.transferred,
        "dirty-sync-missed-zero-copy": ram.dirty_sync_missed_zero_copy,
        "precopy-bytes": ram.precopy_bytes,
        "duplicate": ram.duplicate,
        "dirty-pages-rate": ram.dirty_pages_rate,
        "normal-bytes": ram.normal * ram.page_size,
        "normal": ram.normal,
    })
}

fn xbzrle(told: &XbzrleStatistics) -> Value {
    json!({
        "encoding-rate": told.encoding_rate,
        "bytes": told.bytes,
        "cache-size": told.cache_size,
        "cache-miss-rate": told.cache_miss_rate,
        "pages": told.pages,
        "overflow": told.overflow,
        "cache-miss": told.cache_miss,
    })
}

fn millis(duration: Duration) -> Value {
    (duration.as_millis() as u64).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 11.1.3 gives them for a guest of two vCPUs: milliseconds of blocked vCPUs, nanoseconds of latencies, 24
    /// buckets.
    #[test]
    fn block_times_have_qemus_names_and_units() {
        let mut times = BlockTimes::default();
        times.all_vcpus = Duration::from_micros(2900);
        times.vcpus = vec![Duration::from_millis(11), Duration::ZERO];
        times.latency = Duration::from_nanos(2_868_660);
        times.vcpu_latency = vec![Duration::from_nanos(2_868_660), Duration::ZERO];
        times.distribution[9] = 1;
        let mut object = json!({ "status": "completed" });
        add_block_times(&mut object, &times);
        let mut distribution = [0; 24];
        distribution[9] = 1;
        let expected = json!({
            "status": "completed",
            "postcopy-blocktime": 2,
            "postcopy-vcpu-blocktime": [11, 0],
            "postcopy-latency": 2_868_660,
            "postcopy-latency-dist": distribution,
            "postcopy-vcpu-latency": [2_868_660, 0],
            "postcopy-non-vcpu-latency": 0,
        });
        assert_eq!(object, expected);
    }

    #[test]
    fn the_object_has_what_qemu_gives_in_each_state() {
        assert_eq!(outgoing(&Statistics::default()), json!({}));
        let mut statistics = Statistics { status: Status::Active, ..Statistics::default() };
        let names = |s: &Statistics| outgoing(s).as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        // As seen of QEMU 11.1.3.
        let active = ["status", "expected-downtime", "remaining", "total-time", "setup-time", "ram"];
        assert_eq!(names(&statistics), active);
        // The counters of the QMP reference of 11.1, in any order.
        assert_eq!(outgoing(&statistics)["ram"].as_object().unwrap().len(), 17);
        statistics.stalled = Some("'vf0' no longer shrinks".into());
        let part = PartStatistics { name: "vf0".into(), remaining: 4096, rate: -512, stalled: true };
        statistics.parts.push(part);
        let told = outgoing(&statistics);
        assert_eq!(told["x-stalled"], "'vf0' no longer shrinks");
        assert_eq!(told["x-parts"], json!([{ "name": "vf0", "remaining": 4096, "rate": -512, "stalled": true }]));
        statistics.parts.clear();
        statistics.xbzrle = Some(XbzrleStatistics { cache_size: 64 << 20, ..XbzrleStatistics::default() });
        // As QEMU 11.1.3 says before there is any.
        let expected = json!({ "encoding-rate": 0.0, "bytes": 0, "cache-size": 67108864, "cache-miss-rate": 0.0, "pages": 0, "overflow": 0, "cache-miss": 0 });
        assert_eq!(outgoing(&statistics)["xbzrle-cache"], expected);
        statistics.xbzrle = None;
        statistics.status = Status::Completed;
        statistics.downtime = Some(Duration::from_micros(2900));
        assert_eq!(outgoing(&statistics)["downtime"], 2);
        assert_eq!(names(&statistics), ["status", "total-time", "setup-time", "ram", "downtime"]);
        for postcopy in [Status::PostcopyDevice, Status::PostcopyActive] {
            statistics.status = postcopy;
            assert_eq!(names(&statistics), ["status", "remaining", "total-time", "setup-time", "ram", "downtime"]);
        }
        statistics.status = Status::Failed;
        statistics.error = Some("connection lost".into());
        assert_eq!(outgoing(&statistics), json!({ "status": "failed", "error-desc": "connection lost" }));
        assert_eq!(incoming(&statistics), outgoing(&statistics));
        statistics.status = Status::Setup;
        statistics.error = None;
        assert_eq!(outgoing(&statistics), json!({ "status": "setup" }));
    }
}
