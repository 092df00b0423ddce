//! `--event-log`: what happens to guest and migration, one line of JSON each.

use crate::non_blocking::NonBlockingWriter;
use crate::qmp;
use qevm_migration::{DowntimeParts, Statistics};
use reference_vmm::vmm::Vmm;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes that wait for a slow disk.
const BUFFER: usize = 1 << 20;
/// How long the end of the program waits for one.
const PATIENCE: Duration = Duration::from_millis(500);

/// Writes out what still waits when the program ends.
pub(super) struct EventLog(NonBlockingWriter);

impl Drop for EventLog {
    fn drop(&mut self) {
        self.0.flush(PATIENCE);
    }
}

impl EventLog {
    /// Appends to `path` whatever happens from now on. A file that cannot take it costs lines, whose number the next
    /// one says, and never time.
    ///
    /// # Errors
    /// The file cannot be written; the host has no thread for it.
    pub(super) fn start(path: &Path, vmm: &Vmm) -> io::Result<EventLog> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let failed = |error| tracing::warn!(%error, "the event log loses lines");
        let writer = NonBlockingWriter::start(BUFFER, Box::new(file), failed, || ())?;
        let (output, lost) = (writer.clone(), AtomicU64::new(0));
        vmm.record_events(move |event, migration| {
            let mut line = event.to_json();
            if let Some(migration) = migration {
                line["x-migration"] = so_far(&migration.statistics());
            }
            let before = lost.load(Ordering::Relaxed);
            if before > 0 {
                line["x-lost"] = before.into();
            }
            match output.write_whole(format!("{line}\n").as_bytes()) {
                true => lost.store(0, Ordering::Relaxed),
                false => lost.store(before + 1, Ordering::Relaxed),
            }
        });
        Ok(EventLog(writer))
    }
}

/// What `query-migrate` says of a migration at this moment, its last round, and what the guest was paused for.
fn so_far(statistics: &Statistics) -> Value {
    let mut value = qmp::outgoing(statistics);
    if let Some(round) = statistics.rounds.last() {
        value["rounds"] = statistics.rounds.len().into();
        value["round"] = json!({
            "start-ms": round.start.as_millis() as u64,
            "took-ms": round.took.as_millis() as u64,
            "pages": round.pages,
            "bytes": round.bytes,
            "dirty-bytes-per-second": round.dirty_rate,
        });
    }
    let parts = &statistics.downtime_parts;
    if *parts != DowntimeParts::default() {
        let us = |part: Duration| part.as_micros() as u64;
        value["downtime-us"] = json!({
            "stop": us(parts.stop),
            "pre-switchover": us(parts.pre_switchover),
            "device-state": us(parts.device_state),
            "last-round": us(parts.last_round),
            "protect": us(parts.protect),
            "send": us(parts.send),
            "load": us(parts.load),
            "confirm": us(parts.confirm),
        });
    }
    value
}
