//! A guest's way over several monitors.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use reference_vmm::payload::{Progress, Transcript};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::gear::{self, Ear, Gear};
use super::party::{Monitor, Party};
use super::postcopy::{self, Departure};
use super::release;
use super::tls::Secured;
use crate::exec;
use crate::patience::PATIENCE;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;

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
    /// A command at each end, with a named pipe between them.
    Exec,
    /// A pair of sockets that the monitors are given.
    Descriptor,
    /// A file: the guest goes on from it when all of it is there. 7.2 has it written and read by commands.
    File,
}

/// What the guest does, and how fast it may migrate.
#[derive(Debug, Clone)]
pub struct Load {
    /// Guest RAM, MiB.
    pub memory: u32,
    /// Destinations have all their memory from the host before they start.
    pub mem_prealloc: bool,
    /// The machines' RAM is a memory backend of this type, with these properties beside `id` and `size`.
    pub memory_backend: Option<&'static str>,
    /// vCPUs.
    pub cpus: u32,
    /// All monitors leave only the local APICs to the kernel.
    pub split_irqchip: bool,
    /// All machines have a PCI bus, whose host bridge the guest checks.
    pub pcie: bool,
    /// Configuration of the payload, see [`reference_vmm::payload`].
    pub payload: String,
    /// Virtio devices that it keeps busy.
    pub gear: Vec<Gear>,
    /// `max-bandwidth`, bytes per second.
    pub max_bandwidth: u64,
    /// `downtime-limit`, ms.
    pub downtime_limit: u64,
}

impl Load {
    /// How many of the vCPUs the payload uses; the others sleep.
    pub(super) fn busy(&self) -> u64 {
        self.cpus.min(4).into()
    }
}

impl Default for Load {
    /// One vCPU rewrites 16 MiB of 64 three times a second, checks the rest in the background and reports fifty times a
    /// second; the link is slow enough that most of the 16 MiB are dirty again after the first round.
    fn default() -> Load {
        Load {
            memory: 64,
            mem_prealloc: false,
            memory_backend: None,
            cpus: 1,
            split_irqchip: false,
            pcie: false,
            payload: "dirty=16M rate=48M hold=4M zero=2M verify=16384 report=20".into(),
            gear: Vec::new(),
            max_bandwidth: 64 << 20,
            downtime_limit: 100,
        }
    }
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
    /// The guest goes before its memory, with capability `postcopy-ram`.
    pub postcopy: Option<Departure>,
    /// The connections are secured.
    pub tls: Option<Secured>,
    /// What the guest does meanwhile.
    pub load: Load,
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

/// Something that happens on the way.
#[derive(Debug, Clone)]
pub enum Moment {
    /// The guest has booted and written to all of its memory.
    Booted(Progress),
    /// A hop begins.
    Leaving {
        /// From where.
        from: Stop,
        /// To where.
        to: Stop,
        /// What `migrate` was told.
        uri: String,
    },
    /// The source has read its log of dirty pages; `query-migrate`.
    Round(Value),
    /// The guest runs at the next monitor.
    Arrived(Hop),
    /// It has rewritten and checked all of its memory there.
    Settled(Progress),
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
    /// Tries that failed because the connection was cut.
    pub cuts: usize,
}

/// Where a journey is played.
#[derive(Debug, Clone, Copy)]
pub struct Stage<'s> {
    /// The real QEMUs.
    pub roots: &'s BTreeMap<Suite, Root>,
    /// The reference-vmm under judgement.
    pub program: &'s Monitor,
    /// A folder for sockets, consoles and logs.
    pub scratch: &'s Path,
    /// Further arguments of a monitor.
    pub more: &'s [&'static str],
}

impl Journey {
    /// Boots the guest and takes it all the way. `tell` hears of what happens.
    ///
    /// # Errors
    /// A migration fails, the guest does not go on, or what it printed shows that it did not arrive whole.
    pub fn travel(&self, stage: &Stage<'_>, mut tell: impl FnMut(Moment)) -> Result<Account> {
        let (mut texts, mut hops) = (Vec::new(), Vec::new());
        let ear = Ear::listen(&self.load.gear, stage.scratch)?;
        let mut here = self.boot(stage, &mut tell)?;
        for n in 1..self.stops.len() {
            let mut there = self.start(stage, n, true)?;
            let context = || format!("hop {n}, {} to {}", self.stops[n - 1], self.stops[n]);
            let hop = self.hop(&mut here, &mut there, stage.scratch, n, &mut tell).with_context(context)?;
            tell(Moment::Arrived(hop.clone()));
            tell(Moment::Settled(self.settle(&mut there).with_context(context)?));
            hops.push(hop);
            texts.push(std::mem::replace(&mut here, there).end()?);
        }
        texts.push(here.end()?);
        gear::judge(&self.load.gear, &texts, stage.scratch, &ear)?;
        Ok(account(hops, &Transcript::read(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>())?))
    }

    /// Starts the monitor of a stop.
    pub(crate) fn start(&self, stage: &Stage<'_>, n: usize, incoming: bool) -> Result<Party> {
        let stop = self.stops[n];
        let root = match stop {
            Stop::Qemu(suite, _) => Some(stage.roots.get(&suite).with_context(|| format!("no QEMU of {suite}"))?),
            Stop::Reference => None,
        };
        let rtc = self.stops.iter().any(|stop| matches!(stop, Stop::Qemu(_, Accel::Tcg)));
        Party::start(stop, root, stage, &self.load, &format!("stop{n}"), incoming, rtc)
    }

    /// Boots the guest at the first stop.
    pub(crate) fn boot(&self, stage: &Stage<'_>, tell: &mut dyn FnMut(Moment)) -> Result<Party> {
        let mut here = self.start(stage, 0, false)?;
        let rounds = self.load.busy();
        let booted = here.wait_progress("complete a pass", PATIENCE, |p| p.pass >= 1 && p.rounds >= rounds)?;
        self.wait_for_gear(&mut here)?;
        tell(Moment::Booted(booted));
        Ok(here)
    }

    /// Tells both ends what they have to know before `migrate-incoming`.
    pub(crate) fn prepare(&self, here: &mut Party, there: &mut Party) -> Result<()> {
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        for (party, reads) in [(&mut *here, false), (&mut *there, true)] {
            // Into a file nothing goes by postcopy: it is how a destination reads one.
            let both = reads || self.link != Link::File;
            let on = self.capabilities.iter().copied().filter(|name| both || *name != "postcopy-ram");
            party.monitor().set_capabilities(&on.collect::<Vec<_>>())?;
            party.monitor().set_parameters(&Value::Object(self.parameters.clone()))?;
        }
        let limits = json!({ "max-bandwidth": self.load.max_bandwidth, "downtime-limit": self.load.downtime_limit });
        here.monitor().set_parameters(&limits)?;
        here.monitor().forget_events();
        Ok(())
    }

    /// Begins a hop, and says where to.
    pub(super) fn leave(&self, here: &mut Party, there: &mut Party, scratch: &Path, n: usize) -> Result<String> {
        let uri = match self.link {
            Link::Unix => {
                let uri = format!("unix:{}", scratch.join(format!("link{n}")).display());
                there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
                uri
            }
            Link::Tcp => {
                there.monitor().execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
                let waiting = there.monitor().migration()?;
                let port = waiting["socket-address"][0]["port"].as_str().context("the destination names no port")?;
                format!("tcp:127.0.0.1:{port}")
            }
            Link::Exec | Link::Descriptor | Link::File => return self.leave_without_caller(here, there, scratch, n),
        };
        here.monitor().execute("migrate", json!({ "uri": uri }))?;
        Ok(uri)
    }

    /// As [`leave`](Self::leave), where no end calls the other.
    fn leave_without_caller(&self, here: &mut Party, there: &mut Party, scratch: &Path, n: usize) -> Result<String> {
        let path = scratch.join(format!("link{n}"));
        let _ = std::fs::remove_file(&path);
        let (from, to) = match self.link {
            Link::Exec => {
                let made = Command::new("mkfifo").arg(&path).status().context("mkfifo")?;
                ensure!(made.success(), "mkfifo {} failed", path.display());
                (format!("exec:cat {}", path.display()), format!("exec:cat > {}", path.display()))
            }
            Link::Descriptor => {
                let (a, b) = UnixStream::pair()?;
                here.monitor().name_descriptor("away", &a)?;
                there.monitor().name_descriptor("back", &b)?;
                ("fd:back".into(), "fd:away".into())
            }
            _ => (there.reads_file(&path), here.writes_file(&path)),
        };
        if self.link != Link::File {
            there.monitor().execute("migrate-incoming", json!({ "uri": from }))?;
        }
        here.monitor().execute("migrate", json!({ "uri": to }))?;
        if self.link == Link::File {
            here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
            exec::finish(&path)?;
            there.monitor().execute("migrate-incoming", json!({ "uri": from }))?;
        }
        Ok(to)
    }

    /// How the guest goes before its memory on a hop, if it does.
    fn departure(&self, n: usize) -> Option<Departure> {
        self.postcopy.filter(|departure| departure.is_of(n))
    }

    pub(super) fn hop(
        &self,
        here: &mut Party,
        there: &mut Party,
        scratch: &Path,
        n: usize,
        tell: &mut dyn FnMut(Moment),
    ) -> Result<Hop> {
        self.tls.map_or(Ok(()), |tls| tls.arm(here, there, scratch))?;
        self.prepare(here, there)?;
        let held = release::resident(here)?;
        let uri = self.leave(here, there, scratch, n)?;
        tell(Moment::Leaving { from: here.stop(), to: there.stop(), uri });
        if let Some(departure) = self.departure(n) {
            departure.start(here)?;
        }
        let mut rounds = 0;
        let done = here.monitor().wait_migration(PATIENCE, |migration| {
            let count = migration["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            if count > rounds {
                rounds = count;
                tell(Moment::Round(migration.clone()));
            }
            migration["status"] == "completed"
        });
        // What the destination says about a failure is worth more than the source's broken pipe.
        let done = match done {
            Err(error) => return Err(there.monitor().last_words().map_or(error, |said| anyhow::anyhow!(said))),
            Ok(done) => done,
        };
        let hop = self.arrived(here, there, n, &done)?;
        self.departure(n).map_or(Ok(()), |_| release::judge(&self.capabilities, held, here))?;
        Ok(hop)
    }

    /// What a hop took, whose source says that it has completed.
    pub(super) fn arrived(&self, here: &mut Party, there: &mut Party, n: usize, done: &Value) -> Result<Hop> {
        self.departure(n).map_or(Ok(()), |departure| departure.judge(done, self.stops[n - 1]))?;
        if self.capabilities.contains(&"postcopy-blocktime") {
            let told = there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
            postcopy::judge_block_times(&told, self.load.cpus)?;
        }
        let stopped = here.monitor().wait_event("STOP", PATIENCE)?.time.context("STOP has no timestamp")?;
        let resumed = there.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
        for (party, expected) in [(here, "postmigrate"), (there, "running")] {
            // A QEMU says that its migration has completed a moment before it leaves the status finish-migrate.
            party.wait_status(expected)?;
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
    pub(crate) fn settle(&self, party: &mut Party) -> Result<Progress> {
        let arrived = party.wait_progress("print anything", PATIENCE, |_| true)?;
        // The pass and the round under way may have begun before the migration.
        let (pass, rounds) = (arrived.pass + 2, arrived.rounds + self.load.busy() + 1);
        let settled = party.wait_progress("complete its passes", PATIENCE, |p| p.pass >= pass && p.rounds >= rounds)?;
        ensure!(settled.stale == 0, "the guest found {} stale pages", settled.stale);
        ensure!(settled.tsc_back == 0, "the guest's clock ran backwards {} times", settled.tsc_back);
        self.wait_for_gear(party)?;
        Ok(settled)
    }

    /// Waits until every device has worked here.
    fn wait_for_gear(&self, party: &mut Party) -> Result<()> {
        if self.load.pcie {
            party.wait_text("check its PCI bus", PATIENCE, |text| bus_checks(text).then_some(()))?;
        }
        party.wait_text("use all its devices", PATIENCE, |text| gear::works(&self.load.gear, text).then_some(()))
    }
}

/// Whether the guest has looked at the registers of its PCI bus in more than one pass here. What it did not find is a stale page.
fn bus_checks(text: &str) -> bool {
    let checks = |line: &str| line.strip_prefix("qevm-payload pci checks=")?.parse::<u64>().ok();
    let mut numbers = text.lines().filter_map(checks);
    numbers.next().zip(numbers.next_back()).is_some_and(|(first, last)| last > first)
}

/// What a transcript and the hops amount to.
pub(super) fn account(hops: Vec<Hop>, transcript: &Transcript) -> Account {
    let last = transcript.last;
    Account { hops, pages: last.written + last.checked, passes: last.pass, cut_lines: transcript.cut, cuts: 0 }
}
