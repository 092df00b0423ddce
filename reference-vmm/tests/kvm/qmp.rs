//! QMP, and the demo that is driven by it.

use qevm_wire::{Profile, QemuVersion};
use reference_vmm::qmp::{Client, ClientError, Server};
use reference_vmm::vmm::Vmm;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Test;
use crate::guest::Guest;
pub(crate) use crate::guest::PATIENCE;

pub(crate) const TESTS: &[Test] = &[
    ("qmp_controls_a_guest", controls_a_guest),
    ("qmp_refuses_with_qemus_words", refuses_with_qemus_words),
    ("qmp_answers_quit_before_the_monitor_ends", answers_quit),
    ("qmp_migrates_a_guest", migrates_a_guest),
    ("qmp_refuses_to_migrate_a_guest_that_has_left", refuses_to_migrate_a_guest_that_has_left),
    ("qmp_measures_the_dirty_rate", measures_the_dirty_rate),
    ("qmp_names_what_blocks_a_migration", names_what_blocks_a_migration),
    ("auto_converge_slows_a_guest_down_until_it_migrates", auto_converge),
    ("demo_moves_the_guest", demo_moves_the_guest),
];

const MEMORY: u64 = 32 << 20;
const PAYLOAD: &str = "dirty=4M rate=8M hold=1M zero=1M verify=16384 report=20";

pub(crate) fn serve(
    directory: &Path,
    name: &str,
    incoming: bool,
) -> (std::sync::Arc<Vmm>, Server, Client, crate::guest::Console) {
    let Guest { machine, console } = Guest::new(MEMORY, 1, PAYLOAD);
    let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), incoming);
    let path = directory.join(name);
    let server = Server::start(&path, vmm.clone()).unwrap();
    let client = Client::connect(&path, PATIENCE).unwrap();
    (vmm, server, client, console)
}

pub(crate) fn refused(client: &mut Client, command: &str, arguments: Value) -> String {
    match client.execute(command, arguments).unwrap_err() {
        ClientError::Refused { desc, .. } => desc,
        other => panic!("{command}: {other}"),
    }
}

fn events(client: &mut Client) -> Vec<String> {
    // Events that are on their way come before the reply to a command.
    client.execute("query-status", json!({})).unwrap();
    client.events.drain(..).map(|event| event["event"].as_str().unwrap().to_owned()).collect()
}

pub(crate) fn wait_for_event(client: &mut Client, name: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !events(client).iter().any(|event| event == name) {
        assert!(Instant::now() < deadline, "no event {name}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn controls_a_guest() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, mut client, console) = serve(directory.path(), "q", false);
    let status = |client: &mut Client| client.execute("query-status", json!({})).unwrap();
    assert_eq!(status(&mut client), json!({ "status": "prelaunch", "running": false }));
    client.execute("cont", json!({})).unwrap();
    wait_for_event(&mut client, "RESUME");
    assert_eq!(status(&mut client), json!({ "status": "running", "running": true }));
    console.wait_for_line("qevm-payload pass=");
    client.execute("stop", json!({})).unwrap();
    wait_for_event(&mut client, "STOP");
    assert_eq!(status(&mut client), json!({ "status": "paused", "running": false }));
    let version = client.execute("query-version", json!({})).unwrap();
    assert_eq!(version["qemu"], json!({ "micro": 0, "minor": 1, "major": 11 }));
    let commands = client.execute("query-commands", json!({})).unwrap();
    assert!(commands.as_array().unwrap().contains(&json!({ "name": "migrate" })));
    client.execute("quit", json!({})).unwrap();
}

fn refuses_with_qemus_words() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, mut client, _) = serve(directory.path(), "q", false);
    let mut refused = |command, arguments| refused(&mut client, command, arguments);
    assert_eq!(refused("no-such", json!({})), "The command no-such has not been found");
    assert_eq!(refused("migrate", json!({})), "need either 'uri' or 'channels' argument");
    assert_eq!(refused("migrate", json!({ "uri": 1 })), "Invalid parameter type for 'uri', expected: string");
    assert_eq!(refused("stop", json!({ "x": 1 })), "Parameter 'x' is unexpected");
    assert_eq!(
        refused("migrate-set-parameters", json!({ "downtime-limit": 2_000_001 })),
        "Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms"
    );
    let capability = json!({ "capabilities": [{ "capability": "rdma-pin-all", "state": true }] });
    assert_eq!(refused("migrate-set-capabilities", capability), "capability 'rdma-pin-all' is not supported here");
    assert_eq!(
        refused("migrate-continue", json!({ "state": "pre-switchover" })),
        "Migration not in expected state: none"
    );
    assert_eq!(refused("qmp_capabilities", json!({})), "Capabilities negotiation is already complete, command ignored");
    let parameters = client.execute("query-migrate-parameters", json!({})).unwrap();
    assert_eq!((&parameters["max-bandwidth"], &parameters["downtime-limit"]), (&json!(134_217_728), &json!(300)));
    assert_eq!(client.execute("query-migrate", json!({})).unwrap(), json!({}));
}

/// A process that is told to end says so first. Many times, for the end could overtake the reply.
fn answers_quit() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..30 {
        let socket = directory.path().join(format!("q{round}"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_reference-vmm"));
        command.args(["run", "-S", "--memory", "16M", "--qmp", &format!("unix:{}", socket.display())]);
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let quit = Client::connect(&socket, PATIENCE).and_then(|mut client| client.execute("quit", json!({})));
        if quit.is_err() {
            // It may have ended.
            let _ = process.kill();
        }
        let status = process.wait().unwrap();
        assert_eq!(quit.unwrap_or_else(|error| panic!("round {round}: {error}")), json!({}));
        assert!(status.success(), "round {round}: {status}");
    }
}

/// What the source says when its migration has ended.
pub(crate) fn finished(client: &mut Client) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let migration = client.execute("query-migrate", json!({})).unwrap();
        match migration["status"].as_str() {
            Some("completed" | "failed" | "cancelled") => return migration,
            _ => assert!(Instant::now() < deadline, "{migration}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn migrates_a_guest() {
    let directory = tempfile::tempdir().unwrap();
    let (_source, _a, mut here, console) = serve(directory.path(), "here", false);
    let (_destination, _b, mut there, arrived) = serve(directory.path(), "there", true);
    here.execute("cont", json!({})).unwrap();
    console.wait_for_line("qevm-payload pass=");
    let events = json!([{ "capability": "events", "state": true }, { "capability": "return-path", "state": true }]);
    here.execute("migrate-set-capabilities", json!({ "capabilities": events })).unwrap();

    // Nothing listens there: the guest stays.
    here.execute("migrate", json!({ "uri": format!("unix:{}/nobody", directory.path().display()) })).unwrap();
    let failed = finished(&mut here);
    assert!(failed["error-desc"].as_str().unwrap().contains("cannot connect"), "{failed}");
    assert_eq!(here.execute("query-status", json!({})).unwrap()["status"], "running");

    let path = directory.path().join("migration").display().to_string();
    let addr = json!({ "transport": "socket", "type": "unix", "path": path });
    assert_eq!(there.execute("query-status", json!({})).unwrap()["status"], "inmigrate");
    there.execute("migrate-incoming", json!({ "uri": format!("unix:{path}") })).unwrap();
    here.events.clear();
    here.execute("migrate", json!({ "channels": [{ "channel-type": "main", "addr": addr }] })).unwrap();
    let migration = finished(&mut here);
    assert_eq!(migration["status"], "completed", "{migration}");
    assert!(migration["ram"]["transferred"].as_u64().unwrap() > 0);
    assert_eq!(migration["ram"]["remaining"], 0);
    assert!(migration.get("remaining").is_none(), "{migration}");
    wait_for_event(&mut there, "RESUME");
    assert_eq!(here.execute("query-status", json!({})).unwrap()["status"], "postmigrate");
    assert_eq!(there.execute("query-status", json!({})).unwrap()["status"], "running");
    // It says so when the guest runs.
    assert_eq!(finished(&mut there)["status"], "completed");
    let line = arrived.wait_for_line("qevm-payload pass=");
    assert!(line.contains(" stale=0 "), "{line}");
}

/// A client that repeats a command whose answer was lost must not make a second guest of the one that goes on
/// elsewhere.
fn refuses_to_migrate_a_guest_that_has_left() {
    let directory = tempfile::tempdir().unwrap();
    let (_source, _a, mut here, console) = serve(directory.path(), "here", false);
    let (_first, _b, mut first, _) = serve(directory.path(), "first", true);
    let (_second, _c, mut second, nothing) = serve(directory.path(), "second", true);
    here.execute("cont", json!({})).unwrap();
    console.wait_for_line("qevm-payload pass=");
    let uri = |name: &str| json!({ "uri": format!("unix:{}/{name}.in", directory.path().display()) });
    first.execute("migrate-incoming", uri("first")).unwrap();
    second.execute("migrate-incoming", uri("second")).unwrap();
    here.execute("migrate", uri("first")).unwrap();
    assert_eq!(finished(&mut here)["status"], "completed");

    for place in [uri("second"), uri("nobody"), json!({ "uri": "exec:cat > /dev/null" })] {
        let answer = refused(&mut here, "migrate", place);
        assert_eq!(answer, "Can't migrate the vm that was paused due to previous migration");
        assert_eq!(here.execute("query-migrate", json!({})).unwrap()["status"], "completed");
        assert_eq!(here.execute("query-status", json!({})).unwrap()["status"], "postmigrate");
    }
    wait_for_event(&mut first, "RESUME");
    assert_eq!(first.execute("query-status", json!({})).unwrap()["status"], "running");
    assert_eq!(second.execute("query-status", json!({})).unwrap()["status"], "inmigrate");
    assert!(nothing.lines().is_empty());
}

/// The payload dirties 8 MiB per second (and a few pages beside), or less where a busy machine lets it wait.
fn measures_the_dirty_rate() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, mut client, console) = serve(directory.path(), "q", false);
    client.execute("cont", json!({})).unwrap();
    console.wait_for_line("qevm-payload pass=");
    let tracking = if crate::guest::dirty_ring_size() > 0 { "dirty-ring" } else { "dirty-bitmap" };
    let deadline = Instant::now() + PATIENCE;
    let mut measure = |mode: &str| {
        client
            .execute("calc-dirty-rate", json!({ "calc-time": 300, "calc-time-unit": "millisecond", "mode": mode }))
            .unwrap();
        let report = loop {
            let report = client.execute("query-dirty-rate", json!({ "calc-time-unit": "millisecond" })).unwrap();
            match report["status"].as_str() {
                Some("measuring") => assert!(Instant::now() < deadline),
                _ => break report,
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!((&report["status"], &report["mode"]), (&json!("measured"), &json!(mode)), "{report}");
        assert_eq!(report["calc-time"], 300);
        report["dirty-rate"].as_u64().unwrap()
    };
    loop {
        let rate = measure(tracking);
        assert!(rate <= 30, "{rate}");
        // A guest that had no processor has not written.
        if rate >= 2 {
            break;
        }
        assert!(Instant::now() < deadline, "no measurement sees what the guest writes");
    }
    // Sampling counts a page once, however often it changes, and sees 16 pages of this small guest.
    let rate = measure("page-sampling");
    assert!(rate <= 120, "{rate}");
    // The longest that there is: it is under way however late the next command comes, and ends with the monitor.
    client.execute("calc-dirty-rate", json!({ "calc-time": 60, "mode": tracking })).unwrap();
    assert_eq!(
        refused(&mut client, "calc-dirty-rate", json!({ "calc-time": 1 })),
        "the dirty rate is already being measured."
    );
}

fn names_what_blocks_a_migration() {
    let directory = tempfile::tempdir().unwrap();
    let (vmm, _server, mut client, _) = serve(directory.path(), "q", false);
    vmm.block_migration("device 'd' cannot migrate");
    let uri = json!({ "uri": format!("unix:{}/nobody", directory.path().display()) });
    assert_eq!(refused(&mut client, "migrate", uri.clone()), "device 'd' cannot migrate");
    let blocked = json!({ "blocked-reasons": ["device 'd' cannot migrate"] });
    assert_eq!(client.execute("query-migrate", json!({})).unwrap(), blocked);
    vmm.unblock_migration("device 'd' cannot migrate");
    client.execute("migrate", uri).unwrap();
}

/// 8 MiB per second are dirtied, and 4 can be sent: without help this never ends. At first only 1 is sent, so that a
/// guest that a busy machine lets wait is too fast as well, until it is slowed down.
fn auto_converge() {
    let directory = tempfile::tempdir().unwrap();
    let (here_vmm, _a, mut here, console) = serve(directory.path(), "here", false);
    let (_there_vmm, _b, mut there, arrived) = serve(directory.path(), "there", true);
    here.execute("cont", json!({})).unwrap();
    console.wait_for_line("qevm-payload pass=");
    let capabilities = json!([{ "capability": "auto-converge", "state": true }]);
    here.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
    let parameters = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 20, "cpu-throttle-initial": 99 });
    here.execute("migrate-set-parameters", parameters).unwrap();
    let uri = json!({ "uri": format!("unix:{}/migration", directory.path().display()) });
    there.execute("migrate-incoming", uri.clone()).unwrap();
    here.execute("migrate", uri).unwrap();
    let (mut seen, deadline) = (None, Instant::now() + PATIENCE);
    loop {
        let migration = here.execute("query-migrate", json!({})).unwrap();
        if let Some(per_cent) = migration.get("cpu-throttle-percentage").and_then(Value::as_u64).filter(|it| *it > 0) {
            if seen.is_none() {
                here.execute("migrate-set-parameters", json!({ "max-bandwidth": 4 << 20 })).unwrap();
            }
            seen = Some(per_cent);
        }
        match migration["status"].as_str() {
            Some("completed") => break,
            _ => assert!(Instant::now() < deadline, "{migration}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(seen, Some(99));
    assert_eq!(here_vmm.machine().throttled(), 0);
    let line = arrived.wait_for_line("qevm-payload pass=");
    assert!(line.contains(" stale=0 "), "{line}");
}

fn demo_moves_the_guest() {
    let output = Command::new(env!("CARGO_BIN_EXE_reference-vmm"))
        .args(["demo", "--memory", "64M", "--dirty", "8M", "--rate", "8M", "--smp", "2", "--timeout", "300", "--json"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let object: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(output.status.success(), "{object}");
    assert_eq!((&object["result"], &object["stale_pages"]), (&json!("ok"), &json!(0)), "{object}");
    assert!(object["rounds"].as_u64().unwrap() >= 1 && object["bytes"].as_u64().unwrap() > 8 << 20, "{object}");
    assert!(object["downtime_ms"].as_f64().unwrap() > 0.0, "{object}");
    assert!(object["passes_after"].as_u64() > object["passes_before"].as_u64(), "{object}");
}
