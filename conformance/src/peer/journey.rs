//! A guest's way over several monitors.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reference_vmm::payload::{Progress, Transcript};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::party::{Machine, Monitor, Party};
use crate::roots::{Root, Suite};
use crate::scenario::Accel;

/// How long a single step may take: a hop, or the guest's next passes.
const PATIENCE: Duration = Duration::from_secs(60);
/// MiB of guest RAM.
const MEMORY: u32 = 64;
/// The guest rewrites 16 MiB three times a second, checks the rest in the background and reports fifty times a second.
const PAYLOAD: &str = "dirty=16M rate=48M hold=4M zero=2M verify=16384 report=20";
/// A link slow enough that the guest dirties most of its memory again during the first round.
const MAX_BANDWIDTH: u64 = 64 << 20;
const DOWNTIME_LIMIT_MS: u64 = 100;

/// A monitor on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Real QEMU of this suite.
    Qemu(Suite, Accel),
    /// reference-vmm, on KVM.
    Reference,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Qemu(suite, Accel::Kvm) => f.write_str(suite.series()),
            Stop::Qemu(suite, Accel::Tcg) => write!(f, "{} tcg", suite.series()),
            Stop::Reference => f.write_str("ref"),
        }
    }
}

/// What the guest migrates over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A UNIX socket.
    Unix,
    /// A TCP connection over the loopback.
    Tcp,
}

/// One row of the table.
#[derive(Debug, Clone)]
pub struct Journey {
    /// Unique.
    pub name: String,
    /// Where the guest boots, and where it goes.
    pub stops: Vec<Stop>,
    /// How it gets from each to the next.
    pub link: Link,
    /// Capabilities that are on at both ends of each hop.
    pub capabilities: Vec<&'static str>,
    /// Parameters at both ends of each hop, beside the limits of bandwidth and downtime.
    pub parameters: Map<String, Value>,
    /// vCPUs.
    pub cpus: u32,
    /// In the representative subset.
    pub quick: bool,
}

/// What a hop took.
#[derive(Debug, Clone, Serialize)]
pub struct Hop {
    /// From where.
    pub from: String,
    /// To where.
    pub to: String,
    /// Between the events STOP at the source and RESUME at the destination, ms.
    pub downtime_ms: f64,
    /// The source's figure of the whole migration, ms.
    pub total_ms: u64,
    /// Bytes, by the source's count.
    pub bytes: u64,
    /// How often the source read the log of dirty pages.
    pub rounds: u64,
}

/// How a journey went.
#[derive(Debug, Clone, Serialize)]
pub struct Account {
    /// Hop by hop.
    pub hops: Vec<Hop>,
    /// Pages that the guest wrote or checked and found as it had left them.
    pub pages: u64,
    /// Passes over all its memory.
    pub passes: u64,
    /// Lines of its output that a migration cut in two.
    pub cut_lines: usize,
}

impl Journey {
    /// Boots the guest and takes it all the way. `tell` hears of every hop as it ends.
    ///
    /// # Errors
    /// A migration fails, the guest does not go on, or what it printed shows that it did not arrive whole.
    pub fn travel(
        &self,
        roots: &BTreeMap<Suite, Root>,
        program: &Monitor,
        scratch: &Path,
        mut tell: impl FnMut(&Hop, &Progress),
    ) -> Result<Account> {
        let machine = Machine { memory: MEMORY, cpus: self.cpus, payload: PAYLOAD.into() };
        let start = |n: usize, incoming| {
            let stop = self.stops[n];
            let root = match stop {
                Stop::Qemu(suite, _) => Some(roots.get(&suite).with_context(|| format!("no QEMU of {suite}"))?),
                Stop::Reference => None,
            };
            Party::start(stop, root, program, &machine, &format!("stop{n}"), incoming, scratch)
        };
        let (mut texts, mut hops) = (Vec::new(), Vec::new());
        let mut here = start(0, false)?;
        here.wait_progress("complete its first pass", PATIENCE, |p| p.pass >= 1 && p.rounds >= 1)?;
        for n in 1..self.stops.len() {
            let mut there = start(n, true)?;
            let context = || format!("hop {n}, {} to {}", self.stops[n - 1], self.stops[n]);
            let hop = self.hop(&mut here, &mut there, scratch, n).with_context(context)?;
            let progress = self.settle(&mut there).with_context(context)?;
            tell(&hop, &progress);
            hops.push(hop);
            texts.push(std::mem::replace(&mut here, there).end()?);
        }
        texts.push(here.end()?);
        let transcript = Transcript::read(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let last = transcript.last;
        Ok(Account { hops, pages: last.written + last.checked, passes: last.pass, cut_lines: transcript.cut })
    }

    fn hop(&self, here: &mut Party, there: &mut Party, scratch: &Path, n: usize) -> Result<Hop> {
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        for party in [&mut *here, &mut *there] {
            party.monitor().set_capabilities(&self.capabilities)?;
            party.monitor().set_parameters(&Value::Object(self.parameters.clone()))?;
        }
        let limits = json!({ "max-bandwidth": MAX_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT_MS });
        here.monitor().set_parameters(&limits)?;
        let address = match self.link {
            Link::Unix => format!("unix:{}", scratch.join(format!("link{n}")).display()),
            Link::Tcp => "tcp:127.0.0.1:0".into(),
        };
        there.monitor().execute("migrate-incoming", json!({ "uri": address }))?;
        let uri = match self.link {
            Link::Unix => address,
            Link::Tcp => {
                let waiting = there.monitor().migration()?;
                let port = waiting["socket-address"][0]["port"].as_str().context("the destination names no port")?;
                format!("tcp:127.0.0.1:{port}")
            }
        };
        here.monitor().execute("migrate", json!({ "uri": uri }))?;
        let done = here.monitor().wait_migration(PATIENCE, |m| m["status"] == "completed");
        // What the destination says about a failure is worth more than the source's broken pipe.
        let done = match done {
            Err(error) => return Err(there.monitor().last_words().map_or(error, |said| anyhow::anyhow!(said))),
            Ok(done) => done,
        };
        let stopped = here.monitor().wait_event("STOP", PATIENCE)?.time.context("STOP has no timestamp")?;
        let resumed = there.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
        for (party, expected) in [(here, "postmigrate"), (there, "running")] {
            let status = party.monitor().execute("query-status", Value::Null)?;
            ensure!(status["status"] == expected, "{} says {status}, not {expected}", party.stop());
        }
        let gap = resumed.checked_sub(stopped).context("the guest was started before it was stopped")?;
        let number = |value: &Value| value.as_u64().context("the source does not report all figures");
        Ok(Hop {
            from: self.stops[n - 1].to_string(),
            to: self.stops[n].to_string(),
            downtime_ms: gap.as_micros() as f64 / 1e3,
            total_ms: number(&done["total-time"])?,
            bytes: number(&done["ram"]["transferred"])?,
            rounds: number(&done["ram"]["dirty-sync-count"])?,
        })
    }

    /// Waits until the guest has rewritten all of its memory and checked the rest since it arrived.
    fn settle(&self, party: &mut Party) -> Result<Progress> {
        let arrived = party.wait_progress("print anything", PATIENCE, |_| true)?;
        // The pass and the round under way may have begun before the migration.
        let (pass, rounds) = (arrived.pass + 2, arrived.rounds + u64::from(self.cpus) + 1);
        let settled = party.wait_progress("complete its passes", PATIENCE, |p| p.pass >= pass && p.rounds >= rounds)?;
        ensure!(settled.stale == 0, "the guest found {} stale pages", settled.stale);
        ensure!(settled.tsc_back == 0, "the guest's clock ran backwards {} times", settled.tsc_back);
        Ok(settled)
    }
}
