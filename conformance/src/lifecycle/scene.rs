//! A running guest, a destination that waits for it, and a link between two network namespaces.

use super::sides::{Expected, Side};
use crate::network::{Network, PORT};
use crate::peer::{Endpoint, Env, Journey, Link, Load, Monitor, Stop, VirtioLoad};
use crate::process::run;
use crate::roots::{Root, Suite};
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::Progress;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How long a single step may take; nothing is judged by how long it took.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
/// A guest that runs prints twenty times a second; this is how long it is listened to.
const LISTEN: Duration = Duration::from_millis(600);
/// Bytes per second that a migration may take before it is meant to end: less than the guest writes.
const SLOW: u64 = 16 << 20;
/// And afterwards.
const FAST: u64 = 1 << 30;

/// Where the rows are played.
pub(super) struct Ground {
    pub(super) network: Network,
    /// QEMU, as seen from the namespace of the source and from that of the destination.
    pub(super) roots: [BTreeMap<Suite, Root>; 2],
    /// reference-vmm, likewise.
    pub(super) programs: [Monitor; 2],
}

/// Who takes part.
pub(super) struct Cast {
    /// Source and destination.
    pub(super) stops: [Stop; 2],
    /// On at both ends.
    pub(super) capabilities: Vec<&'static str>,
    /// What the guest does.
    pub(super) payload: String,
    pub(super) virtio: Vec<VirtioLoad>,
}

/// One row under way.
pub(super) struct Scene<'g> {
    pub(super) ground: &'g Ground,
    pub(super) journey: Journey,
    pub(super) scratch: &'g Path,
    pub(super) here: Endpoint,
    pub(super) there: Endpoint,
    /// What the guest had printed here when it was last listened to.
    moments: Vec<String>,
    /// How long both ends took to decide, where that is what the row is about.
    pub(super) decided: Option<String>,
}

impl<'g> Scene<'g> {
    /// Boots the guest in a monitor of the first kind, and lets one of the second kind wait for it.
    pub(super) fn set(ground: &'g Ground, cast: Cast, scratch: &'g Path) -> Result<Scene<'g>> {
        let Cast { stops, capabilities, payload, virtio } = cast;
        let load = Load { payload, virtio, max_bandwidth: SLOW, downtime_limit: 1, ..Load::default() };
        let journey = Journey {
            name: String::new(),
            stops: stops.into(),
            link: Link::Tcp,
            capabilities,
            parameters: Map::new(),
            postcopy: None,
            tls: None,
            load,
            quick: false,
        };
        let here = journey.boot(&env(ground, scratch, 0), &mut |_| ())?;
        let there = journey.start(&env(ground, scratch, 1), 1, true)?;
        let mut scene = Scene { ground, journey, scratch, here, there, moments: Vec::new(), decided: None };
        scene.journey.prepare(&mut scene.here, &mut scene.there)?;
        Ok(scene)
    }

    /// A further source with a guest of its own.
    pub(super) fn another_source(&mut self, n: usize) -> Result<()> {
        let scratch = self.scratch.join(format!("source{n}"));
        std::fs::create_dir_all(&scratch)?;
        self.here = self.journey.boot(&env(self.ground, &scratch, 0), &mut |_| ())?;
        self.journey.prepare(&mut self.here, &mut self.there)
    }

    /// A further source, whose guest has only just been started.
    pub(super) fn source_that_boots(&mut self) -> Result<()> {
        let scratch = self.scratch.join("source1");
        std::fs::create_dir_all(&scratch)?;
        self.here = self.journey.start(&env(self.ground, &scratch, 0), 0, false)?;
        self.journey.prepare(&mut self.here, &mut self.there)
    }

    /// A second client of the source's QMP, if the source is one of ours.
    pub(super) fn call_qmp(&self) -> Result<UnixStream> {
        let socket = self.scratch.join("stop0.qmp");
        UnixStream::connect(&socket).with_context(|| socket.display().to_string())
    }

    /// A further destination.
    pub(super) fn another_destination(&mut self, n: usize) -> Result<()> {
        let scratch = self.scratch.join(format!("destination{n}"));
        std::fs::create_dir_all(&scratch)?;
        self.there = self.journey.start(&env(self.ground, &scratch, 1), 1, true)?;
        self.journey.prepare(&mut self.here, &mut self.there)
    }

    /// The address that the destination listens at.
    pub(super) fn uri(&self) -> String {
        format!("tcp:{}:{PORT}", self.ground.network.address())
    }

    /// `migrate-incoming` at the destination.
    pub(super) fn wait_for_guest(&mut self, more: Value) -> Result<()> {
        let mut arguments = json!({ "uri": self.uri() });
        if let (Some(all), Some(more)) = (arguments.as_object_mut(), more.as_object()) {
            all.extend(more.clone());
        }
        self.there.monitor().execute("migrate-incoming", arguments).map(drop)
    }

    /// `migrate` at the source.
    pub(super) fn leave(&mut self) -> Result<()> {
        let uri = self.uri();
        self.here.monitor().execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Both, and waits until pages flow.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.wait_for_guest(Value::Null)?;
        self.leave()?;
        self.until("active")
    }

    /// Waits for a status of the source's migration.
    pub(super) fn until(&mut self, status: &str) -> Result<()> {
        self.note(format!("until {status}"));
        self.here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == status).map(drop)
    }

    /// Waits for a status with which the source's migration has ended.
    pub(super) fn until_ended(&mut self, status: &str) -> Result<()> {
        self.note(format!("until {status}"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let migration = self.here.monitor().migration()?;
            if migration["status"] == status {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "not {status}: {migration}");
            thread::sleep(POLL);
        }
    }

    /// Lets the migration come to its end.
    pub(super) fn let_go(&mut self) -> Result<()> {
        let limits = json!({ "max-bandwidth": FAST, "downtime-limit": 1000 });
        self.here.monitor().set_parameters(&limits)
    }

    /// Lets it come to its end and waits for that.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.let_go()?;
        self.until("completed")
    }

    /// Brings the source to the point at which it has sent everything and waits for the verdict of a destination that
    /// is stopped (SIGSTOP).
    pub(super) fn all_is_sent_to_a_stopped_destination(&mut self) -> Result<()> {
        self.begin()?;
        self.let_go()?;
        self.until("pre-switchover")?;
        signal(self.there.monitor().pid(), "STOP")?;
        self.here.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        self.until("device")?;
        self.until_silent()
    }

    /// Waits until the source sends no more.
    pub(super) fn until_silent(&mut self) -> Result<()> {
        let (mut sent, deadline) = (0, Instant::now() + PATIENCE);
        loop {
            thread::sleep(LISTEN);
            match self.ground.network.sent()? {
                now if now == sent => return Ok(()),
                _ if Instant::now() > deadline => bail!("the source goes on sending in 'device'"),
                now => sent = now,
            }
        }
    }

    /// Remembers what was done, for errors.
    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.moments.push(what.into());
    }

    pub(super) fn describe(&self) -> String {
        format!("after {}", self.moments.join(", "))
    }

    /// Waits until it is as expected and stays so, and gives both ends as they are then.
    pub(super) fn settle(&mut self, expected: &Expected) -> Result<[Side; 2]> {
        let deadline = Instant::now() + PATIENCE;
        let mut held = 0;
        loop {
            let sides = self.look()?;
            match expected.differs(&sides) {
                None if held == 1 => {
                    let endpoint = [&self.here, &self.there][usize::from(sides[1].runs)];
                    let last = endpoint.progress()?;
                    ensure!(last.is_none_or(|last: Progress| last.stale == 0), "stale pages: {last:?}");
                    return Ok(sides);
                }
                None => held += 1,
                Some(why) if Instant::now() > deadline => {
                    bail!("{why}; source: {}; destination: {}", sides[0], sides[1])
                }
                Some(_) => held = 0,
            }
            thread::sleep(POLL);
        }
    }

    fn look(&mut self) -> Result<[Side; 2]> {
        let printed =
            |scene: &Scene<'_>| -> Result<[usize; 2]> { Ok([scene.here.text()?.len(), scene.there.text()?.len()]) };
        let before = printed(self)?;
        thread::sleep(LISTEN);
        let after = printed(self)?;
        let runs = [after[0] > before[0], after[1] > before[1]];
        Ok([side(&mut self.here, runs[0])?, side(&mut self.there, runs[1])?])
    }
}

fn env<'g>(ground: &'g Ground, scratch: &'g Path, end: usize) -> Env<'g> {
    Env { roots: &ground.roots[end], program: &ground.programs[end], scratch, more: &[] }
}

fn side(endpoint: &mut Endpoint, runs: bool) -> Result<Side> {
    let gone =
        |said| Side { ended: Some(said), status: String::new(), runs, migration: String::new(), says: String::new() };
    let asked = (|| {
        let status = endpoint.monitor().execute("query-status", Value::Null)?;
        Ok::<_, anyhow::Error>((status, endpoint.monitor().migration()?))
    })();
    let (status, migration) = match asked {
        Ok(asked) => asked,
        Err(error) => return endpoint.monitor().last_words().map(gone).context(error),
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    Ok(Side {
        ended: None,
        status: text(&status["status"]),
        runs,
        migration: text(&migration["status"]),
        says: text(&migration["error-desc"]),
    })
}

/// Sends a signal to a monitor.
pub(super) fn signal(pid: u32, name: &str) -> Result<()> {
    run(Command::new("kill").args(["-s", name, &pid.to_string()]), PATIENCE).map(drop)
}

/// Kills a monitor, which is gone when this returns.
pub(super) fn kill(endpoint: &mut Endpoint) -> Result<()> {
    signal(endpoint.monitor().pid(), "KILL")?;
    ensure!(endpoint.monitor().has_ended()?, "it survives SIGKILL");
    Ok(())
}
