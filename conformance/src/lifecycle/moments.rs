//! What happens to a migration.

use super::frozen::{self, Phase, Victim};
use super::mishaps::{self, At};
use super::scene::{PATIENCE, Scene, kill, signal};
use super::{delay, hosts, strangers};
use crate::network::Cut;
use crate::peer::{Endpoint, VirtioLoad};
use crate::qmp::QmpError;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::thread;
use std::time::Duration;

/// Idle callers of the largest crowd.
const CROWD: usize = 5000;
/// Descriptors that a destination has left when callers use them up.
const SPARE_DESCRIPTORS: usize = 6;
/// The port of a destination that is none.
const FALSE_PORT: u16 = 4445;
/// QEMU's words.
const NO_SECOND: &str = "Can't migrate the vm that was paused due to previous migration";

/// Something that happens to a migration, or to the wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A connection that says nothing is there before the source.
    IdleStranger,
    /// Connections come and go before the source comes.
    PortScan,
    /// Connections begin with what no migration begins with, and stay.
    Garbage,
    /// Five thousand connections that say nothing.
    Crowd,
    /// Idle connections use all descriptors of the destination up, and then go.
    NoDescriptors,
    /// A second source calls while the first one is at work.
    SecondSource,
    /// The link dies with the packet that carries SHUT.
    LinkDiesAtShut,
    /// The same; then the operator cancels at the source.
    LinkDiesAtShutThenCancel,
    /// The link dies with the acknowledgement of SHUT.
    LinkDiesAfterShut,
    /// The source is killed when it has sent everything.
    SourceKilledInDevice,
    /// The operator cancels when the source has sent everything and the destination has not looked at it yet.
    CancelInDevice,
    /// `migrate` again, after the guest has left.
    SecondMigrate,
    /// The guest is reset while it migrates.
    ResetWhileActive,
    /// The guest is reset where it has arrived.
    ResetAfterArrival,
    /// SIGTERM to the source while it migrates.
    TerminateSource,
    /// SIGTERM to the destination while the guest migrates.
    TerminateDestination,
    /// A source dies; the destination, told not to end for that, takes the guest of another.
    ExitOnErrorOff,
    /// The peer takes everything and resets the connection.
    PeerResets,
    /// The link is silent for a while.
    Silence,
    /// The operator cancels, and the guest goes to the same destination again.
    CancelAndGoAgain(At),
    /// The destination is killed, and the guest goes to another.
    KilledAndGoElsewhere(At),
    /// The destination is killed when the guest runs there.
    KilledInPostcopy,
    /// The operator cancels when the guest runs at the destination.
    CancelInPostcopy,
    /// The source is killed.
    SourceKilled(At),
    /// The guest resets itself again and again.
    GuestReboots,
    /// The guest switches itself off.
    GuestShutsDown,
    /// The guest has no interrupts and nothing that leaves it for long.
    GuestSpins,
    /// The guest leaves while its firmware runs.
    Boots,
    /// A device is plugged in.
    HotPlug,
    /// The QMP client goes, and another takes its place.
    AnotherClient,
    /// One packet of fifty is lost.
    LossyLink,
    /// Every byte takes 300 ms.
    Delay,
    /// The destination gets no more memory.
    NoMemory,
    /// The guest goes to a file for which there is no room, and then to the destination.
    TargetFull,
    /// The guest goes to a file that cannot be made, and then to the destination.
    TargetReadOnly,
    /// Another process uses the disk at the destination.
    DiskInUse,
    /// The guest is paused before it goes.
    PausedGuest,
    /// Both monitors are stopped for a minute.
    BothStopped,
    /// The link takes a KiB a second.
    SlowLink,
    /// Something is frozen, in this phase.
    Frozen(Phase, Victim),
    /// All goes well; the order of events is looked at.
    Events,
}

impl Moment {
    /// Capabilities at both ends.
    pub(super) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Moment::LinkDiesAtShut | Moment::LinkDiesAtShutThenCancel | Moment::LinkDiesAfterShut => &["return-path"],
            Moment::SourceKilledInDevice | Moment::CancelInDevice => &["return-path", "pause-before-switchover"],
            Moment::Events => &["events", "return-path"],
            Moment::Frozen(phase, victim) => frozen::capabilities(phase, victim),
            Moment::CancelAndGoAgain(at) | Moment::KilledAndGoElsewhere(at) | Moment::SourceKilled(at) => {
                mishaps::capabilities(at)
            }
            Moment::KilledInPostcopy | Moment::CancelInPostcopy => mishaps::capabilities(At::Postcopy),
            Moment::NoMemory => &["return-path", "multifd"],
            Moment::Delay | Moment::DiskInUse => &["return-path"],
            _ => &[],
        }
    }

    /// What the guest does.
    pub(super) fn payload(self) -> String {
        let working_set = if self.fits_in_buffers() { "64K" } else { "4M" };
        let usual = format!("dirty={working_set} rate=48M hold=4M zero=2M verify=16384 report=20");
        match self {
            Moment::GuestReboots => format!("{usual} reset=700"),
            Moment::GuestShutsDown => format!("{usual} button=2"),
            // It prints more often than it is listened to.
            Moment::GuestSpins => "dirty=4M rate=0 timer=0 hold=4M zero=2M report=200".into(),
            _ => usual,
        }
    }

    /// Its devices.
    pub(super) fn virtio(self) -> Vec<VirtioLoad> {
        if self == Moment::DiskInUse { vec![VirtioLoad::Disk] } else { Vec::new() }
    }

    /// The last round has to fit into the socket buffers of a destination that does not read.
    fn fits_in_buffers(self) -> bool {
        match self {
            Moment::SourceKilledInDevice | Moment::CancelInDevice | Moment::Frozen(Phase::Device, _) => true,
            Moment::CancelAndGoAgain(at) | Moment::KilledAndGoElsewhere(at) | Moment::SourceKilled(at) => {
                at == At::Device
            }
            _ => false,
        }
    }

    /// Makes it happen.
    ///
    /// # Errors
    /// A monitor refuses what has to work, or does not get as far.
    pub(super) fn happen(self, scene: &mut Scene<'_>) -> Result<()> {
        match self {
            Moment::IdleStranger => self.call_first(scene, |scene| strangers::idle(&scene.ground.network, 1)),
            Moment::PortScan => self.call_first(scene, |scene| strangers::scan(&scene.ground.network, 3)),
            Moment::Garbage => self.call_first(scene, |scene| strangers::garbage(&scene.ground.network)),
            Moment::Crowd => self.call_first(scene, |scene| strangers::idle(&scene.ground.network, CROWD)),
            Moment::NoDescriptors => no_descriptors(scene),
            Moment::SecondSource => second_source(scene),
            Moment::LinkDiesAtShut => cut_at_the_end(scene, Cut::AtShut),
            Moment::LinkDiesAfterShut => cut_at_the_end(scene, Cut::AfterShut),
            Moment::LinkDiesAtShutThenCancel => {
                cut_at_the_end(scene, Cut::AtShut)?;
                scene.until("device")?;
                scene.until_silent()?;
                scene.here.monitor().execute("migrate_cancel", Value::Null).map(drop)
            }
            Moment::SourceKilledInDevice => {
                scene.all_is_sent_to_a_stopped_destination()?;
                kill(&mut scene.here)?;
                signal(scene.there.monitor().pid(), "CONT")
            }
            Moment::CancelInDevice => {
                scene.all_is_sent_to_a_stopped_destination()?;
                scene.here.monitor().execute("migrate_cancel", Value::Null)?;
                signal(scene.there.monitor().pid(), "CONT")
            }
            Moment::SecondMigrate => second_migrate(scene),
            Moment::ResetWhileActive => {
                scene.begin()?;
                scene.here.monitor().execute("system_reset", Value::Null)?;
                scene.here.monitor().wait_event("RESET", PATIENCE)?;
                scene.complete()
            }
            Moment::ResetAfterArrival => {
                scene.begin()?;
                scene.complete()?;
                scene.there.monitor().execute("system_reset", Value::Null)?;
                scene.there.monitor().wait_event("RESET", PATIENCE).map(drop)
            }
            Moment::TerminateSource => {
                scene.begin()?;
                signal(scene.here.monitor().pid(), "TERM")
            }
            Moment::TerminateDestination => {
                scene.begin()?;
                signal(scene.there.monitor().pid(), "TERM")
            }
            Moment::ExitOnErrorOff => exit_on_error_off(scene),
            Moment::PeerResets => peer_resets(scene),
            Moment::Silence => silence(scene),
            Moment::CancelAndGoAgain(at) => mishaps::cancel_and_go_again(at, scene),
            Moment::KilledAndGoElsewhere(at) => mishaps::killed_and_go_elsewhere(at, scene),
            Moment::SourceKilled(at) => mishaps::source_killed(at, scene),
            Moment::KilledInPostcopy => mishaps::killed_in_postcopy(scene),
            Moment::CancelInPostcopy => mishaps::cancelled_in_postcopy(scene),
            Moment::GuestReboots => mishaps::guest_reboots(scene),
            Moment::GuestShutsDown => {
                mishaps::guest_does(scene, |here| here.monitor().execute("system_powerdown", Value::Null).map(drop))
            }
            Moment::GuestSpins => {
                scene.begin()?;
                scene.complete()
            }
            Moment::Boots => mishaps::leaves_while_it_boots(scene),
            Moment::HotPlug => mishaps::hot_plug(scene),
            Moment::AnotherClient => mishaps::another_client(scene),
            Moment::LossyLink => mishaps::lossy_link(scene),
            Moment::Delay => delay::happen(scene),
            Moment::NoMemory => hosts::no_memory(scene),
            Moment::TargetFull => hosts::file_that_cannot_be_written(scene, "size=1m"),
            Moment::TargetReadOnly => hosts::file_that_cannot_be_written(scene, "ro"),
            Moment::DiskInUse => hosts::disk_in_use(scene),
            Moment::PausedGuest => mishaps::paused_guest(scene),
            Moment::BothStopped => mishaps::both_stopped(scene),
            Moment::SlowLink => mishaps::slow_link(scene),
            Moment::Frozen(phase, victim) => frozen::happen(phase, victim, scene),
            Moment::Events => events(scene),
        }
    }

    /// Strangers call, and stay; then the source comes.
    fn call_first<T>(self, scene: &mut Scene<'_>, call: impl FnOnce(&Scene<'_>) -> Result<T>) -> Result<()> {
        scene.wait_for_guest(Value::Null)?;
        let strangers = call(scene)?;
        scene.note("strangers called");
        // A destination that has ended because of them takes no guest: that is the outcome, not an error.
        if scene.leave().is_ok() && scene.until("active").is_ok() {
            scene.let_go()?;
            thread::sleep(Duration::from_secs(3));
        }
        // A destination that waits for a stranger may notice now that it has gone.
        drop(strangers);
        Ok(())
    }
}

fn no_descriptors(scene: &mut Scene<'_>) -> Result<()> {
    scene.wait_for_guest(Value::Null)?;
    strangers::limit_descriptors(scene.there.monitor().pid(), SPARE_DESCRIPTORS)?;
    let strangers = strangers::idle(&scene.ground.network, 4 * SPARE_DESCRIPTORS)?;
    scene.leave()?;
    thread::sleep(Duration::from_secs(1));
    drop(strangers);
    scene.let_go()
}

fn second_source(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    let caller = strangers::second_source(&scene.ground.network)?;
    scene.complete()?;
    drop(caller);
    Ok(())
}

fn cut_at_the_end(scene: &mut Scene<'_>, cut: Cut) -> Result<()> {
    scene.begin()?;
    scene.ground.network.cut(cut)?;
    scene.let_go()
}

fn second_migrate(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    scene.complete()?;
    for uri in [scene.uri(), "tcp:192.0.2.2:1".into()] {
        let refused = scene.here.monitor().execute("migrate", json!({ "uri": uri }));
        let error = refused.err().with_context(|| format!("a second migrate to {uri} was accepted"))?;
        match error.downcast_ref::<QmpError>() {
            Some(QmpError::Refused { description, .. }) if description == NO_SECOND => {}
            _ => return Err(error.context("QEMU says something else")),
        }
    }
    Ok(())
}

fn exit_on_error_off(scene: &mut Scene<'_>) -> Result<()> {
    scene.wait_for_guest(json!({ "exit-on-error": false }))?;
    scene.leave()?;
    scene.until("active")?;
    signal(scene.here.monitor().pid(), "KILL")?;
    scene.there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "failed")?;
    let status = scene.there.monitor().execute("query-status", Value::Null)?;
    ensure!(status["status"] == "inmigrate", "the destination is in {status}");
    scene.another_source(1)?;
    scene.wait_for_guest(json!({ "exit-on-error": false }))?;
    scene.leave()?;
    scene.complete()
}

fn peer_resets(scene: &mut Scene<'_>) -> Result<()> {
    let reader = strangers::reads_and_resets(&scene.ground.network, FALSE_PORT)?;
    let uri = format!("tcp:{}:{FALSE_PORT}", scene.ground.network.address());
    scene.here.monitor().execute("migrate", json!({ "uri": uri }))?;
    scene.until("active")?;
    scene.let_go()?;
    let read = reader.join().ok().context("the reader panicked")??;
    ensure!(read > 0, "nothing was sent");
    Ok(())
}

fn silence(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    scene.ground.network.cut(Cut::Now)?;
    let total = |scene: &mut Scene<'_>| -> Result<u64> {
        let migration = scene.here.monitor().migration()?;
        migration["total-time"].as_u64().context("no total-time")
    };
    // What is in the buffers goes on for a moment.
    thread::sleep(Duration::from_secs(1));
    let before = total(scene)?;
    thread::sleep(Duration::from_secs(2));
    let after = total(scene)?;
    ensure!(after >= before + 1900, "total-time went from {before} to {after} ms in 2 s of silence");
    scene.ground.network.mend()?;
    scene.complete()
}

fn events(scene: &mut Scene<'_>) -> Result<()> {
    scene.begin()?;
    scene.complete()?;
    let names = |endpoint: &mut Endpoint, turn: &str| -> Result<Vec<String>> {
        let mut names: Vec<String> = Vec::new();
        // The last ones of either end, in whatever order they come.
        while !["MIGRATION completed", turn].iter().all(|last| names.iter().any(|name| name == last)) {
            let event = endpoint.monitor().next_event(PATIENCE)?;
            let status = event.data["status"].as_str().map_or(String::new(), |status| format!(" {status}"));
            names.push(format!("{}{status}", event.name));
        }
        Ok(names)
    };
    let source = names(&mut scene.here, "STOP")?;
    let at = |name: &str| source.iter().position(|n| n == name).with_context(|| format!("no {name}: {source:?}"));
    let stop = at("STOP")?;
    ensure!(!source[stop..].iter().any(|n| n == "MIGRATION_PASS"), "a pass after the guest stopped: {source:?}");
    let destination = names(&mut scene.there, "RESUME")?;
    let at = |name: &str| destination.iter().position(|n| n == name);
    ensure!(at("RESUME") < at("MIGRATION completed"), "completed before the guest runs: {destination:?}");
    Ok(())
}
