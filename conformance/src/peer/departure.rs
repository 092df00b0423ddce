//! When a guest goes before its memory, and what both ends must tell of it.

use super::endpoint::Endpoint;
use super::env::{Load, Stop};
use crate::patience::PATIENCE;
use crate::roots::Suite;
use anyhow::{Result, ensure};
use serde_json::Value;

/// When the operator lets a guest go before its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// As soon as the migration has begun: nearly all of its memory comes later.
    AtOnce,
    /// When all of its memory was sent once: what it has written to since comes later.
    AfterPass,
    /// As soon as the migration has begun, on every second hop from the first on. On the others it goes with its
    /// memory.
    InTurn,
}

impl Departure {
    /// Whether the guest goes before its memory on this hop, of which 1 is the first.
    pub(super) fn is_of(self, hop: usize) -> bool {
        self != Departure::InTurn || hop % 2 == 1
    }

    /// Lets the guest go, whose migration was begun.
    pub(super) fn start(self, here: &mut Endpoint) -> Result<()> {
        if self == Departure::AfterPass {
            // The log is read before each pass.
            let read = |migration: &Value| migration["ram"]["dirty-sync-count"].as_u64() >= Some(2);
            let passed = here.monitor().wait_migration(PATIENCE, read)?;
            ensure!(passed["status"] == "active", "the guest has gone with its memory: {passed}");
        }
        here.monitor().execute("migrate-start-postcopy", Value::Null).map(drop)
    }

    /// What its guest does. One that is to go after a pass must not have gone with its memory by then, however little
    /// of a processor it gets.
    pub(super) fn load(self) -> Load {
        let load = Load { downtime_limit: 1, ..Load::default() };
        let max_bandwidth = if self == Departure::AfterPass { 24 << 20 } else { load.max_bandwidth };
        Load { max_bandwidth, ..load }
    }

    /// That memory came after the guest, in a migration that `source` says has completed.
    pub(super) fn judge(self, done: &Value, source: Stop) -> Result<()> {
        let ram = &done["ram"];
        if matches!(source, Stop::Qemu(Suite::Bullseye, _)) {
            // It does not tell how much.
            ensure!(ram["postcopy-requests"].as_u64() > Some(0), "the guest has waited for no page: {done}");
            return Ok(());
        }
        let (later, total) = (ram["postcopy-bytes"].as_u64(), ram["total"].as_u64());
        ensure!(later > Some(0), "no memory came after the guest: {done}");
        // What it has written to lately may all be there before it looks.
        let waited = ram["postcopy-requests"].as_u64() > Some(0);
        ensure!(self == Departure::AfterPass || waited, "the guest has waited for no page: {done}");
        ensure!(self != Departure::AfterPass || later < total, "all memory came after the guest: {done}");
        Ok(())
    }
}

/// That a destination with `postcopy-blocktime` tells of `cpus` vCPUs and others how long they waited, as QEMU 11.1
/// does.
pub(super) fn judge_block_times(there: &Value, cpus: u32) -> Result<()> {
    // Where a thread of the kernel waits for a vCPU, it cannot be known that it is one.
    let per_vcpu = |name: &str| there[name].as_array().is_some_and(|list| list.len() == cpus as usize);
    let sum = |list: &Vec<Value>| list.iter().filter_map(Value::as_u64).sum::<u64>();
    let figures = ["postcopy-blocktime", "postcopy-latency", "postcopy-non-vcpu-latency"];
    let distribution = there["postcopy-latency-dist"].as_array().filter(|buckets| buckets.len() == 24);
    let whole = figures.iter().all(|name| there[name].is_u64())
        && there["postcopy-latency"].as_u64() > Some(0)
        && distribution.map(sum) > Some(0)
        && ["postcopy-vcpu-blocktime", "postcopy-vcpu-latency"].into_iter().all(per_vcpu);
    ensure!(whole, "the destination does not tell how long the guest has waited: {there}");
    Ok(())
}
