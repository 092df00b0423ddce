//! Dirty rings: their sizes, what they tell of each vCPU, and limits of dirty rates. That they lose no page is for
//! `dirty_log`'s tests with `QEVM_DIRTY_RING_SIZE`, in a machine whose KVM has rings that work (`make lab`).

use crate::Test;
use crate::guest::{Console, Guest};
use reference_vmm::Error;
use reference_vmm::machine::{Machine, MachineConfig};
use reference_vmm::qmp::{Client, ClientError, Server};
use reference_vmm::vmm::Vmm;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("dirty_ring_sizes_are_refused_in_qemus_words", sizes),
    ("dirty_ring_tells_what_each_vcpu_writes", tells_what_each_vcpu_writes),
    ("dirty_limit_holds_for_one_vcpu_and_is_taken_back", limit_holds),
    ("dirty_limit_holds_on_a_host_of_any_speed", lowest_limit_holds),
    ("dirty_limit_lets_a_fast_guest_migrate", limit_lets_a_fast_guest_migrate),
    ("dirty_limit_holds_up_no_command", limit_holds_up_no_command),
];

const MEMORY: u64 = 64 << 20;
const RING: u32 = 1024;
const PATIENCE: Duration = Duration::from_secs(90);
/// As fast as it can.
const FAST: &str = "dirty=16M hold=1M zero=1M report=50";

fn sizes() {
    let refused = |dirty_ring_size| match Machine::new(MachineConfig { dirty_ring_size, ..MachineConfig::default() }) {
        Err(Error::Config(why)) => why,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("{dirty_ring_size} is a size"),
    };
    assert_eq!(refused(3), "dirty-ring-size must be a power of two.");
    assert!(
        refused(1 << 30).starts_with("KVM dirty ring size 1073741824 too big (maximum is "),
        "{}",
        refused(1 << 30)
    );
    assert!(refused(1).ends_with("Suggested minimum value is 1024."), "{}", refused(1));
    for size in [0, RING, 4096] {
        assert_eq!(Guest::with_rings(MEMORY, 2, FAST, size).machine.dirty_log().ring_size(), size);
    }
}

fn tells_what_each_vcpu_writes() {
    let guest = Guest::with_rings(MEMORY, 2, FAST, RING);
    let log = guest.machine.dirty_log();
    assert_eq!(log.written_in(Duration::from_millis(50)).unwrap(), [0, 0]);
    guest.machine.resume().unwrap();
    guest.wait_until(|progress| progress.pass > 0);
    // However long a busy machine lets one of them wait.
    wait("a vCPU is not seen writing", || {
        log.written_in(Duration::from_millis(500)).unwrap().iter().all(|pages| *pages > 100)
    });
    assert!(!log.is_enabled(), "counting is not logging");
    guest.assert_healthy();
    assert!(matches!(Guest::with_rings(MEMORY, 1, FAST, 0).machine.dirty_log().watch().err(), Some(Error::Config(_))));
}

/// MiB per second of each vCPU.
fn rates(guest: &Guest) -> Vec<u64> {
    let time = Duration::from_millis(500);
    let written = guest.machine.dirty_log().written_in(time).unwrap();
    written.iter().map(|pages| (pages * 4096 * 2) >> 20).collect()
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn limit_holds() {
    let guest = Guest::with_rings(MEMORY, 2, FAST, RING);
    guest.machine.resume().unwrap();
    guest.wait_until(|progress| progress.pass > 0);
    let before = rates(&guest)[1];
    let limit = (before / 8).max(1);
    guest.machine.set_dirty_limit_period(Duration::from_millis(300));
    guest.machine.limit_dirty_rate(Some(1), Some(limit)).unwrap();
    wait("the limit is not kept", || {
        let limits = guest.machine.dirty_limits();
        let [kept] = limits[..] else { panic!("{limits:?}") };
        assert_eq!((kept.vcpu, kept.limit), (1, limit));
        kept.rate > 0 && kept.rate <= limit * 3 / 2 + 1 && !kept.pause.is_zero()
    });
    let during = rates(&guest);
    assert!(during[1] < before / 2, "{before} MiB/s before, {during:?} under a limit of {limit}");
    guest.machine.limit_dirty_rate(None, None).unwrap();
    assert_eq!(guest.machine.dirty_limits(), []);
    wait("the vCPU stays slow", || rates(&guest)[1] > before / 2);
    guest.assert_healthy();
    assert!(matches!(guest.machine.limit_dirty_rate(Some(2), Some(1)), Err(Error::Config(_))));
}

/// The lowest limit there is, on a vCPU that writes as fast as it can, however fast that is.
fn lowest_limit_holds() {
    let guest = Guest::with_rings(MEMORY, 1, FAST, RING);
    guest.machine.resume().unwrap();
    guest.wait_until(|progress| progress.pass > 0);
    let period = Duration::from_millis(200);
    guest.machine.set_dirty_limit_period(period);
    guest.machine.limit_dirty_rate(None, Some(1)).unwrap();
    let log = guest.machine.dirty_log();
    let watch = log.watch().unwrap();
    let mib = || watch.written().unwrap()[0] as f64 / 256.0;
    let (start, before) = (Instant::now(), mib());
    std::thread::sleep(Duration::from_secs(6));
    let (written, time) = (mib() - before, start.elapsed().as_secs_f64());
    // A full ring at the start, which the limit found there, and one at the end, which the vCPU will pay for.
    let allowed = time + period.as_secs_f64() + 2.0 * f64::from(RING) / 256.0;
    assert!((1.0..allowed).contains(&written), "{written} MiB in {time} s under a limit of 1 MiB/s");
    wait("its rate is not told", || {
        let limits = guest.machine.dirty_limits();
        matches!(limits[..], [kept] if kept.rate == 1 && kept.pause > kept.ring_full && !kept.ring_full.is_zero())
    });
}

fn execute(client: &mut Client, command: &str, arguments: Value) -> Value {
    client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
}

/// A machine with a QMP socket in the directory.
struct Served {
    _vmm: Arc<Vmm>,
    _server: Server,
    client: Client,
    console: Console,
}

impl Served {
    fn new(directory: &Path, name: &str, incoming: bool) -> Served {
        let Guest { machine, console } = Guest::with_rings(MEMORY, 1, FAST, RING);
        let vmm = Vmm::new(machine, qevm_wire::Profile::new(qevm_wire::QemuVersion::NEWEST, "microvm"), incoming);
        let path = directory.join(name);
        let server = Server::start(&path, vmm.clone()).unwrap();
        Served { _vmm: vmm, _server: server, client: Client::connect(&path, PATIENCE).unwrap(), console }
    }
}

/// Whether a migration tells that it slows vCPUs down.
fn is_slowed(told: &Value) -> bool {
    told["dirty-limit-throttle-time-per-round"].as_u64() > Some(0)
        && told["dirty-limit-ring-full-time"].as_u64() > Some(0)
}

/// A guest that dirties memory faster than the link carries it comes to an end under `dirty-limit`.
fn limit_lets_a_fast_guest_migrate() {
    let directory = tempfile::tempdir().unwrap();
    let Served { client: mut here, console, _vmm: _here, _server } = Served::new(directory.path(), "here", false);
    let Served { client: mut there, _vmm: _there, _server, .. } = Served::new(directory.path(), "there", true);
    execute(&mut here, "cont", json!({}));
    console.wait_for_line("qevm-payload pass=");
    let both =
        json!([{ "capability": "dirty-limit", "state": true }, { "capability": "auto-converge", "state": true }]);
    let refused = here.execute("migrate-set-capabilities", json!({ "capabilities": both })).unwrap_err();
    let words = "dirty-limit conflicts with auto-converge either of then available currently";
    assert!(matches!(&refused, ClientError::Refused { desc, .. } if desc == words), "{refused}");
    let capabilities = json!([{ "capability": "dirty-limit", "state": true }]);
    execute(&mut here, "migrate-set-capabilities", json!({ "capabilities": capabilities }));
    let parameters = json!({
        "max-bandwidth": 8 << 20, "downtime-limit": 100, "vcpu-dirty-limit": 1, "x-vcpu-dirty-limit-period": 200,
        "throttle-trigger-threshold": 20,
    });
    execute(&mut here, "migrate-set-parameters", parameters);
    let address = format!("unix:{}", directory.path().join("stream").display());
    execute(&mut there, "migrate-incoming", json!({ "uri": address }));
    execute(&mut here, "migrate", json!({ "uri": address }));
    let mut slowed = false;
    wait("the guest does not come to an end", || {
        let told = execute(&mut here, "query-migrate", json!({}));
        assert_ne!(told["status"], "failed", "{told}");
        slowed |= is_slowed(&told);
        told["status"] == "completed"
    });
    assert!(slowed, "it migrated without being slowed down");
    assert_eq!(execute(&mut here, "query-vcpu-dirty-limit", json!({})), json!([]), "a limit outlives its migration");
    wait("the guest does not arrive", || execute(&mut there, "query-status", json!({}))["running"] == true);
}

/// Commands come to their end while a vCPU pauses for seconds.
fn limit_holds_up_no_command() {
    let directory = tempfile::tempdir().unwrap();
    let Served { mut client, console, _vmm, _server } = Served::new(directory.path(), "here", false);
    let Served { client: mut there, _vmm: _there, _server, .. } = Served::new(directory.path(), "there", true);
    execute(&mut client, "cont", json!({}));
    console.wait_for_line("qevm-payload pass=");
    let capabilities = json!([{ "capability": "dirty-limit", "state": true }]);
    execute(&mut client, "migrate-set-capabilities", json!({ "capabilities": capabilities }));
    // So slow a link never carries what the limit allows.
    let parameters = json!({ "max-bandwidth": 4 << 20, "downtime-limit": 1, "vcpu-dirty-limit": 1, "throttle-trigger-threshold": 1 });
    execute(&mut client, "migrate-set-parameters", parameters);
    let address = format!("unix:{}", directory.path().join("stream").display());
    execute(&mut there, "migrate-incoming", json!({ "uri": address }));
    execute(&mut client, "migrate", json!({ "uri": address }));
    wait("the vCPU is not slowed down", || {
        let told = execute(&mut client, "query-migrate", json!({}));
        assert!(told["status"] == "setup" || told["status"] == "active", "{told}");
        // It stays a link that is too slow.
        if is_slowed(&told) {
            execute(&mut client, "migrate-set-parameters", json!({ "max-bandwidth": 1 << 16 }));
        }
        is_slowed(&told)
    });
    execute(&mut client, "migrate_cancel", json!({}));
    wait("it is not cancelled", || execute(&mut client, "query-migrate", json!({}))["status"] == "cancelled");
    wait("the limit stays", || execute(&mut client, "query-vcpu-dirty-limit", json!({})) == json!([]));
    execute(&mut client, "set-vcpu-dirty-limit", json!({ "dirty-rate": 1 }));
    wait("the vCPU does not come to its limit", || {
        execute(&mut client, "query-vcpu-dirty-limit", json!({}))[0]["current-rate"] == 1
    });
    for _ in 0..3 {
        execute(&mut client, "stop", json!({}));
        assert_eq!(execute(&mut client, "query-status", json!({}))["running"], false);
        execute(&mut client, "cont", json!({}));
        assert_eq!(execute(&mut client, "query-status", json!({}))["running"], true);
    }
    execute(&mut client, "cancel-vcpu-dirty-limit", json!({}));
    assert_eq!(execute(&mut client, "query-vcpu-dirty-limit", json!({})), json!([]));
    execute(&mut client, "set-vcpu-dirty-limit", json!({ "dirty-rate": 1 }));
    execute(&mut client, "quit", json!({}));
}
