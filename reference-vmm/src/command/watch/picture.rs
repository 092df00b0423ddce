//! What is shown of a migration.

use serde_json::Value;
use std::collections::VecDeque;
use std::time::Duration;

/// Over which time rates are taken.
const WINDOW: Duration = Duration::from_secs(2);
/// How full a limit is at which it is what holds a migration up, in per cent.
const FULL: u64 = 85;

/// What a monitor said at one time.
#[derive(Clone)]
pub(super) struct Sample {
    time: Duration,
    migration: Value,
    max_bandwidth: u64,
    downtime_limit: Option<u64>,
}

impl Sample {
    pub(super) fn new(time: Duration, migration: &Value, parameters: &Value) -> Sample {
        Sample {
            time,
            migration: migration.clone(),
            max_bandwidth: parameters["max-bandwidth"].as_u64().unwrap_or_default(),
            downtime_limit: parameters["downtime-limit"].as_u64(),
        }
    }

    fn status(&self) -> &str {
        self.migration["status"].as_str().unwrap_or("none")
    }

    fn ram(&self, member: &str) -> u64 {
        self.migration["ram"][member].as_u64().unwrap_or_default()
    }

    /// Bytes a second that the guest dirtied in the last round.
    fn dirty_rate(&self) -> u64 {
        self.ram("dirty-pages-rate").saturating_mul(self.ram("page-size"))
    }

    /// Bytes that are left of memory and devices.
    fn remaining(&self) -> u64 {
        // Some releases tell it of memory alone.
        self.migration["remaining"].as_u64().unwrap_or_else(|| self.ram("remaining"))
    }
}

/// What was seen of a migration in the last seconds.
#[derive(Default)]
pub(super) struct Watched {
    samples: VecDeque<Sample>,
}

impl Watched {
    pub(super) fn add(&mut self, sample: Sample) {
        if self.samples.back().is_some_and(|last| last.ram("transferred") > sample.ram("transferred")) {
            // Another migration.
            self.samples.clear();
        }
        while self.samples.len() > 1 && sample.time.saturating_sub(self.samples[1].time) >= WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// Whether the migration has ended: well, or not.
    pub(super) fn ended(&self) -> Option<bool> {
        match self.samples.back()?.status() {
            "completed" => Some(true),
            "failed" | "cancelled" => Some(false),
            _ => None,
        }
    }

    /// Bytes a second that were sent; `None` before there are two looks apart.
    fn sent_rate(&self) -> Option<u64> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let millis = last.time.saturating_sub(first.time).as_millis();
        let sent = u128::from(last.ram("transferred").saturating_sub(first.ram("transferred")));
        (millis > 0).then(|| u64::try_from(sent * 1000 / millis.max(1)).unwrap_or(u64::MAX))
    }

    /// The picture, line by line.
    pub(super) fn picture(&self) -> Vec<String> {
        let Some(now) = self.samples.back() else { return Vec::new() };
        let migration = &now.migration;
        let seconds = |millis: u64| format!("{}.{} s", millis / 1000, millis % 1000 / 100);
        let mut first = format!("status      {}", now.status());
        if let Some(total) = migration["total-time"].as_u64() {
            first += &format!(", round {}, {}", now.ram("dirty-sync-count"), seconds(total));
        }
        if let Some(per_cent) = migration["cpu-throttle-percentage"].as_u64() {
            first += &format!(", guest slowed down by {per_cent} %");
        }
        let mut lines = vec![first];
        if migration["ram"]["total"].is_u64() {
            let rate = match self.sent_rate() {
                Some(rate) if self.ended().is_none() => format!(" at {}/s", size(rate)),
                _ => String::new(),
            };
            lines.push(format!("sent        {}{rate}", size(now.ram("transferred"))));
            lines.push(format!("remaining   {} of {}", size(now.remaining()), size(now.ram("total"))));
        }
        for part in migration["x-parts"].as_array().into_iter().flatten() {
            let (name, rate) = (part["name"].as_str().unwrap_or_default(), part["rate"].as_i64().unwrap_or_default());
            let remaining = part["remaining"].as_u64().unwrap_or_default();
            // Small blocks are done after the first round.
            if remaining == 0 && rate == 0 {
                continue;
            }
            let left = size(remaining);
            let (word, rate) = if rate < 0 { ("grows", rate.unsigned_abs()) } else { ("shrinks", rate.unsigned_abs()) };
            lines.push(format!("  {name}: {left}, {word} by {}/s", size(rate)));
        }
        if self.ended().is_none() && migration["ram"]["total"].is_u64() {
            lines.push(format!("dirty rate  {}/s", size(now.dirty_rate())));
        }
        if let Some(expected) = migration["expected-downtime"].as_u64() {
            let limit = now.downtime_limit.map_or_else(String::new, |limit| format!(", limit {limit} ms"));
            let expected = if expected > 1 << 40 { "unknown".into() } else { format!("{expected} ms") };
            lines.push(format!("downtime    {expected} expected{limit}"));
        } else if let Some(downtime) = migration["downtime"].as_u64() {
            lines.push(format!("downtime    {downtime} ms"));
        }
        if let Some(error) = migration["error-desc"].as_str() {
            lines.push(format!("error       {error}"));
        }
        lines.extend(self.stall().map(|why| format!("stall       {why}")));
        lines
    }

    /// Why the migration does not get on.
    fn stall(&self) -> Option<String> {
        let (first, now) = (self.samples.front()?, self.samples.back()?);
        match now.status() {
            "pre-switchover" => return Some("it waits for migrate-continue".into()),
            "postcopy-paused" => return Some("the connection is lost: it waits for migrate with resume".into()),
            "device" | "active" | "setup" | "postcopy-active" => {}
            _ => return None,
        }
        let watched = now.time.saturating_sub(first.time);
        let (sent, dirtied) = (self.sent_rate()?, now.dirty_rate());
        if first.status() == now.status() && watched * 2 >= WINDOW && sent == 0 {
            let waits = match now.status() {
                "setup" => "nothing is sent: it connects",
                "device" => "nothing is sent: it waits for the destination to load the guest",
                _ => "nothing is sent: the destination does not read, or the link is dead",
            };
            return Some(waits.into());
        }
        if let Some(why) = said_by_the_monitor(&now.migration) {
            return Some(why);
        }
        if now.status() != "active" || watched * 2 < WINDOW || dirtied < sent || dirtied == 0 {
            return None;
        }
        let limit = now.max_bandwidth;
        let cause = match limit > 0 && sent >= limit / 100 * FULL {
            true => format!("max-bandwidth allows {}/s", size(limit)),
            false => format!("the link carries {}/s", size(sent)),
        };
        Some(format!("the guest dirties {}/s, and {cause}", size(dirtied)))
    }
}

/// What the monitor itself says holds it up, unless that is memory, where the rates say why.
fn said_by_the_monitor(migration: &Value) -> Option<String> {
    let mut parts = migration["x-parts"].as_array().into_iter().flatten();
    let stalled = parts.find(|part| part["stalled"] == true).and_then(|part| part["name"].as_str());
    let why = migration["x-stalled"].as_str()?;
    (!stalled.is_some_and(|name| name.ends_with("ram"))).then(|| why.to_owned())
}

fn size(bytes: u64) -> String {
    let tenths = |unit: u32| {
        let tenths = (u128::from(bytes) * 10) >> unit;
        format!("{}.{}", tenths / 10, tenths % 10)
    };
    match bytes {
        0..0x400 => format!("{bytes} B"),
        0x400..0x10_0000 => format!("{} KiB", tenths(10)),
        0x10_0000..0x4000_0000 => format!("{} MiB", tenths(20)),
        _ => format!("{} GiB", tenths(30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Migrations of a guest of 128 MiB that dirties 100 MiB/s, looked at twice a second while `step` bytes are sent
    /// between two looks.
    fn watched(status: &str, step: u64, max_bandwidth: u64) -> Watched {
        let mut watched = Watched::default();
        for look in 0..6 {
            let migration = json!({
                "status": status, "total-time": 5200 + look * 500, "remaining": 60 << 20, "expected-downtime": 640,
                "ram": {
                    "total": 128 << 20, "transferred": (100 << 20) + look * step, "dirty-sync-count": 9, "page-size": 4096,
                    "dirty-pages-rate": 25600, "remaining": 60 << 20,
                },
            });
            let parameters = json!({ "max-bandwidth": max_bandwidth, "downtime-limit": 300 });
            watched.add(Sample::new(Duration::from_millis(look * 500), &migration, &parameters));
        }
        watched
    }

    #[test]
    fn a_running_migration_is_shown_with_what_holds_it_up() {
        let lines = watched("active", 40 << 20, 128 << 20).picture();
        let expected = [
            "status      active, round 9, 7.7 s",
            "sent        300.0 MiB at 80.0 MiB/s",
            "remaining   60.0 MiB of 128.0 MiB",
            "dirty rate  100.0 MiB/s",
            "downtime    640 ms expected, limit 300 ms",
            "stall       the guest dirties 100.0 MiB/s, and the link carries 80.0 MiB/s",
        ];
        assert_eq!(lines, expected);
        let stall = |watched: Watched| watched.stall().unwrap_or_default();
        let limited = "the guest dirties 100.0 MiB/s, and max-bandwidth allows 80.0 MiB/s";
        assert_eq!(stall(watched("active", 40 << 20, 80 << 20)), limited);
        assert_eq!(stall(watched("active", 60 << 20, 0)), "");
        assert_eq!(
            stall(watched("active", 0, 0)),
            "nothing is sent: the destination does not read, or the link is dead"
        );
        let loads = "nothing is sent: it waits for the destination to load the guest";
        assert_eq!(stall(watched("device", 0, 0)), loads);
        assert_eq!(stall(watched("pre-switchover", 0, 0)), "it waits for migrate-continue");
    }

    #[test]
    fn the_end_is_shown_with_its_reason() {
        let end = |migration: Value| {
            let mut watched = Watched::default();
            watched.add(Sample::new(Duration::ZERO, &migration, &json!({})));
            (watched.picture(), watched.ended())
        };
        assert_eq!(end(json!({})), (vec!["status      none".to_owned()], None));
        let (lines, ended) = end(json!({ "status": "failed", "error-desc": "connection lost" }));
        assert_eq!((lines[1].as_str(), ended), ("error       connection lost", Some(false)));
        let ram = json!({ "total": 1 << 20, "transferred": 2048, "dirty-sync-count": 3 });
        let (lines, ended) = end(json!({ "status": "completed", "downtime": 3, "total-time": 1234, "ram": ram }));
        let expected = [
            "status      completed, round 3, 1.2 s",
            "sent        2.0 KiB",
            "remaining   0 B of 1.0 MiB",
            "downtime    3 ms",
        ];
        assert_eq!((lines, ended), (expected.map(String::from).to_vec(), Some(true)));
    }

    #[test]
    fn a_device_that_does_not_shrink_is_named() {
        let mut watched = watched("active", 60 << 20, 0);
        let mut last = watched.samples.back().unwrap().clone();
        last.migration["x-parts"] = json!([
            { "name": "pc.bios", "remaining": 0, "rate": 0, "stalled": false },
            { "name": "vfio0", "remaining": 4096, "rate": -1024, "stalled": true },
        ]);
        last.migration["x-stalled"] = json!("'vfio0' no longer shrinks: 4.0 KB of it remain");
        watched.add(last.clone());
        assert_eq!(watched.stall().as_deref(), Some("'vfio0' no longer shrinks: 4.0 KB of it remain"));
        last.migration["x-parts"][1]["name"] = json!("microvm.ram");
        watched.add(last.clone());
        assert_eq!(watched.stall(), None);
        last.migration["x-parts"] = json!([{ "name": "vfio0", "remaining": 4096, "rate": -1024, "stalled": false }]);
        last.migration["x-stalled"] = json!("the destination has not agreed to the switchover: vfio0");
        watched.add(last);
        assert_eq!(watched.stall().as_deref(), Some("the destination has not agreed to the switchover: vfio0"));
        let parts: Vec<_> = watched.picture().into_iter().filter(|line| line.starts_with("  ")).collect();
        assert_eq!(parts, ["  vfio0: 4.0 KiB, grows by 1.0 KiB/s"]);
    }
}
