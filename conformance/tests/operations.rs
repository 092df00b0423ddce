//! What operators set beside the way of a guest: UUIDs, announcements, addresses. QEMU 11.1 says beforehand what has to
//! come of it. What this machine lacks is skipped by name; `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such
//! skips into failures.

use qevm_conformance::launch::Qemu;
use qevm_conformance::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::patience::PATIENCE;
use qevm_conformance::peer::{self, Monitor};
use qevm_conformance::roots::{Root, Suite};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const ONE: &str = "12345678-1234-1234-1234-123456789abc";
const OTHER: &str = "12345678-1234-1234-1234-123456789abd";
/// How long the network is listened to after a frame: longer than any time between two of the parameters below, or than
/// any by default.
const QUIET: Duration = Duration::from_millis(1500);

/// QEMU 11.1 and a folder; `None` is a skip, which is noted.
fn env(name: &str) -> Option<(Root, tempfile::TempDir)> {
    let skipped = |variable: &str, why: &str| {
        assert!(!required(variable), "{variable}=1, but {why}");
        list_skips("operations", [(name, why)]).unwrap();
    };
    if let Err(why) = kvm() {
        skipped(REQUIRE_KVM, &why);
        return None;
    }
    match Root::install(Suite::Sid) {
        Ok(root) => Some((root, tempfile::tempdir().unwrap())),
        Err(why) => {
            skipped(REQUIRE_QEMU, &format!("{why:#}"));
            None
        }
    }
}

/// Starts one of both kinds, with what both take alike.
fn start(qemu: Option<&Root>, name: &str, arguments: &[&str], scratch: &Path) -> Qemu {
    let mut all: Vec<String> = ["-m", "16M", "--serial", "null"].map(String::from).into();
    match qemu {
        Some(root) => {
            let firmware = scratch.join("payload.bin");
            std::fs::write(&firmware, reference_vmm::payload::IMAGE).unwrap();
            let cpu = root.host_cpu().unwrap().model();
            all.extend(["-M", "microvm,accel=kvm", "-cpu", cpu, "-bios"].map(String::from));
            all.push(firmware.display().to_string());
            all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
            Qemu::start(root, name, &all, scratch).unwrap()
        }
        None => {
            let arguments: Vec<&str> = all.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
            let program = Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")));
            peer::reference(&program, name, &arguments, scratch).unwrap()
        }
    }
}

/// What becomes of a migration: whether the guest has arrived, and what the destination has said.
fn migrate(here: &mut Qemu, there: &mut Qemu, socket: &Path) -> (bool, String) {
    let uri = format!("unix:{}", socket.display());
    there.execute("migrate-incoming", json!({ "uri": uri, "exit-on-error": false })).unwrap();
    here.execute("migrate", json!({ "uri": uri })).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status =
            |monitor: &mut Qemu| monitor.migration().unwrap()["status"].as_str().unwrap_or_default().to_owned();
        match (status(here).as_str(), status(there).as_str()) {
            ("completed", "completed") => return (true, there.complaints()),
            (_, "failed") => {
                let migration = there.migration().unwrap();
                return (false, format!("{} {}", there.complaints(), migration["error-desc"]));
            }
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// UUIDs and capabilities of the source and of the destination, whether the guest arrives, and what the destination
/// says.
type Case<'c> = ([Option<&'c str>; 2], [&'c [&'c str]; 2], bool, &'c str);

/// As between two QEMUs of 11.1: whether the capability is on at the destination does not matter, nor does a UUID at
/// one side alone; page channels say the UUID whether it is on or not.
#[test]
fn guests_go_to_machines_of_the_same_uuid() {
    let Some((root, scratch)) = env("uuid") else { return };
    let validate: &[&str] = &["validate-uuid"];
    let (differs, not_set) = (
        format!("UUID received is {ONE} and local is {OTHER}"),
        format!("UUID is received {ONE}, but local uuid isn't set"),
    );
    let cases: [Case<'_>; 7] = [
        ([Some(ONE), Some(ONE)], [validate; 2], true, ""),
        ([Some(ONE), Some(OTHER)], [validate; 2], false, &differs),
        ([Some(ONE), Some(OTHER)], [validate, &[]], false, &differs),
        ([Some(ONE), Some(OTHER)], [&[], validate], true, ""),
        ([Some(ONE), None], [validate; 2], true, &not_set),
        ([None, Some(ONE)], [validate; 2], true, ""),
        ([Some(ONE), Some(ONE)], [&["multifd"]; 2], true, ""),
    ];
    let ways = [[None, None], [Some(&root), None], [None, Some(&root)]];
    for (number, (uuids, capabilities, arrives, says)) in cases.into_iter().enumerate() {
        for (way, ends) in ways.iter().enumerate() {
            let name = |end: &str| format!("{end}{number}-{way}");
            let uuid = |end: usize| uuids[end].map_or(vec![], |uuid| vec!["--uuid", uuid]);
            let mut here = start(ends[0], &name("here"), &[&["-S"][..], &uuid(0)].concat(), scratch.path());
            let waits = [&["--incoming", "defer"][..], &uuid(1)].concat();
            let mut there = start(ends[1], &name("there"), &waits, scratch.path());
            let nil = "00000000-0000-0000-0000-000000000000";
            let told = there.execute("query-uuid", Value::Null).unwrap();
            assert_eq!(told["UUID"], uuids[1].unwrap_or(nil));
            here.set_capabilities(capabilities[0]).unwrap();
            there.set_capabilities(capabilities[1]).unwrap();
            let (arrived, said) = migrate(&mut here, &mut there, &scratch.path().join(name("link")));
            let case = format!("{uuids:?} {capabilities:?}, way {way}: {said}");
            assert_eq!(arrived, arrives, "{case}");
            // The cause of a QEMU's failure is in its log, and the words around it are its own.
            assert!(said.contains(says), "{case}");
        }
    }
}

/// Where frames go that a monitor sends.
struct FrameCounter(UnixDatagram, PathBuf);

impl FrameCounter {
    fn new(path: PathBuf) -> FrameCounter {
        FrameCounter(UnixDatagram::bind(&path).unwrap(), path)
    }

    /// A card whose frames come here.
    fn card(&self, name: &str) -> [String; 4] {
        let (remote, local) = (self.1.display(), self.1.with_extension(name));
        let netdev =
            format!("dgram,id=n,local.type=unix,local.path={},remote.type=unix,remote.path={remote}", local.display());
        ["--netdev".into(), netdev, "--device".into(), "virtio-net-device,netdev=n".into()]
    }

    /// The frames from now on until it is quiet, and the times between them.
    fn received(&self) -> (Vec<Vec<u8>>, Vec<Duration>) {
        let (mut frames, mut times, mut frame) = (Vec::new(), Vec::new(), [0; 2048]);
        self.0.set_read_timeout(Some(QUIET)).unwrap();
        loop {
            match self.0.recv(&mut frame) {
                Ok(count) => {
                    times.push(Instant::now());
                    frames.push(frame[..count].to_vec());
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(error) => panic!("{error}"),
            }
        }
        (frames, times.windows(2).map(|pair| pair[1] - pair[0]).collect())
    }
}

/// Frames and times between them are those of a QEMU, on a command and after a migration. No frame comes too early; a
/// busy host may have it late.
#[test]
fn the_network_hears_of_a_guest_as_from_a_qemu() {
    let Some((root, scratch)) = env("announcements") else { return };
    let settings = |rounds| json!({ "initial": 40, "max": 100, "rounds": rounds, "step": 30 });
    // What the parameters say: 40 ms, and 30 more each time, up to 100.
    let least = [40, 70, 100, 100].map(Duration::from_millis);
    let judge = |name: &str, (frames, times): &(Vec<Vec<u8>>, Vec<Duration>)| {
        assert_eq!((frames.len(), times.len()), (5, 4), "{name}: {times:?}");
        assert!(frames.iter().all(|frame| *frame == frames[0]), "{name}: {frames:x?}");
        for (time, least) in times.iter().zip(least) {
            // A frame may have been read late, so that the next one seems to be early.
            assert!(
                *time + Duration::from_millis(20) >= least || times.iter().sum::<Duration>() >= least * 3,
                "{name}: {times:?}"
            );
        }
    };
    let mut announced = Vec::new();
    for (name, qemu) in [("qemu", Some(&root)), ("ours", None)] {
        let frames = FrameCounter::new(scratch.path().join(format!("{name}.ear")));
        let card = frames.card("local");
        let mut monitor = start(qemu, name, &card.each_ref().map(String::as_str), scratch.path());
        monitor.execute("announce-self", settings(5)).unwrap();
        let seen = frames.received();
        judge(name, &seen);
        announced.push(seen.0[0].clone());
        monitor.execute("announce-self", settings(0)).unwrap();
        let mut named = settings(5);
        named["interfaces"] = json!(["n"]);
        monitor.execute("announce-self", named).unwrap();
        assert_eq!(frames.received().0.len(), 0, "{name} announces what it has not");
        monitor.execute("stop", Value::Null).unwrap();
        monitor.execute("announce-self", settings(5)).unwrap();
        assert_eq!(frames.received().0.len(), 0, "{name} announces a guest that is paused");
    }
    let [theirs, ours] = announced.as_slice() else { panic!("two monitors") };
    assert_eq!(ours, theirs, "the frame of ours, and that of a QEMU");
    // RARP, of the card's address.
    assert_eq!((&theirs[12..14], theirs.len()), (&[0x80, 0x35][..], 60));

    for (way, ends) in [[Some(&root), None], [None, None]].into_iter().enumerate() {
        let frames = FrameCounter::new(scratch.path().join(format!("arrival{way}.ear")));
        let (here_card, there_card) = (frames.card("here"), frames.card("there"));
        let mut here = start(ends[0], &format!("from{way}"), &here_card.each_ref().map(String::as_str), scratch.path());
        let mut waits = vec!["--incoming", "defer"];
        waits.extend(there_card.each_ref().map(String::as_str));
        let mut there = start(ends[1], &format!("to{way}"), &waits, scratch.path());
        let parameters =
            json!({ "announce-initial": 40, "announce-max": 100, "announce-rounds": 5, "announce-step": 30 });
        there.set_parameters(&parameters).unwrap();
        let (arrived, said) = migrate(&mut here, &mut there, &scratch.path().join(format!("arrival{way}.link")));
        assert!(arrived, "{said}");
        let seen = frames.received();
        judge(&format!("arrival {way}"), &seen);
        assert_eq!(seen.0[0], *theirs);
    }
}

/// `to` is where two destinations can be on one command line; a JSON object is where a channel stands that no URI has.
#[test]
fn a_destination_listens_where_its_command_line_says() {
    let Some((root, scratch)) = env("addresses") else { return };
    let channel = |name: &str| {
        let addr = json!({ "transport": "socket", "type": "unix", "path": name, "abstract": true });
        json!({ "channel-type": "main", "addr": addr }).to_string()
    };
    for (way, ends) in [[Some(&root), None], [None, Some(&root)], [None, None]].into_iter().enumerate() {
        let name = format!("qevm-{}-{way}", std::process::id());
        let mut here = start(ends[0], &format!("a{way}"), &["-S"], scratch.path());
        let mut there = start(ends[1], &format!("b{way}"), &["--incoming", &channel(&name)], scratch.path());
        let waiting = there.migration().unwrap();
        let expected = json!([{ "type": "unix", "path": name, "abstract": true, "tight": true }]);
        assert_eq!(waiting["socket-address"], expected);
        let channels: Value = serde_json::from_str(&channel(&name)).unwrap();
        here.execute("migrate", json!({ "channels": [channels] })).unwrap();
        here.wait_migration(PATIENCE, |migration| migration["status"] == "completed").unwrap();
        let deadline = Instant::now() + PATIENCE;
        while there.migration().unwrap()["status"] != "completed" {
            assert!(Instant::now() < deadline, "the guest does not arrive");
            thread::sleep(Duration::from_millis(10));
        }
    }
    // Of two that are told the same, the second gets the next port.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for qemu in [Some(&root), None] {
        let uri = format!("tcp:127.0.0.1:{port},to={}", port.saturating_add(200));
        let name = if qemu.is_some() { "theirs" } else { "ours" };
        let mut there = start(qemu, name, &["--incoming", &uri], scratch.path());
        let address = &there.migration().unwrap()["socket-address"][0];
        let next: u16 = address["port"].as_str().unwrap().parse().unwrap();
        assert!(next > port, "{address}");
        assert_eq!((&address["host"], &address["ipv4"]), (&json!("127.0.0.1"), &json!(true)), "{name}: {address}");
    }
}
