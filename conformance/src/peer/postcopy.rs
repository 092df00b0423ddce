//! Guests that go before their memory.

use anyhow::{Result, ensure};
use serde_json::{Map, Value};

use super::party::Party;
use super::rows::{PEERS, channels_of};
use super::{Journey, Link, Load, Stop};
use crate::patience::PATIENCE;
use crate::roots::Suite;
use crate::scenario::Accel;

/// Hops of the ring.
const RING_HOPS: usize = 20;

/// When the operator lets a guest go before its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// As soon as the migration has begun: nearly all of its memory comes later.
    AtOnce,
    /// When all of its memory was sent once: what it has written to since comes later.
    AfterPass,
    /// As soon as the migration has begun, on every second hop from the first on. On the others it goes with its memory.
    InTurn,
}

impl Departure {
    /// Whether the guest goes before its memory on this hop, of which 1 is the first.
    pub(super) fn is_of(self, hop: usize) -> bool {
        self != Departure::InTurn || hop % 2 == 1
    }

    /// Lets the guest go, whose migration was begun.
    pub(super) fn start(self, here: &mut Party) -> Result<()> {
        if self == Departure::AfterPass {
            // The log is read before each pass.
            let read = |migration: &Value| migration["ram"]["dirty-sync-count"].as_u64() >= Some(2);
            let passed = here.monitor().wait_migration(PATIENCE, read)?;
            ensure!(passed["status"] == "active", "the guest has gone with its memory: {passed}");
        }
        here.monitor().execute("migrate-start-postcopy", Value::Null).map(drop)
    }

    /// What its guest does. One that is to go after a pass must not have gone with its memory by then, however little of a processor it gets.
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

/// That a destination with `postcopy-blocktime` tells of `cpus` vCPUs and others how long they waited, as QEMU 11.1 does.
pub(super) fn judge_block_times(there: &Value, cpus: u32) -> Result<()> {
    // Of a vCPU for which a thread of the kernel waits nobody knows that it is one.
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

/// Guests that go before their memory. In the background it comes slowly enough that they have to wait for much of it.
pub(super) fn all() -> Vec<Journey> {
    let mut parameters = Map::new();
    parameters.insert("max-postcopy-bandwidth".into(), (32 << 20).into());
    let mut journeys = Vec::new();
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let [old, middle, new] = peers;
    let reference = Stop::Reference;
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    for stops in ways {
        for (link, link_name) in [(Link::Tcp, "tcp"), (Link::Unix, "unix")] {
            for (departure, when, preempt) in [
                (Departure::AtOnce, "at-once", false),
                (Departure::AfterPass, "after-pass", false),
                (Departure::AtOnce, "preempt", true),
            ] {
                let name = format!("{}>{}/postcopy/{link_name}/{when}", stops[0], stops[1]);
                let quick = [
                    ([reference, new], Link::Tcp, "at-once"),
                    ([reference, old], Link::Unix, "after-pass"),
                    ([new, reference], Link::Unix, "at-once"),
                    ([old, reference], Link::Tcp, "at-once"),
                    ([reference; 2], Link::Tcp, "after-pass"),
                    // The connections come in another order to and from 7.2 than to and from those after it.
                    ([reference, old], Link::Tcp, "preempt"),
                    ([reference, middle], Link::Tcp, "preempt"),
                    ([old, reference], Link::Tcp, "preempt"),
                    ([new, reference], Link::Unix, "preempt"),
                ]
                .contains(&(stops, link, when));
                let capabilities =
                    if preempt { vec!["postcopy-ram", "postcopy-preempt"] } else { vec!["postcopy-ram"] };
                journeys.push(Journey {
                    name,
                    stops: stops.into(),
                    link,
                    capabilities,
                    parameters: parameters.clone(),
                    postcopy: Some(departure),
                    tls: None,
                    load: departure.load(),
                    quick,
                });
            }
        }
    }
    for stops in [[reference, new], [new, reference], [reference; 2]] {
        journeys.push(Journey {
            name: format!("{}>{}/postcopy/blocktime", stops[0], stops[1]),
            stops: stops.into(),
            link: Link::Unix,
            capabilities: vec!["postcopy-ram", "postcopy-blocktime"],
            parameters: parameters.clone(),
            postcopy: Some(Departure::AtOnce),
            load: Load { downtime_limit: 1, cpus: 2, ..Load::default() },
            quick: stops[1] == reference && stops[0] == new,
            ..super::rows::plain()
        });
    }
    journeys.extend(with_page_channels(&parameters));
    // A huge page comes as a whole, over either channel.
    let ways = peers.into_iter().flat_map(|qemu| [[qemu, reference], [reference, qemu]]).chain([[reference; 2]]);
    for stops in ways {
        for preempt in [false, true] {
            let with = if preempt { "huge-pages+preempt" } else { "huge-pages" };
            let backend = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,seal=off";
            journeys.push(Journey {
                name: format!("{}>{}/postcopy/{with}", stops[0], stops[1]),
                stops: stops.into(),
                link: Link::Unix,
                capabilities: if preempt { vec!["postcopy-ram", "postcopy-preempt"] } else { vec!["postcopy-ram"] },
                parameters: parameters.clone(),
                postcopy: Some(Departure::AtOnce),
                load: Load { downtime_limit: 1, memory_backend: Some(backend), ..Load::default() },
                quick: preempt && [[new, reference], [reference, new]].contains(&stops),
                ..super::rows::plain()
            });
        }
    }
    // Each way of all is taken before the memory and with it: there are seven.
    let all = [old, reference, reference, new, reference, middle, reference];
    let short = [new, reference, reference];
    for (name, stops, hops) in [(RING_HOPS.to_string(), &all[..], RING_HOPS), ("short".into(), &short, 4)] {
        journeys.push(Journey {
            name: format!("ring/postcopy/{name}"),
            stops: stops.iter().copied().cycle().take(hops + 1).collect(),
            capabilities: vec!["postcopy-ram"],
            parameters: parameters.clone(),
            postcopy: Some(Departure::InTurn),
            ..super::rows::plain()
        });
    }
    journeys
}

/// Pages go over page channels until the guest goes: with 11.1 and between two reference-vmm. (10.0 refuses that, and a destination of 7.2
/// dies of it.)
fn with_page_channels(parameters: &Map<String, Value>) -> Vec<Journey> {
    let new = Stop::Qemu(PEERS[2], Accel::Kvm);
    let reference = Stop::Reference;
    let mut journeys = Vec::new();
    for stops in [[reference, new], [new, reference], [reference; 2]] {
        for (departure, with, link, (channels, method)) in [
            (Departure::AtOnce, "multifd/at-once", Link::Tcp, (2, "none")),
            (Departure::AfterPass, "multifd/after-pass", Link::Unix, (4, "zstd")),
            (Departure::AtOnce, "multifd+preempt", Link::Unix, (2, "none")),
        ] {
            let mut capabilities = vec!["postcopy-ram", "multifd"];
            if with.ends_with("preempt") {
                capabilities.push("postcopy-preempt");
            }
            let mut parameters = parameters.clone();
            parameters.extend(channels_of(channels, method));
            journeys.push(Journey {
                name: format!("{}>{}/postcopy/{with}", stops[0], stops[1]),
                stops: stops.into(),
                link,
                capabilities,
                parameters,
                postcopy: Some(departure),
                load: departure.load(),
                quick: [[reference, new], [new, reference]].contains(&stops) && departure == Departure::AfterPass,
                ..super::rows::plain()
            });
        }
    }
    journeys
}
