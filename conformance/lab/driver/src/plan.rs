//! What is to be done, and what was seen.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// One of the two monitors of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the guest runs first.
    Source,
    /// Where it is to go.
    Destination,
}

impl Side {
    /// Both, the source first.
    pub const BOTH: [Side; 2] = [Side::Source, Side::Destination];
}

/// Which monitor it is, and how its QMP socket is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// QEMU, which connects to a socket of ours.
    Qemu,
    /// reference-vmm, which listens.
    Reference,
}

/// A program that runs the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Monitor {
    /// Its path in the machine.
    pub program: String,
    /// How it is spoken to.
    pub kind: Kind,
    /// Everything but QMP, the serial port and `incoming`.
    pub arguments: Vec<String>,
    /// Capabilities that are set, by name.
    pub capabilities: BTreeMap<String, bool>,
    /// Arguments of `migrate-set-parameters`.
    pub parameters: Value,
}

/// A mediated device, made for the job and removed after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Device {
    /// Whose it is, by its place on the trip.
    pub stop: usize,
    /// Its name under `/sys/bus/mdev/devices`.
    pub uuid: String,
    /// Its driver: `testdev` or `mtty`.
    pub driver: String,
    /// Its type, such as `testdev-pci`.
    pub kind: String,
    /// Files in its folder `testdev`, and what is written to them, in order.
    pub settings: Vec<(String, String)>,
}

/// A setting that changes on the way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Change {
    /// Milliseconds after `migrate`, by the machine's clock.
    pub after_ms: u64,
    /// The device.
    pub uuid: String,
    /// The file.
    pub name: String,
    /// What is written to it.
    pub value: String,
}

/// What is run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The monitors that the guest runs on, one after the other: two at least.
    pub stops: Vec<Monitor>,
    /// The devices of all.
    pub devices: Vec<Device>,
    /// What the guest prints where it starts when it is ready to go.
    pub ready: String,
    /// Seconds, by the machine's clock, that it may take to get there.
    pub ready_s: u64,
    /// What the guest prints again and again, so often that it must appear twice at the destination.
    pub beat: String,
    /// Milliseconds that the guest runs at each stop, after it is ready, before the next is started; at least 4,000.
    pub before_ms: u64,
    /// Milliseconds that the guest is watched after it has arrived.
    pub after_ms: u64,
    /// Changes on the way to the last stop, by time.
    pub changes: Vec<Change>,
    /// Seconds, by the machine's clock, after which the migration is cancelled.
    pub limit_s: u64,
    /// Keep every byte of the migration to the last stop in this folder.
    pub record: Option<String>,
    /// Milliseconds after `migrate` to the last stop at which it is cancelled.
    pub cancel_after_ms: Option<u64>,
    /// Take a [`Sample`] of the last migration at each look at it.
    pub samples: bool,
}

/// How far a migration under way is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since `migrate`, by the machine's clock.
    pub ms: f64,
    /// Readings of the dirty log (`dirty-sync-count`).
    pub syncs: u64,
    /// Processor time of the source's monitor in milliseconds, without that of its vCPUs; `None` when it has ended.
    pub cpu_ms: Option<u64>,
    /// What the source's monitor holds in memory, in KiB.
    pub resident_kib: Option<u64>,
    /// Some counters of each `testdev`, by its name.
    pub counters: BTreeMap<String, BTreeMap<String, i64>>,
}

/// An event, or a step of the driver's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Happened {
    /// Where.
    pub side: Side,
    /// The event's name.
    pub name: String,
    /// The event's data.
    pub data: Value,
    /// Milliseconds since `migrate`, by the machine's clock.
    pub ms: f64,
}

/// What was seen of one migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// How the migration ended at the source: `completed`, `failed`, `cancelled`; `limit` when it had to be cancelled.
    pub status: String,
    /// The source's last `query-migrate`.
    pub migration: Value,
    /// The destination's last `query-status`, or why there is none.
    pub arrived: Value,
    /// The source's last `query-status`, or why there is none.
    pub left: Value,
    /// Events of both sides, by time.
    pub events: Vec<Happened>,
    /// The counters of each `testdev`, by its name, at the end.
    pub counters: BTreeMap<String, BTreeMap<String, i64>>,
    /// The state of migration in which each `testdev` is at the end.
    pub states: BTreeMap<String, String>,
    /// What the guest printed at the source.
    pub source_serial: String,
    /// What the guest printed at the destination.
    pub destination_serial: String,
    /// What the source's monitor printed.
    pub source_stderr: String,
    /// What the destination's monitor printed.
    pub destination_stderr: String,
    /// The destination's last `query-migrate`, or why there is none.
    #[serde(default)]
    pub incoming: Value,
    /// Milliseconds after `migrate` at which it was seen to have ended.
    #[serde(default)]
    pub ended_ms: f64,
    /// After a migration that was not completed: whether the guest printed more at the source.
    #[serde(default)]
    pub goes_on: bool,
    /// Samples, by time, if they were asked for.
    #[serde(default)]
    pub samples: Vec<Sample>,
}

impl Report {
    /// What stands in front of a report in the machine's output.
    pub const MARK: &str = "lab-report: ";

    /// The first event with this name at this side at or after `from` milliseconds.
    pub fn event(&self, side: Side, name: &str, from: f64) -> Option<&Happened> {
        self.events.iter().find(|event| event.side == side && event.name == name && event.ms >= from)
    }

    /// The states that a device told in events `VFIO_MIGRATION`, in order.
    pub fn device_states(&self, side: Side, id: &str) -> Vec<(&str, f64)> {
        let own = self.events.iter().filter(|event| event.side == side && event.name == "VFIO_MIGRATION");
        let own = own.filter(|event| event.data["device-id"] == id);
        own.filter_map(|event| Some((event.data["device-state"].as_str()?, event.ms))).collect()
    }

    /// A counter of a device, 0 if there is none.
    pub fn counter(&self, uuid: &str, name: &str) -> i64 {
        self.counters.get(uuid).and_then(|all| all.get(name)).copied().unwrap_or_default()
    }
}
