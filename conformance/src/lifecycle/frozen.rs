//! A peer or a link that is frozen, not closed: it brings nothing, takes nothing and says nothing about it.
//!
//! A side that is one of ours and not frozen itself decides by its deadline, which is set to two seconds here. A QEMU
//! waits until the operator cancels, or until what was frozen goes on.

use super::scene::{PATIENCE, Scene, signal};
use crate::network::{Connection, Cut};
use crate::peer::{Endpoint, Stop};
use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

/// What the deadlines are set to, ms.
const DEADLINE_MS: u64 = 2000;
/// Bytes per second in postcopy: what is left does not fit in the buffers of the link before both sides have decided.
const SLOWLY: u64 = 128 << 10;
/// What a channel has carried when pages flow, bytes.
const SOME_PAGES: u64 = 64 << 10;
/// How long a QEMU is looked at, which does not decide.
const LOOK: Duration = Duration::from_secs(4);
const POLL: Duration = Duration::from_millis(20);

/// When it freezes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before the source calls.
    Setup,
    /// Pages flow, and the guest runs.
    Active,
    /// The guest is paused, and the rest is on its way.
    Device,
    /// The guest is at the destination, and some of its memory is not.
    Postcopy,
}

/// What freezes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The source's process (SIGSTOP).
    Source,
    /// The destination's.
    Destination,
    /// The link: all packets are lost.
    Link,
    /// Only what belongs to the page channel that has carried most.
    PageChannel,
    /// Only what belongs to the main channel beside page channels.
    MainChannel,
}

/// Both ends, as far as they have decided by themselves.
type Decided = [Option<Duration>; 2];

impl Victim {
    /// The ends that can decide while it is frozen.
    fn leaves(self) -> [bool; 2] {
        [self != Victim::Source, self != Victim::Destination]
    }
}

/// Capabilities at both ends.
pub(super) fn capabilities(phase: Phase, victim: Victim) -> &'static [&'static str] {
    match (phase, victim) {
        (_, Victim::PageChannel | Victim::MainChannel) => &["return-path", "multifd"],
        (Phase::Device, _) => &["return-path", "pause-before-switchover"],
        (Phase::Postcopy, _) => &["return-path", "postcopy-ram"],
        _ => &["return-path"],
    }
}

/// Freezes it, waits until the others have decided, and lets it go on.
pub(super) fn happen(phase: Phase, victim: Victim, scene: &mut Scene<'_>) -> Result<()> {
    arm(scene)?;
    reach(phase, victim, scene)?;
    let start = Instant::now();
    freeze(phase, victim, scene)?;
    let decided = wait(phase, victim, scene, start);
    // Whatever came of it, no process stays frozen.
    thaw(victim, scene)?;
    scene.decided = Some(describe(victim, scene, decided?));
    match phase {
        Phase::Postcopy => recover(scene),
        _ => Ok(()),
    }
}

/// Gives those of ours short deadlines.
fn arm(scene: &mut Scene<'_>) -> Result<()> {
    let mut deadlines = serde_json::Map::new();
    for name in ["x-connect-timeout", "x-idle-timeout", "x-switchover-timeout", "x-handover-timeout"] {
        deadlines.insert(name.into(), DEADLINE_MS.into());
    }
    // Not the system's, which may come first.
    deadlines.insert("x-tcp-user-timeout".into(), 60_000.into());
    for endpoint in [&mut scene.here, &mut scene.there] {
        if endpoint.stop() == Stop::Reference {
            endpoint.monitor().set_parameters(&Value::Object(deadlines.clone()))?;
        }
    }
    Ok(())
}

fn reach(phase: Phase, victim: Victim, scene: &mut Scene<'_>) -> Result<()> {
    match phase {
        Phase::Setup => scene.wait_for_guest(Value::Null),
        Phase::Active => {
            // It must not be over before something is frozen, however little a guest on a busy machine writes.
            let slowly = json!({ "max-bandwidth": 16 * SLOWLY, "downtime-limit": 1 });
            scene.here.monitor().set_parameters(&slowly)?;
            scene.begin()
        }
        Phase::Device => {
            scene.begin()?;
            scene.let_go()?;
            scene.until("pre-switchover")?;
            if victim == Victim::Source {
                // It has to get as far, and no further.
                signal(scene.there.monitor().pid(), "STOP")?;
                go_on(scene)?;
                scene.until_silent()?;
            }
            Ok(())
        }
        Phase::Postcopy => {
            // However late the guest is let go, most of its memory is still here then.
            let slowly = json!({ "max-bandwidth": 8 * SLOWLY, "max-postcopy-bandwidth": SLOWLY });
            scene.here.monitor().set_parameters(&slowly)?;
            scene.begin()?;
            scene.here.monitor().execute("migrate-start-postcopy", Value::Null)?;
            scene.until("postcopy-active")
        }
    }
}

fn go_on(scene: &mut Scene<'_>) -> Result<()> {
    scene.here.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    scene.until("device")
}

fn freeze(phase: Phase, victim: Victim, scene: &mut Scene<'_>) -> Result<()> {
    match victim {
        Victim::Source => {
            signal(scene.here.monitor().pid(), "STOP")?;
            if phase == Phase::Device {
                signal(scene.there.monitor().pid(), "CONT")?;
            }
        }
        Victim::Destination => signal(scene.there.monitor().pid(), "STOP")?,
        Victim::Link => scene.ground.network.cut(Cut::Now)?,
        Victim::PageChannel | Victim::MainChannel => {
            let port = channel(victim, scene)?;
            scene.ground.network.cut(Cut::Connection(port))?;
        }
    }
    match (phase, victim) {
        (Phase::Setup, _) => scene.leave(),
        (Phase::Device, Victim::Destination | Victim::Link) => go_on(scene),
        _ => Ok(()),
    }
}

/// The port of the main channel, which alone is answered, or of the page channel that has carried most; as soon as
/// pages flow.
fn channel(victim: Victim, scene: &Scene<'_>) -> Result<u16> {
    let start = Instant::now();
    loop {
        let connections = scene.ground.network.connections()?;
        let (answered, pages): (Vec<&Connection>, _) = connections.iter().partition(|channel| channel.received > 0);
        let carried_most = pages.iter().max_by_key(|channel| channel.sent);
        match (answered.as_slice(), carried_most) {
            ([main], Some(busiest)) if busiest.sent >= SOME_PAGES => {
                return Ok(if victim == Victim::MainChannel { main.port } else { busiest.port });
            }
            _ => ensure!(start.elapsed() < PATIENCE, "cannot tell the channels apart: {connections:?}"),
        }
        thread::sleep(POLL);
    }
}

fn thaw(victim: Victim, scene: &mut Scene<'_>) -> Result<()> {
    match victim {
        Victim::Source => signal(scene.here.monitor().pid(), "CONT"),
        Victim::Destination => signal(scene.there.monitor().pid(), "CONT"),
        _ => scene.ground.network.mend(),
    }
}

/// Waits until those of ours that are not frozen have decided; a QEMU does not, and is cancelled if it is the source.
fn wait(phase: Phase, victim: Victim, scene: &mut Scene<'_>, start: Instant) -> Result<Decided> {
    let mut decided = [None; 2];
    let decides = |end: usize, scene: &Scene<'_>| {
        let ours = [&scene.here, &scene.there][end].stop() == Stop::Reference;
        // A destination without a connection goes on waiting for one.
        ours && victim.leaves()[end] && (phase, end) != (Phase::Setup, 1)
    };
    let waits_for = [decides(0, scene), decides(1, scene)];
    while (0..2).any(|end| waits_for[end] && decided[end].is_none()) {
        for end in 0..2 {
            let endpoint = if end == 0 { &mut scene.here } else { &mut scene.there };
            if waits_for[end] && decided[end].is_none() && has_decided(endpoint)? {
                decided[end] = Some(start.elapsed());
            }
        }
        ensure!(start.elapsed() < PATIENCE, "not decided after {PATIENCE:?}: {decided:?}");
        thread::sleep(POLL);
    }
    if victim.leaves()[0] && scene.here.stop() != Stop::Reference {
        thread::sleep(LOOK.saturating_sub(start.elapsed()));
        let migration = scene.here.monitor().migration()?;
        let waits = ["active", "device", "postcopy-active"].contains(&migration["status"].as_str().unwrap_or_default());
        // Unless ours has closed the connection, and the link has said so.
        ensure!(waits || decided[1].is_some(), "the QEMU has decided: {migration}");
        if waits && phase != Phase::Postcopy {
            scene.here.monitor().execute("migrate_cancel", Value::Null)?;
        }
    }
    Ok(decided)
}

/// Whether a monitor waits no more for the other.
fn has_decided(endpoint: &mut Endpoint) -> Result<bool> {
    match endpoint.monitor().migration() {
        Ok(migration) => {
            Ok(["failed", "postcopy-paused", "completed"].iter().any(|status| migration["status"] == *status))
        }
        Err(error) => match endpoint.monitor().last_words() {
            Some(_) => Ok(true),
            None => bail!(error),
        },
    }
}

fn describe(victim: Victim, scene: &Scene<'_>, decided: Decided) -> String {
    let end = |end: usize| match (decided[end], victim.leaves()[end], [&scene.here, &scene.there][end].stop()) {
        (Some(time), ..) => format!("after {:.1} s", time.as_secs_f64()),
        (None, false, _) => "frozen".into(),
        (None, true, Stop::Reference) => "not concerned".into(),
        (None, true, _) => "waits".into(),
    };
    format!("source {}, destination {}", end(0), end(1))
}

/// The guest is at the destination and both ends wait for another connection: lets it have the rest of its memory.
fn recover(scene: &mut Scene<'_>) -> Result<()> {
    for endpoint in [&mut scene.here, &mut scene.there] {
        let paused = |migration: &Value| migration["status"] == "postcopy-paused";
        endpoint.monitor().wait_migration(PATIENCE, paused)?;
    }
    let uri = scene.uri();
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = scene.there.monitor().execute("migrate-recover", json!({ "uri": uri })) {
        ensure!(Instant::now() < deadline, "{error}");
        thread::sleep(POLL);
    }
    scene.here.monitor().set_parameters(&json!({ "max-postcopy-bandwidth": 0 }))?;
    scene.here.monitor().execute("migrate", json!({ "uri": uri, "resume": true }))?;
    scene.until("completed")
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Setup => "setup",
            Phase::Active => "active",
            Phase::Device => "device",
            Phase::Postcopy => "postcopy",
        })
    }
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Victim::Source => "source",
            Victim::Destination => "destination",
            Victim::Link => "link",
            Victim::PageChannel => "page channel",
            Victim::MainChannel => "main channel",
        })
    }
}
