//! Every command in every state that a machine and its migrations can be in: what is refused, and in which words.
//!
//! Both are led through the same states, and asked the same in each. What changes the state is asked last.

use super::{Both, MEMORY, Monitor, NobodyReads, PATIENCE, POLL, reply};
use crate::launch::Qemu;
use crate::peer::endpoint::start_reference;
use crate::roots::Root;
use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use qevm_migration::Status;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

/// What is asked in every state. No command here changes it, where it is accepted, but that a guest may go before its
/// memory under capability `postcopy-ram`.
const EVERYWHERE: &[(&str, &str)] = &[
    ("query-status", ""),
    ("query-migrate", ""),
    ("query-migrate-capabilities", ""),
    ("query-migrate-parameters", ""),
    ("migrate-continue", r#"{"state":"completed"}"#),
    ("migrate-continue", r#"{"state":"setup"}"#),
    ("migrate-recover", r#"{"uri":"tcp:127.0.0.1:0"}"#),
    ("migrate-start-postcopy", ""),
    ("migrate", r#"{"uri":"foo:bar"}"#),
    ("migrate-incoming", r#"{"uri":"foo:bar"}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"events","state":false}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"multifd","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"multifd","state":false}]}"#),
    ("migrate-set-parameters", r#"{"multifd-channels":3}"#),
    ("query-dirty-rate", ""),
    ("set-vcpu-dirty-limit", r#"{"dirty-rate":5}"#),
    ("cancel-vcpu-dirty-limit", ""),
    ("query-vcpu-dirty-limit", ""),
    ("closefd", r#"{"fdname":"x"}"#),
    ("remove-fd", r#"{"fdset-id":6}"#),
    ("query-fdsets", ""),
    ("query-name", ""),
    ("query-version", ""),
    ("nosuch", ""),
];
/// What is asked beside that where no postcopy is under way, which it would break off.
const NOT_PAUSED: &[(&str, &str)] = &[("migrate-pause", "")];
/// What is asked beside that where no postcopy is paused, which it would let go on.
const RESUME: &[(&str, &str)] = &[("migrate", r#"{"uri":"tcp:127.0.0.1:1","resume":true}"#)];
/// What is asked beside that where a migration is refused.
const REFUSED: &[(&str, &str)] = &[
    ("migrate", r#"{"uri":"unix:/nonexistent/nobody"}"#),
    ("migrate", r#"{"uri":"exec:cat > /dev/null"}"#),
    ("query-migrate", ""),
];
/// What stops a guest and lets it go on, where both are possible or without effect.
const STOP_AND_GO: &[(&str, &str)] =
    &[("cont", ""), ("query-status", ""), ("stop", ""), ("query-status", ""), ("cont", ""), ("query-status", "")];
/// What a guest is asked that is being handed over: it is neither stopped nor started.
const HANDED_OVER: &[(&str, &str)] = &[("cont", ""), ("stop", ""), ("query-status", ""), ("query-migrate", "")];
const CANCEL: &[(&str, &str)] = &[("migrate_cancel", "")];

/// Leads both from state to state.
type Lead = fn(&mut Tour<'_>) -> Result<()>;

/// Leads both through the states, and tells how many replies were compared. The differences are added to `differences`.
pub(super) fn compare(root: &Root, program: &Monitor, scratch: &Path, differences: &mut Vec<String>) -> Result<usize> {
    let mut replies = 0;
    let tours: [(&str, &[&str], Lead); 7] = [
        ("running", &[], running),
        ("prelaunch", &["-S"], prelaunch),
        ("incoming", &["--incoming", "defer"], incoming),
        ("postcopy-device", &[], postcopy_device),
        ("postcopy-active", &[], postcopy_active),
        ("postcopy-paused", &[], postcopy_paused),
        ("release-ram", &[], release_ram),
    ];
    for (name, more, lead) in tours {
        let start = |name: &str, more: &[&str]| start(root, program, scratch, name, more);
        let mut tour = Tour { both: start(name, more)?, start: &start, scratch, replies: 0 };
        lead(&mut tour).with_context(|| format!("tour '{name}'"))?;
        replies += tour.replies;
        differences.append(&mut tour.both.differences);
        tour.both.qemu.quit();
        tour.both.ours.quit();
    }
    Ok(replies)
}

fn start(root: &Root, program: &Monitor, scratch: &Path, name: &str, more: &[&str]) -> Result<Both> {
    let mut arguments = ["-m", MEMORY].iter().chain(more).map(|a| a.to_string()).collect::<Vec<_>>();
    let ours = start_reference(program, &format!("{name}-ours"), &arguments, scratch)?;
    arguments.extend(["-M", "microvm,accel=tcg"].map(String::from));
    let qemu = Qemu::start(root, &format!("{name}-qemu"), &arguments, scratch)?;
    Ok(Both { qemu, ours, differences: Vec::new() })
}

/// Both on their way through the states.
struct Tour<'t> {
    both: Both,
    start: &'t dyn Fn(&str, &[&str]) -> Result<Both>,
    scratch: &'t Path,
    replies: usize,
}

impl Tour<'_> {
    /// Waits until both are in this state.
    fn wait_for(&mut self, run_state: &str, migration: Option<&str>) -> Result<()> {
        for monitor in [&mut self.both.qemu, &mut self.both.ours] {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let status = monitor.execute("query-status", Value::Null)?;
                let told = monitor.execute("query-migrate", Value::Null)?;
                if status["status"] == run_state && told["status"].as_str() == migration {
                    break;
                }
                ensure!(Instant::now() < deadline, "still {status}, {told}; {run_state}, {migration:?} wanted");
                thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// Waits until both are in this state, and asks them.
    fn at(&mut self, run_state: &str, migration: Option<Status>, asked: &[&[(&str, &str)]]) -> Result<()> {
        let migration = migration.map(Status::as_str);
        self.wait_for(run_state, migration)?;
        let rows = [&[EVERYWHERE, NOT_PAUSED, RESUME], asked].concat();
        self.ask(run_state, migration, &rows)
    }

    /// Asks both, who are in this state.
    fn ask(&mut self, run_state: &str, migration: Option<&str>, asked: &[&[(&str, &str)]]) -> Result<()> {
        let before = self.both.differences.len();
        for rows in asked {
            self.replies += self.both.ask_all(rows, self.scratch)?;
        }
        for difference in &mut self.both.differences[before..] {
            *difference = format!("in {run_state}, {}: {difference}", migration.unwrap_or("no migration"));
        }
        Ok(())
    }

    /// Both are told the same, which is the way to the next state; with a list of arguments, each its own.
    fn tell(&mut self, command: &str, arguments: [Value; 2]) -> Result<()> {
        let [qemu, ours] = arguments;
        let replies = [reply(&mut self.both.qemu, command, qemu)?, reply(&mut self.both.ours, command, ours)?];
        self.both.compare(command, &replies[0], &replies[1]);
        self.replies += 1;
        Ok(())
    }

    fn tell_both(&mut self, command: &str, arguments: Value) -> Result<()> {
        self.tell(command, [arguments.clone(), arguments])
    }

    fn capabilities(&mut self, changes: &[(&str, bool)]) -> Result<()> {
        let list = changes.iter().map(|(name, state)| json!({ "capability": name, "state": state }));
        self.tell_both("migrate-set-capabilities", json!({ "capabilities": list.collect::<Value>() }))
    }

    /// Both migrate to a peer of their own, who answers at first, and get as far as it goes without its word.
    fn migrate(&mut self) -> Result<()> {
        let peers = self.migrate_to_nobody()?;
        peers.into_iter().for_each(|peer| answer(peer, &FIRST_PINGS));
        Ok(())
    }

    /// Both begin to migrate, each to a socket of its own that is not read so far.
    fn migrate_to_nobody(&mut self) -> Result<[NobodyReads; 2]> {
        let limits = json!({ "max-bandwidth": 0, "downtime-limit": 2000 });
        self.tell_both("migrate-set-parameters", limits)?;
        let peer = |who: &str| NobodyReads::at(self.scratch.join(format!("{who}.peer")));
        let peers = [peer("qemu")?, peer("ours")?];
        self.tell("migrate", peers.each_ref().map(|peer| json!({ "uri": peer.uri })))?;
        Ok(peers)
    }
}

fn running(tour: &mut Tour<'_>) -> Result<()> {
    tour.at("running", None, &[CANCEL, STOP_AND_GO])?;
    tour.tell_both("stop", Value::Null)?;
    tour.at("paused", None, &[CANCEL])?;
    let nobody = json!({ "uri": "unix:/nonexistent/nobody" });
    tour.tell_both("migrate", nobody.clone())?;
    tour.at("paused", Some(Status::Failed), &[CANCEL, STOP_AND_GO])?;
    tour.at("running", Some(Status::Failed), &[])?;

    // The connection is not accepted, so that it is neither there nor refused.
    let crowd = Crowd::gather(tour.scratch)?;
    tour.tell("migrate", crowd.addresses())?;
    tour.at("running", Some(Status::Setup), &[REFUSED, STOP_AND_GO])?;
    // A QEMU is in `cancelling` until the connection is there or refused; reference-vmm does not wait for that.
    tour.tell_both("migrate_cancel", Value::Null)?;
    drop(crowd);
    tour.at("running", Some(Status::Cancelled), &[])?;
    let nobody_reads = tour.migrate_to_nobody()?;
    tour.at("running", Some(Status::Active), &[REFUSED, STOP_AND_GO])?;
    tour.tell_both("stop", Value::Null)?;
    tour.at("paused", Some(Status::Active), &[REFUSED])?;
    tour.tell_both("migrate_cancel", Value::Null)?;
    drop(nobody_reads);
    tour.at("paused", Some(Status::Cancelled), &[CANCEL])?;

    // A guest that is stopped when it is handed over stays so when that fails.
    tour.capabilities(&[("pause-before-switchover", true), ("return-path", true)])?;
    tour.migrate()?;
    tour.at("finish-migrate", Some(Status::PreSwitchover), &[REFUSED, HANDED_OVER])?;
    tour.tell_both("migrate_cancel", Value::Null)?;
    tour.at("paused", Some(Status::Cancelled), &[STOP_AND_GO])?;
    tour.migrate()?;
    tour.at("finish-migrate", Some(Status::PreSwitchover), &[REFUSED, HANDED_OVER])?;
    tour.tell_both("migrate-continue", json!({ "state": "pre-switchover" }))?;
    // The peers do not say that they have the guest.
    tour.at("finish-migrate", Some(Status::Device), &[REFUSED, HANDED_OVER])?;
    tour.tell_both("migrate_cancel", Value::Null)?;
    tour.at("running", Some(Status::Cancelled), &[])?;

    tour.capabilities(&[("pause-before-switchover", false), ("return-path", false)])?;
    tour.tell_both("migrate", json!({ "uri": "exec:cat > /dev/null" }))?;
    tour.at("postmigrate", Some(Status::Completed), &[REFUSED, CANCEL, &[("stop", ""), ("query-status", "")]])?;
    // That a second migration was refused has changed nothing. What the operator says counts, as with QEMU.
    tour.at("postmigrate", Some(Status::Completed), &[STOP_AND_GO])?;
    tour.at("running", Some(Status::Completed), &[CANCEL])?;
    tour.tell_both("stop", Value::Null)?;
    tour.at("paused", Some(Status::Completed), &[])?;
    tour.tell_both("migrate", nobody)?;
    tour.at("paused", Some(Status::Failed), &[])
}

fn prelaunch(tour: &mut Tour<'_>) -> Result<()> {
    tour.at("prelaunch", None, &[CANCEL, &[("stop", ""), ("query-status", "")]])?;
    let nobody_reads = tour.migrate_to_nobody()?;
    tour.at("prelaunch", Some(Status::Active), &[REFUSED, &[("stop", ""), ("query-status", "")]])?;
    tour.tell_both("migrate_cancel", Value::Null)?;
    drop(nobody_reads);
    tour.at("prelaunch", Some(Status::Cancelled), &[])?;
    tour.capabilities(&[("pause-before-switchover", true)])?;
    tour.migrate()?;
    tour.at("finish-migrate", Some(Status::PreSwitchover), &[REFUSED, HANDED_OVER])?;
    tour.tell_both("migrate_cancel", Value::Null)?;
    tour.at("prelaunch", Some(Status::Cancelled), &[STOP_AND_GO])
}

fn incoming(tour: &mut Tour<'_>) -> Result<()> {
    tour.at("inmigrate", None, &[REFUSED, CANCEL, STOP_AND_GO])?;
    let place = |who: &str| tour.scratch.join(format!("{who}.legality"));
    let places = ["qemu", "ours"].map(|who| json!({ "uri": format!("unix:{}", place(who).display()) }));
    tour.tell("migrate-incoming", places.clone())?;
    let again = &[("migrate-incoming", r#"{"uri":"tcp:127.0.0.1:0"}"#)];
    tour.at("inmigrate", Some(Status::Setup), &[REFUSED, again, CANCEL, STOP_AND_GO])?;

    // Each has a guest of its own kind sent, who is held before the end.
    let mut sources = (tour.start)("sources", &[])?;
    for (monitor, place) in [&mut sources.qemu, &mut sources.ours].into_iter().zip(places) {
        monitor.set_capabilities(&["pause-before-switchover"])?;
        monitor.set_parameters(&json!({ "max-bandwidth": 0, "downtime-limit": 2000 }))?;
        monitor.execute("migrate", place)?;
    }
    tour.at("inmigrate", Some(Status::Active), &[REFUSED, again, CANCEL, STOP_AND_GO])?;
    for monitor in [&mut sources.qemu, &mut sources.ours] {
        monitor.wait_migration(PATIENCE, |migration| migration["status"] == "pre-switchover")?;
        monitor.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    }
    tour.at("running", Some(Status::Completed), &[again, CANCEL, STOP_AND_GO])?;
    // It may leave again.
    let nobody_reads = tour.migrate_to_nobody()?;
    tour.at("running", Some(Status::Active), &[REFUSED, again, STOP_AND_GO])?;
    tour.tell_both("migrate_cancel", Value::Null)?;
    drop(nobody_reads);
    tour.at("running", Some(Status::Cancelled), &[again])?;
    sources.qemu.quit();
    sources.ours.quit();
    Ok(())
}

/// A guest goes before its memory, to a destination that does not say that it has loaded its devices.
fn postcopy_device(tour: &mut Tour<'_>) -> Result<()> {
    tour.capabilities(&[("postcopy-ram", true)])?;
    depart(tour, &FIRST_PINGS, Status::PostcopyDevice)
}

/// To one that says so.
fn postcopy_active(tour: &mut Tour<'_>) -> Result<()> {
    tour.capabilities(&[("postcopy-ram", true)])?;
    depart(tour, &[&FIRST_PINGS[..], &[2, 3, 0x42, 4]].concat(), Status::PostcopyActive)
}

/// The connection is given up, and the next ones do not get far.
fn postcopy_paused(tour: &mut Tour<'_>) -> Result<()> {
    tour.capabilities(&[("postcopy-ram", true)])?;
    // A QEMU that has sent everything and is paused then fails, and starts the guest again.
    tour.tell_both("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 2000 }))?;
    leave(tour, &[&FIRST_PINGS[..], &[2, 3, 0x42, 4]].concat(), Status::PostcopyActive)?;
    tour.tell_both("migrate-pause", Value::Null)?;
    let paused = |tour: &mut Tour<'_>| {
        let here: &[_] = &[("migrate-continue", r#"{"state":"postcopy-paused"}"#)];
        tour.wait_for("finish-migrate", Some("postcopy-paused"))?;
        tour.ask(
            "finish-migrate",
            Some("postcopy-paused"),
            &[EVERYWHERE, NOT_PAUSED, REFUSED, HANDED_OVER, CANCEL, here, EVERYWHERE],
        )
    };
    paused(tour)?;
    tour.tell_both("migrate", json!({ "uri": "foo:bar", "resume": true }))?;
    tour.tell_both("migrate", json!({ "uri": "unix:/nonexistent/nobody", "resume": true }))?;
    paused(tour)?;

    let resume = |addresses: [Value; 2]| {
        addresses.map(|mut address| {
            address["resume"] = true.into();
            address
        })
    };
    let crowd = Crowd::gather(tour.scratch)?;
    tour.tell("migrate", resume(crowd.addresses()))?;
    tour.at("finish-migrate", Some(Status::PostcopyRecoverSetup), &[REFUSED, HANDED_OVER, CANCEL])?;
    drop(crowd);
    paused(tour)?;

    // The peer does not say which pages have come.
    let peer = |who: &str| NobodyReads::at(tour.scratch.join(format!("{who}.recovery")));
    let peers = [peer("qemu")?, peer("ours")?];
    tour.tell("migrate", resume(peers.each_ref().map(|peer| json!({ "uri": peer.uri }))))?;
    let recovers = Status::PostcopyRecover.as_str();
    tour.wait_for("finish-migrate", Some(recovers))?;
    tour.ask("finish-migrate", Some(recovers), &[EVERYWHERE, RESUME, REFUSED, HANDED_OVER, CANCEL])?;
    tour.tell_both("migrate-pause", Value::Null)?;
    paused(tour)
}

/// What was lost with the connection is no longer there.
fn release_ram(tour: &mut Tour<'_>) -> Result<()> {
    tour.capabilities(&[("postcopy-ram", true), ("release-ram", true)])?;
    tour.tell_both("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 2000 }))?;
    leave(tour, &[&FIRST_PINGS[..], &[2, 3, 0x42, 4]].concat(), Status::PostcopyActive)?;
    tour.tell_both("migrate-pause", Value::Null)?;
    tour.wait_for("finish-migrate", Some("postcopy-paused"))?;
    let resume: &[_] = &[
        ("migrate", r#"{"uri":"unix:/nonexistent/nobody","resume":true}"#),
        ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"release-ram","state":false}]}"#),
    ];
    tour.ask("finish-migrate", Some("postcopy-paused"), &[EVERYWHERE, RESUME, resume, HANDED_OVER, CANCEL, EVERYWHERE])
}

fn depart(tour: &mut Tour<'_>, answered: &[u32], status: Status) -> Result<()> {
    leave(tour, answered, status)?;
    let here = [("migrate-continue", format!(r#"{{"state":"{}"}}"#, status.as_str()))];
    let here = here.each_ref().map(|(command, arguments)| (*command, arguments.as_str()));
    let asked = [EVERYWHERE, RESUME, REFUSED, HANDED_OVER, CANCEL, &here, EVERYWHERE];
    tour.ask("finish-migrate", Some(status.as_str()), &asked)
}

/// A guest goes before its memory, and gets so far.
fn leave(tour: &mut Tour<'_>, answered: &[u32], status: Status) -> Result<()> {
    let peers = tour.migrate_to_nobody()?;
    tour.wait_for("running", Some(Status::Active.as_str()))?;
    tour.tell_both("migrate-start-postcopy", Value::Null)?;
    peers.into_iter().for_each(|peer| answer(peer, answered));
    tour.wait_for("finish-migrate", Some(status.as_str()))?;
    // The status comes before the guest has gone.
    for monitor in [&mut tour.both.qemu, &mut tour.both.ours] {
        monitor.wait_migration(PATIENCE, |migration| migration["downtime"].is_number())?;
    }
    Ok(())
}

/// The PINGs that a stream begins with. A QEMU does not look at their values, and sends the first alone.
const FIRST_PINGS: [u32; 2] = [1, 0x5145_4801];
/// A section of a PING up to its value, and the message that answers it.
const PING: [u8; 5] = [8, 0, 2, 0, 4];
const PONG: [u8; 4] = [0, 2, 0, 4];

/// From here on there is a peer that takes everything, answers these PINGs, and sends nothing else: no guest arrives
/// there.
fn answer(peer: NobodyReads, answered: &[u32]) {
    let answered = answered.to_vec();
    thread::spawn(move || {
        // The source may go at any time.
        let _ = peer.socket.accept().and_then(|(stream, _)| take_in(stream, &answered));
    });
}

fn take_in(mut stream: UnixStream, answered: &[u32]) -> std::io::Result<()> {
    let (mut chunk, mut seen) = (vec![0; 1 << 16], Vec::new());
    loop {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        seen.extend_from_slice(&chunk[..count]);
        for ping in seen.windows(PING.len() + 4).filter(|window| window.starts_with(&PING)) {
            let value = &ping[PING.len()..];
            if answered.iter().any(|known| known.to_be_bytes() == value) {
                stream.write_all(&[&PONG, value].concat())?;
            }
        }
        // One may lie on the border.
        seen.drain(..seen.len().saturating_sub(PING.len() + 3));
    }
}

/// Sockets at which others wait already.
struct Crowd {
    _sockets: Vec<OwnedFd>,
    addresses: [Value; 2],
}

impl Crowd {
    fn gather(scratch: &Path) -> Result<Crowd> {
        let mut sockets = Vec::new();
        let mut addresses = [Value::Null, Value::Null];
        for (who, address) in ["qemu", "ours"].into_iter().zip(&mut addresses) {
            let path = scratch.join(format!("{who}.crowd"));
            // Another crowd's.
            let _ = std::fs::remove_file(&path);
            let place = UnixAddr::new(&path)?;
            let stream = |flags| socket(AddressFamily::Unix, SockType::Stream, flags, None);
            let listener = stream(SockFlag::SOCK_CLOEXEC)?;
            bind(listener.as_raw_fd(), &place)?;
            listen(&listener, Backlog::new(0)?)?;
            sockets.push(listener);
            // Until no other can connect without waiting.
            loop {
                let waiting = stream(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
                match connect(waiting.as_raw_fd(), &place) {
                    Ok(()) => sockets.push(waiting),
                    Err(Errno::EAGAIN) => break,
                    Err(error) => bail!("connecting to {}: {error}", path.display()),
                }
            }
            *address = json!({ "uri": format!("unix:{}", path.display()) });
        }
        Ok(Crowd { _sockets: sockets, addresses })
    }

    fn addresses(&self) -> [Value; 2] {
        self.addresses.clone()
    }
}
