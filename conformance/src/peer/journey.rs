//! A guest's way over several monitors.

use super::departure::{self, Departure};
use super::differences;
use super::endpoint::{Endpoint, POLL, cpr_channel, cpr_socket};
use super::env::{Account, Env, Hop, Link, Load, Moment, Stop, account};
use super::resident;
use super::secured::Secured;
use super::virtio_load::{self, FrameCounter};
use crate::exec;
use crate::patience::PATIENCE;
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::{Progress, Transcript};
use serde_json::{Map, Value, json};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

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

impl Journey {
    /// Boots the guest and takes it all the way. `tell` hears of what happens.
    ///
    /// # Errors
    /// A migration fails, the guest does not go on, or what it printed shows that it did not arrive whole.
    pub fn play(&self, env: &Env<'_>, mut tell: impl FnMut(Moment)) -> Result<Account> {
        let (mut texts, mut hops) = (Vec::new(), Vec::new());
        let frames = FrameCounter::listen(&self.load.virtio, env.scratch)?;
        let mut here = self.boot(env, &mut tell)?;
        for n in 1..self.stops.len() {
            let mut there = match self.link {
                Link::Memory => self.start_successor(env, n, &mut here)?,
                _ => self.start(env, n, true)?,
            };
            let context = || format!("hop {n}, {} to {}", self.stops[n - 1], self.stops[n]);
            let hop = self.hop(&mut here, &mut there, env.scratch, n, &mut tell).with_context(context)?;
            tell(Moment::Arrived(hop.clone()));
            tell(Moment::Settled(self.settle(&mut there).with_context(context)?));
            hops.push(hop);
            texts.push(std::mem::replace(&mut here, there).end()?);
        }
        texts.push(here.end()?);
        virtio_load::judge(&self.load.virtio, &texts, env.scratch, &frames)?;
        Ok(account(hops, &Transcript::read(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>())?))
    }

    /// Starts the monitor of a stop.
    pub(crate) fn start(&self, env: &Env<'_>, n: usize, incoming: bool) -> Result<Endpoint> {
        let stop = self.stops[n];
        let root = match stop {
            Stop::Qemu(suite, _) => Some(env.roots.get(&suite).with_context(|| format!("no QEMU of {suite}"))?),
            Stop::Reference => None,
        };
        let rtc = self.stops.iter().any(|stop| matches!(stop, Stop::Qemu(_, Accel::Tcg)));
        Endpoint::start(stop, root, env, &self.load, &format!("stop{n}"), incoming, rtc)
    }

    /// Starts the monitor of a stop, which is passed the guest's memory and then answers, and begins the hop: the
    /// source waits until the destination gets `migrate-incoming`.
    fn start_successor(&self, env: &Env<'_>, n: usize, here: &mut Endpoint) -> Result<Endpoint> {
        let (name, main) = (format!("stop{n}"), link(env.scratch, n));
        let socket = cpr_socket(env.scratch, &name);
        let _ = std::fs::remove_file(&socket);
        here.meets(self.stops[n])?;
        here.monitor().set_capabilities(&self.capabilities)?;
        let parameters = json!({ "mode": "cpr-transfer", "max-bandwidth": self.load.max_bandwidth });
        here.monitor().set_parameters(&parameters)?;
        here.monitor().set_parameters(&Value::Object(self.parameters.clone()))?;
        here.monitor().forget_events();
        let main = json!({ "transport": "socket", "type": "unix", "path": main });
        let channels = [json!({ "channel-type": "main", "addr": main }), cpr_channel(env.scratch, &name)];
        thread::scope(|scope| {
            let starting = scope.spawn(|| self.start(env, n, true));
            let deadline = Instant::now() + PATIENCE;
            while !socket.exists() && !starting.is_finished() && Instant::now() < deadline {
                thread::sleep(POLL);
            }
            // The file is there a moment before its process listens.
            let mut begin = || here.monitor().execute("migrate", json!({ "channels": channels }));
            let mut begun = begin();
            while begun.is_err() && !starting.is_finished() && Instant::now() < deadline {
                thread::sleep(POLL);
                begun = begin();
            }
            let mut there = starting.join().map_err(|_| anyhow::anyhow!("the starting thread has died"))??;
            begun?;
            there.meets(self.stops[n - 1])?;
            there.monitor().set_capabilities(&self.capabilities)?;
            there.monitor().set_parameters(&Value::Object(self.parameters.clone()))?;
            Ok(there)
        })
    }

    /// Boots the guest at the first stop.
    pub(crate) fn boot(&self, env: &Env<'_>, tell: &mut dyn FnMut(Moment)) -> Result<Endpoint> {
        let mut here = self.start(env, 0, false)?;
        let rounds = self.load.busy();
        let booted = here.wait_progress("complete a pass", PATIENCE, |p| p.pass >= 1 && p.rounds >= rounds)?;
        self.wait_for_virtio(&mut here)?;
        tell(Moment::Booted(booted));
        Ok(here)
    }

    /// Tells both ends what they have to know before `migrate-incoming`.
    pub(crate) fn prepare(&self, here: &mut Endpoint, there: &mut Endpoint) -> Result<()> {
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        for (endpoint, reads) in [(&mut *here, false), (&mut *there, true)] {
            // Into a file nothing goes by postcopy: it is how a destination reads one.
            let both = reads || self.link != Link::File;
            let on = self.capabilities.iter().copied().filter(|name| both || *name != "postcopy-ram");
            endpoint.monitor().set_capabilities(&on.collect::<Vec<_>>())?;
            endpoint.monitor().set_parameters(&Value::Object(self.parameters.clone()))?;
        }
        let limits = json!({ "max-bandwidth": self.load.max_bandwidth, "downtime-limit": self.load.downtime_limit });
        here.monitor().set_parameters(&limits)?;
        here.monitor().forget_events();
        Ok(())
    }

    /// Begins a hop, and says where to.
    pub(super) fn leave(&self, here: &mut Endpoint, there: &mut Endpoint, scratch: &Path, n: usize) -> Result<String> {
        let uri = match self.link {
            Link::Memory => {
                let uri = format!("unix:{}", link(scratch, n).display());
                there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
                // The source has begun, and waits for that.
                return Ok(uri);
            }
            Link::Unix => {
                let uri = format!("unix:{}", link(scratch, n).display());
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
    fn leave_without_caller(
        &self,
        here: &mut Endpoint,
        there: &mut Endpoint,
        scratch: &Path,
        n: usize,
    ) -> Result<String> {
        let path = link(scratch, n);
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

    /// On this hop, pages have to go as differences to what was sent of them.
    fn sends_differences(&self, n: usize) -> bool {
        self.capabilities.contains(&"xbzrle") && self.departure(n).is_none()
    }

    pub(super) fn hop(
        &self,
        here: &mut Endpoint,
        there: &mut Endpoint,
        scratch: &Path,
        n: usize,
        tell: &mut dyn FnMut(Moment),
    ) -> Result<Hop> {
        self.tls.map_or(Ok(()), |tls| tls.arm(here, there, scratch))?;
        if self.link != Link::Memory {
            self.prepare(here, there)?;
        }
        let held = resident::resident(here)?;
        let uri = self.leave(here, there, scratch, n)?;
        tell(Moment::Leaving { from: here.stop(), to: there.stop(), uri });
        if let Some(departure) = self.departure(n) {
            departure.start(here)?;
        }
        if self.sends_differences(n) {
            differences::let_complete(here)?;
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
        self.departure(n).map_or(Ok(()), |_| resident::judge(&self.capabilities, held, here))?;
        Ok(hop)
    }

    /// What a hop took, whose source says that it has completed.
    pub(super) fn arrived(&self, here: &mut Endpoint, there: &mut Endpoint, n: usize, done: &Value) -> Result<Hop> {
        self.departure(n).map_or(Ok(()), |departure| departure.judge(done, self.stops[n - 1]))?;
        if self.capabilities.contains(&"postcopy-blocktime") {
            let told = there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
            departure::judge_block_times(&told, self.load.cpus)?;
        }
        if self.capabilities.contains(&"zero-copy-send") {
            let missed = done["ram"]["dirty-sync-missed-zero-copy"].as_u64();
            ensure!(missed > Some(0), "the source does not tell that its pages were copied: {done}");
        }
        if self.link == Link::Memory {
            let ram = ["total", "normal", "duplicate"].map(|name| done["ram"][name].as_u64());
            let bytes = done["ram"]["transferred"].as_u64();
            ensure!(
                ram == [Some(0); 3] && bytes < Some(1 << 20),
                "the source has sent memory that it had passed: {done}"
            );
        }
        if self.capabilities.contains(&"x-ignore-shared") {
            // Firmware and tables are what is left.
            let left_out = done["ram"]["total"].as_u64().is_some_and(|total| total < 8 << 20);
            ensure!(left_out, "the source has sent what is shared: {done}");
        }
        if self.sends_differences(n) {
            differences::judge(done)?;
        }
        let stopped = here.monitor().wait_event("STOP", PATIENCE)?.time.context("STOP has no timestamp")?;
        let resumed = there.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
        for (endpoint, expected) in [(here, "postmigrate"), (there, "running")] {
            // A QEMU says that its migration has completed a moment before it leaves the status finish-migrate.
            endpoint.wait_status(expected)?;
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
    pub(crate) fn settle(&self, endpoint: &mut Endpoint) -> Result<Progress> {
        let arrived = endpoint.wait_progress("print anything", PATIENCE, |_| true)?;
        // The pass and the round under way may have begun before the migration.
        let (pass, rounds) = (arrived.pass + 2, arrived.rounds + self.load.busy() + 1);
        let settled =
            endpoint.wait_progress("complete its passes", PATIENCE, |p| p.pass >= pass && p.rounds >= rounds)?;
        ensure!(settled.stale == 0, "the guest found {} stale pages", settled.stale);
        ensure!(settled.tsc_back == 0, "the guest's clock ran backwards {} times", settled.tsc_back);
        self.wait_for_virtio(endpoint)?;
        Ok(settled)
    }

    /// Waits until every device has worked here.
    fn wait_for_virtio(&self, endpoint: &mut Endpoint) -> Result<()> {
        if self.load.pcie {
            endpoint.wait_text("check its PCI bus", PATIENCE, |text| bus_checks(text).then_some(()))?;
        }
        endpoint.wait_text("use all its devices", PATIENCE, |text| {
            virtio_load::works(&self.load.virtio, text).then_some(())
        })
    }
}

/// The socket or file of a hop.
fn link(scratch: &Path, n: usize) -> PathBuf {
    scratch.join(format!("link{n}"))
}

/// Whether the guest has looked at the registers of its PCI bus in more than one pass here. What it did not find is a
/// stale page.
fn bus_checks(text: &str) -> bool {
    let checks = |line: &str| line.strip_prefix("qevm-payload pci checks=")?.parse::<u64>().ok();
    let mut numbers = text.lines().filter_map(checks);
    numbers.next().zip(numbers.next_back()).is_some_and(|(first, last)| last > first)
}
