//! What operators, hosts and links do to a migration in its middle.

use super::scene::{PATIENCE, Scene, kill, signal};
use crate::network::Cut;
use crate::peer::{Endpoint, Stop};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::thread;
use std::time::Duration;

/// Longer than any link is silent of itself, and shorter than the deadlines.
const A_MINUTE: Duration = Duration::from_secs(60);
/// How long a migration is looked at that does not get anywhere.
const LOOK: Duration = Duration::from_secs(5);

/// What of a migration is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The source is not connected yet.
    Setup,
    /// Pages flow, and the guest runs.
    Active,
    /// The guest is paused and waits for `migrate-continue`.
    PreSwitchover,
    /// Everything was sent, and the destination has not looked at it yet.
    Device,
    /// The guest is at the destination, and some of its memory is not.
    Postcopy,
}

/// Capabilities at both ends.
pub(super) fn capabilities(at: At) -> &'static [&'static str] {
    match at {
        At::Setup | At::Active => &["return-path"],
        At::PreSwitchover | At::Device => &["return-path", "pause-before-switchover"],
        At::Postcopy => &["return-path", "postcopy-ram"],
    }
}

fn reach(at: At, scene: &mut Scene<'_>) -> Result<()> {
    match at {
        At::Device => return scene.all_is_sent_to_a_stopped_destination(),
        At::Setup => {
            scene.wait_for_guest(json!({ "exit-on-error": false }))?;
            scene.ground.network.cut(Cut::Now)?;
            scene.leave()?;
            return scene.until("setup");
        }
        At::Postcopy => scene.here.monitor().set_parameters(&json!({ "max-postcopy-bandwidth": 1 << 20 }))?,
        At::Active | At::PreSwitchover => {}
    }
    scene.wait_for_guest(json!({ "exit-on-error": false }))?;
    scene.leave()?;
    scene.until("active")?;
    match at {
        At::PreSwitchover => {
            scene.let_go()?;
            scene.until("pre-switchover")
        }
        At::Postcopy => {
            scene.here.monitor().execute("migrate-start-postcopy", Value::Null)?;
            scene.until("postcopy-active")
        }
        _ => Ok(()),
    }
}

/// Goes on to the end, from wherever it stops before.
fn complete(at: At, scene: &mut Scene<'_>) -> Result<()> {
    scene.let_go()?;
    if matches!(at, At::PreSwitchover | At::Device) {
        scene.until("pre-switchover")?;
        scene.here.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    }
    scene.until("completed")
}

/// The operator cancels, and the guest runs on; then it goes to the same destination, which has waited for another try,
/// or to another where that has all of the guest.
pub(super) fn cancel_and_go_again(at: At, scene: &mut Scene<'_>) -> Result<()> {
    reach(at, scene)?;
    scene.here.monitor().execute("migrate_cancel", Value::Null)?;
    if at == At::Setup && scene.here.stop() != Stop::Reference {
        // A QEMU does not give up before it is connected.
        scene.ground.network.mend()?;
    }
    scene.until_ended("cancelled")?;
    runs_on(scene)?;
    match at {
        // The connection that came and left was no source, or none has come: the destination still waits.
        At::Setup => scene.ground.network.mend()?,
        At::Device => {
            signal(scene.there.monitor().pid(), "CONT")?;
            scene.another_destination(1)?;
            scene.wait_for_guest(Value::Null)?;
        }
        _ => {
            scene.there.monitor().wait_migration_end(PATIENCE)?;
            if scene.there.stop() != Stop::Reference {
                // A QEMU waits once.
                scene.another_destination(1)?;
            }
            scene.wait_for_guest(json!({ "exit-on-error": false }))?;
        }
    }
    scene.leave()?;
    complete(at, scene)
}

/// The guest of the source runs.
fn runs_on(scene: &mut Scene<'_>) -> Result<()> {
    let status = scene.here.monitor().execute("query-status", Value::Null)?;
    ensure!(status["running"] == true, "the guest does not go on: {status}");
    Ok(())
}

/// Who has gone before their memory cannot be cancelled: they arrive.
pub(super) fn cancelled_in_postcopy(scene: &mut Scene<'_>) -> Result<()> {
    reach(At::Postcopy, scene)?;
    let refused = scene.here.monitor().execute("migrate_cancel", Value::Null);
    ensure!(refused.is_err(), "migrate_cancel was taken in postcopy");
    scene.here.monitor().set_parameters(&json!({ "max-postcopy-bandwidth": 0 }))?;
    scene.until("completed")
}

/// The destination is killed; then the guest goes to another one.
pub(super) fn killed_and_go_elsewhere(at: At, scene: &mut Scene<'_>) -> Result<()> {
    reach(at, scene)?;
    kill(&mut scene.there)?;
    match at {
        At::Setup => scene.ground.network.mend()?,
        // A QEMU does not look at the connection while it waits for the operator.
        At::PreSwitchover if scene.here.stop() != Stop::Reference => {
            scene.here.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        }
        _ => {}
    }
    scene.until_ended("failed")?;
    runs_on(scene)?;
    scene.another_destination(1)?;
    scene.wait_for_guest(Value::Null)?;
    scene.leave()?;
    complete(at, scene)
}

/// The destination, at which the guest runs, is killed with it.
pub(super) fn killed_in_postcopy(scene: &mut Scene<'_>) -> Result<()> {
    reach(At::Postcopy, scene)?;
    kill(&mut scene.there)?;
    scene.until_ended("postcopy-paused")
}

/// The source is killed: the guest is lost, and the destination does not run what it has of it.
pub(super) fn source_killed(at: At, scene: &mut Scene<'_>) -> Result<()> {
    reach(at, scene)?;
    kill(&mut scene.here)?;
    match at {
        // It was not called.
        At::Setup => Ok(()),
        At::Postcopy => {
            let paused = |migration: &Value| migration["status"] == "postcopy-paused";
            scene.there.monitor().wait_migration(PATIENCE, paused).map(drop)
        }
        _ => scene.there.monitor().wait_migration_end(PATIENCE),
    }
}

/// A guest that is paused arrives paused, and goes on when it is told to.
pub(super) fn paused_guest(scene: &mut Scene<'_>) -> Result<()> {
    scene.here.monitor().execute("stop", Value::Null)?;
    scene.begin()?;
    scene.complete()?;
    thread::sleep(Duration::from_secs(1));
    let status = scene.there.monitor().execute("query-status", Value::Null)?;
    ensure!(status["running"] == false, "a paused guest was started: {status}");
    scene.there.monitor().execute("cont", Value::Null).map(drop)
}

/// Both monitors are stopped, as by their hosts, and go on.
pub(super) fn both_stopped(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    let pids = [scene.here.monitor().pid(), scene.there.monitor().pid()];
    pids.iter().try_for_each(|pid| signal(*pid, "STOP"))?;
    thread::sleep(A_MINUTE);
    pids.iter().try_for_each(|pid| signal(*pid, "CONT"))?;
    scene.complete()
}

/// The link takes a KiB a second: nothing ends by itself, the guest runs on, and the operator's word counts at once.
pub(super) fn slow_link(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    scene.ground.network.slow(true)?;
    thread::sleep(LOOK);
    let migration = scene.here.monitor().migration()?;
    ensure!(migration["status"] == "active", "it has ended: {migration}");
    scene.here.monitor().execute("migrate_cancel", Value::Null)?;
    let cancelled = scene.until_ended("cancelled");
    scene.ground.network.slow(false)?;
    cancelled
}

/// Packets are lost in both directions; nothing of it shows but that it takes longer.
pub(super) fn lossy_link(scene: &mut Scene<'_>) -> Result<()> {
    scene.ground.network.cut(Cut::Some)?;
    scene.begin()?;
    scene.complete()?;
    scene.ground.network.mend()
}

/// A guest that is reset or switched off, that spins, that has not booted: `what` is done when it is on its way.
pub(super) fn guest_does(scene: &mut Scene<'_>, what: impl FnOnce(&mut Endpoint) -> Result<()>) -> Result<()> {
    scene.begin()?;
    what(&mut scene.here)
}

/// A guest that resets itself again and again, before and after it goes.
pub(super) fn guest_reboots(scene: &mut Scene<'_>) -> Result<()> {
    guest_does(scene, |here| here.monitor().wait_event("RESET", PATIENCE).map(drop))?;
    scene.complete()?;
    scene.there.monitor().wait_event("RESET", PATIENCE).map(drop)
}

/// A guest that leaves while its firmware runs.
pub(super) fn leaves_while_it_boots(scene: &mut Scene<'_>) -> Result<()> {
    scene.source_that_boots()?;
    scene.wait_for_guest(Value::Null)?;
    scene.leave()?;
    scene.let_go()?;
    scene.until("completed")
}

/// A device is added on the way, which is refused.
pub(super) fn hot_plug(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    let device = json!({ "driver": "virtio-rng-device", "id": "late" });
    let added = scene.here.monitor().execute("device_add", device);
    ensure!(added.is_err(), "a device was added to a guest that is on its way");
    scene.complete()
}

/// The only client of QMP goes on the way, and another takes its place, which has waited for that.
pub(super) fn another_client(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    let waiting = scene.call_qmp()?;
    scene.here.monitor().change_client(waiting).context("the second client")?;
    scene.complete()
}
