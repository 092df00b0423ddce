//! Guests whose memory stays where it is when they go to another process (mode `cpr-transfer`).

use crate::Test;
use crate::guest::{Guest, PATIENCE};
use crate::qmp::{finished, refused};
use qevm_migration::cpr::{Passed, Predecessor};
use qevm_migration::{Job, Listener, Mode, Parameters, Socket, Timeouts, migrate, receive};
use qevm_wire::{Profile, QemuVersion};
use reference_vmm::Error;
use reference_vmm::machine::{Machine, MachineConfig, RunState};
use reference_vmm::memory::{BIOS, BackendError, BackendKind, Files, MemoryBackend};
use reference_vmm::payload::IMAGE;
use reference_vmm::qmp::{Client, Server};
use reference_vmm::vmm::Vmm;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::thread;

pub(crate) const TESTS: &[Test] = &[
    ("cpr_a_guest_goes_on_in_the_same_memory", goes_on_in_the_same_memory),
    ("cpr_memory_that_was_not_passed_is_not_made_anew", is_not_made_anew),
    ("cpr_a_source_keeps_its_guest", keeps_its_guest),
    ("cpr_a_source_leaves_a_guest_that_has_gone_alone", leaves_it_alone),
];

const MEMORY: u64 = 32 << 20;
const PAYLOAD: &str = "dirty=4M rate=8M hold=1M zero=1M verify=16384 report=20";

fn backend() -> MemoryBackend {
    MemoryBackend {
        id: "mem".into(),
        size: MEMORY,
        kind: BackendKind::Memfd { hugetlb: None, seal: true },
        share: true,
        prealloc: false,
        reserve: true,
        merge: false,
        canonical_path: false,
    }
}

/// A machine whose memory can be passed on, and may have been.
fn guest(passed: Option<BTreeMap<String, File>>) -> Guest {
    Guest::configured(MEMORY, 1, PAYLOAD, |config| {
        config.memory_backend = Some(backend());
        config.incoming = passed.is_some();
        config.files.share_aux = true;
        config.files.passed = passed;
    })
}

fn passed(machine: &Machine) -> BTreeMap<String, File> {
    let (files, private) = machine.memory().passable();
    assert!(private.is_empty(), "{private:?}");
    files.into_iter().map(|(name, file)| (name.to_owned(), file.try_clone().unwrap())).collect()
}

fn goes_on_in_the_same_memory() {
    let from = guest(None);
    from.machine.resume().unwrap();
    from.wait_for_passes();
    // What the guest has made of its firmware is not loaded anew while it runs.
    let bios = |machine: &Machine| {
        let mut last = [0; 16];
        machine.memory().block(BIOS).unwrap().read(IMAGE.len() as u64 - 16, &mut last).unwrap();
        last
    };
    let block = from.machine.memory().block(BIOS).unwrap();
    let first = [0x5a; 8];
    block.write(16, &first).unwrap();
    let to = guest(Some(passed(&from.machine)));
    let mut found = [0; 8];
    to.machine.memory().block(BIOS).unwrap().read(16, &mut found).unwrap();
    assert_eq!(found, first);
    assert_eq!(bios(&to.machine), bios(&from.machine));

    let mut parameters = Parameters::default();
    parameters.mode = Mode::CprTransfer;
    let (outgoing, incoming) = (Job::default(), Job::default());
    for job in [&outgoing, &incoming] {
        job.set_parameters(parameters.clone());
        job.begin().unwrap();
    }
    let profile = Profile::new(QemuVersion::NEWEST, "microvm");
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    thread::scope(|scope| {
        let arriving = scope.spawn(|| {
            let channel = listener.accept().unwrap();
            let arrival = receive(&to.machine, channel.clone().into(), &incoming, &profile).unwrap();
            assert!(arrival.running);
            to.machine.resume().unwrap();
            channel.close();
        });
        let channel = Socket::connect(listener.address()).unwrap();
        migrate(&from.machine, &channel.into(), &outgoing, &profile).unwrap();
        arriving.join().unwrap();
    });
    assert_eq!(from.machine.run_state(), RunState::Paused);
    let ram = outgoing.statistics().ram;
    assert_eq!((ram.total, ram.normal, ram.duplicate), (0, 0, 0));
    assert!(ram.transferred < 1 << 20, "{} bytes", ram.transferred);
    drop(from);
    to.assert_healthy();
}

/// A QEMU makes it anew, and the guest is lost.
fn is_not_made_anew() {
    let from = guest(None);
    let refused = |change: &dyn Fn(&mut MachineConfig)| {
        let files = Files { share_aux: true, passed: Some(passed(&from.machine)) };
        let mut config =
            MachineConfig { memory: MEMORY, memory_backend: Some(backend()), files, ..MachineConfig::default() };
        change(&mut config);
        match Machine::new(config).map(drop) {
            Err(Error::MemoryBackend(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    let missing = refused(&|config| drop(config.files.passed.as_mut().unwrap().remove(BIOS)));
    assert!(matches!(&missing, BackendError::NotPassed(name) if name == BIOS), "{missing}");
    let other = refused(&|config| config.memory_backend.as_mut().unwrap().id = "other".into());
    assert!(matches!(&other, BackendError::NotPassed(name) if name == "other"), "{other}");
    let shorter = refused(&|config| {
        config.memory = MEMORY / 2;
        config.memory_backend.as_mut().unwrap().size = MEMORY / 2;
    });
    assert!(matches!(shorter, BackendError::PassedLength { found: MEMORY, .. }), "{shorter}");
    for private in [
        refused(&|config| config.memory_backend.as_mut().unwrap().share = false),
        refused(&|config| config.memory_backend = None),
        refused(&|config| config.files.share_aux = false),
    ] {
        assert!(matches!(private, BackendError::Private), "{private}");
    }
}

fn unix(kind: &str, path: String) -> Value {
    json!({ "channel-type": kind, "addr": { "transport": "socket", "type": "unix", "path": path } })
}

/// Before the guest is stopped nothing takes it away.
fn keeps_its_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let Guest { machine, console } = guest(None);
    let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), false);
    let _server = Server::start(&folder.path().join("q"), vmm.clone()).unwrap();
    let mut client = Client::connect(&folder.path().join("q"), PATIENCE).unwrap();
    client.execute("cont", json!({})).unwrap();
    let channels = json!({ "channels": [unix("main", path("main")), unix("cpr", path("cpr"))] });
    client.execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" })).unwrap();
    let main = json!({ "channels": [unix("main", path("main"))] });
    // QEMU's words.
    assert_eq!(refused(&mut client, "migrate", main), "missing 'cpr' migration channel");
    assert!(refused(&mut client, "migrate", channels.clone()).contains("No such file or directory"));

    let listener = UnixListener::bind(path("cpr")).unwrap();
    // The destination ends when it was passed the memory.
    client.execute("migrate", channels.clone()).unwrap();
    drop(listener.accept().unwrap());
    assert_eq!(finished(&mut client)["status"], "failed");
    // It does nothing, and the operator cancels.
    client.execute("migrate", channels.clone()).unwrap();
    let waiting = listener.accept().unwrap();
    assert_eq!(client.execute("query-migrate", json!({})).unwrap()["status"], "setup");
    client.execute("migrate_cancel", json!({})).unwrap();
    assert_eq!(finished(&mut client)["status"], "cancelled");
    drop(waiting);
    // It does nothing for too long.
    client.execute("migrate-set-parameters", json!({ "x-idle-timeout": 100 })).unwrap();
    client.execute("migrate", channels).unwrap();
    let waiting = listener.accept().unwrap();
    let migration = finished(&mut client);
    assert!(migration["error-desc"].as_str().unwrap().contains("x-idle-timeout"), "{migration}");
    drop(waiting);
    let status = client.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running");
    let lines = console.lines().len();
    console.wait_for("progress", |now| (now.len() > lines + 1).then_some(()));
    client.execute("quit", json!({})).unwrap();
}

/// Its memory is in use, by one guest alone.
fn leaves_it_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let from = guest(None);
    let profile = Profile::new(QemuVersion::NEWEST, "microvm");
    let vmm = Vmm::new(from.machine, profile.clone(), false);
    let _server = Server::start(&folder.path().join("q"), vmm.clone()).unwrap();
    let mut client = Client::connect(&folder.path().join("q"), PATIENCE).unwrap();
    client.execute("cont", json!({})).unwrap();
    from.console.wait_for("progress", |now| (now.len() > 1).then_some(()));
    client.execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" })).unwrap();
    let bind = |name: &str| Listener::bind(&format!("unix:{}", path(name)).parse().unwrap()).unwrap();
    let (cpr, main) = (bind("cpr"), bind("main"));
    let to = thread::scope(|scope| {
        let arriving = scope.spawn(|| {
            let mut predecessor = Predecessor::wait(&cpr, &Timeouts::default(), &|| true).unwrap();
            let files = predecessor.take().into_iter();
            let to = guest(Some(files.map(|Passed { name, descriptor, .. }| (name, descriptor.into())).collect()));
            drop(predecessor);
            let incoming = Job::default();
            let mut parameters = Parameters::default();
            parameters.mode = Mode::CprTransfer;
            incoming.set_parameters(parameters);
            incoming.begin().unwrap();
            let channel = main.accept().unwrap();
            receive(&to.machine, channel.clone().into(), &incoming, &profile).unwrap();
            to.machine.resume().unwrap();
            channel.close();
            to
        });
        let channels = json!({ "channels": [unix("main", path("main")), unix("cpr", path("cpr"))] });
        client.execute("migrate", channels).unwrap();
        arriving.join().unwrap()
    });
    assert_eq!(finished(&mut client)["status"], "completed");
    let why = refused(&mut client, "cont", json!({}));
    assert!(why.contains("runs in another process"), "{why}");
    client.execute("system_reset", json!({})).unwrap();
    // It is done by another thread.
    thread::sleep(std::time::Duration::from_millis(200));
    let status = client.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "postmigrate");
    to.assert_healthy();
    client.execute("quit", json!({})).unwrap();
}
