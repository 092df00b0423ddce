//! Running guests over descriptors, into files, and into files that are full.

use crate::Test;
use crate::guest::PATIENCE;
use crate::qmp::{finished, refused, serve, wait_for_event};
use reference_vmm::qmp::{Client, ClientError};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

pub(crate) const TESTS: &[Test] = &[
    ("transport_descriptors_are_named_and_used", descriptors),
    ("transport_a_full_disk_leaves_the_guest_running_and_a_file_takes_it", files),
    ("transport_guest_memory_is_its_owners_alone", owners_alone),
    ("transport_a_limit_on_files_is_no_end_of_the_guest", limited_files),
];

fn descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let (_source, _a, mut here, console) = serve(directory.path(), "here", false);
    let (_destination, _b, mut there, arrived) = serve(directory.path(), "there", true);
    here.execute("cont", json!({})).unwrap();
    console.wait_for_line("qevm-payload pass=");
    let name = |name: &str| json!({ "fdname": name });
    assert_eq!(refused(&mut here, "getfd", name("x")), "No file descriptor supplied via SCM_RIGHTS");
    assert_eq!(refused(&mut here, "closefd", name("x")), "File descriptor named 'x' not found");
    let (a, b) = UnixStream::pair().unwrap();
    let Err(ClientError::Refused { desc, .. }) = here.execute_with("getfd", name("1x"), &a) else { panic!() };
    assert_eq!(desc, "Parameter 'fdname' expects a name not starting with a digit");
    here.execute_with("getfd", name("closed"), &a).unwrap();
    here.execute("closefd", name("closed")).unwrap();
    assert_eq!(
        refused(&mut here, "migrate", json!({ "uri": "fd:closed" })),
        "File descriptor named 'closed' has not been found"
    );
    here.execute_with("getfd", name("away"), &a).unwrap();
    there.execute_with("getfd", name("back"), &b).unwrap();
    drop((a, b));
    there.execute("migrate-incoming", json!({ "uri": "fd:back" })).unwrap();
    here.execute("migrate", json!({ "uri": "fd:away" })).unwrap();
    assert_eq!(finished(&mut here)["status"], "completed");
    wait_for_event(&mut there, "RESUME");
    let line = arrived.wait_for_line("qevm-payload pass=");
    assert!(line.contains(" stale=0 "), "{line}");
}

fn files() {
    let directory = tempfile::tempdir().unwrap();
    let (_source, _a, mut here, console) = serve(directory.path(), "here", false);
    let (_destination, _b, mut there, arrived) = serve(directory.path(), "there", true);
    here.execute("cont", json!({})).unwrap();
    console.wait_for_line("qevm-payload pass=");
    let capabilities =
        json!([{ "capability": "mapped-ram", "state": true }, { "capability": "multifd", "state": true }]);
    for client in [&mut here, &mut there] {
        client.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
    }
    here.execute("migrate", json!({ "uri": "file:/dev/full" })).unwrap();
    let failed = finished(&mut here);
    assert!(failed["error-desc"].as_str().unwrap().contains("No space left on device"), "{failed}");
    assert_eq!(here.execute("query-status", json!({})).unwrap()["status"], "running");
    let uri = json!({ "uri": format!("file:{}", directory.path().join("guest").display()) });
    assert!(refused(&mut there, "migrate-incoming", uri.clone()).starts_with("Could not open '"));
    here.execute("migrate", uri.clone()).unwrap();
    assert_eq!(finished(&mut here)["status"], "completed");
    assert_eq!(here.execute("query-status", json!({})).unwrap()["status"], "postmigrate");
    // After an address that could not be opened, another try is free.
    there.execute("migrate-incoming", uri).unwrap();
    wait_for_event(&mut there, "RESUME");
    let line = arrived.wait_for_line("qevm-payload pass=");
    assert!(line.contains(" stale=0 "), "{line}");
}

/// A process that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn limited_files() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp");
    // 64 KiB, in the shell's blocks of 512 bytes: the records of pages that are zero alone are more, however little the
    // guest has written by then.
    let command = format!(
        "ulimit -f 128; exec {} run --memory 96M --qmp unix:{}",
        env!("CARGO_BIN_EXE_reference-vmm"),
        socket.display()
    );
    let process = Command::new("sh").args(["-c", &command]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _process = Ended(process.unwrap());
    let mut client = Client::connect(&socket, PATIENCE).unwrap();
    for mapped in [false, true] {
        let capabilities = json!([{ "capability": "mapped-ram", "state": mapped }]);
        client.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
        let uri = format!("file:{}", directory.path().join("guest").display());
        client.execute("migrate", json!({ "uri": uri })).unwrap();
        let failed = finished(&mut client);
        assert!(failed["error-desc"].as_str().unwrap().contains("File too large"), "{failed}");
        assert_eq!(client.execute("query-status", json!({})).unwrap()["status"], "running");
    }
}

/// Whatever the umask is: sockets, files and the memory of the process itself.
fn owners_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mode = |name: &str| fs::metadata(path(name)).unwrap().permissions().mode() & 0o777;
    let command = format!(
        "umask 0; exec {} run --memory 96M --qmp unix:{}",
        env!("CARGO_BIN_EXE_reference-vmm"),
        path("qmp").display()
    );
    let process = Command::new("sh").args(["-c", &command]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let process = Ended(process.unwrap());
    let mut client = Client::connect(&path("qmp"), PATIENCE).unwrap();
    assert_eq!(mode("qmp"), 0o600);
    match fs::read_to_string(format!("/proc/{}/smaps", process.0.id())) {
        Ok(maps) => {
            let flags = maps.split("VmFlags:").zip(maps.split("VmFlags:").skip(1)).filter_map(|(map, flags)| {
                let sized = |line: &str| line.starts_with("Size:") && line.contains(" 98304 kB");
                map.lines().any(sized).then(|| flags.lines().next().unwrap().to_owned())
            });
            let flags: Vec<String> = flags.collect();
            assert!(!flags.is_empty() && flags.iter().all(|flags| flags.contains(" dd")), "{flags:?}");
        }
        // Only root sees the memory of a process that is not dumpable.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}"),
    }

    fs::write(path("victim"), "precious").unwrap();
    symlink(path("victim"), path("link")).unwrap();
    for capabilities in [false, true] {
        let capabilities = json!([{ "capability": "mapped-ram", "state": capabilities }]);
        client.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
        let uri = json!({ "uri": format!("file:{}", path("link").display()) });
        let reason = match client.execute("migrate", uri) {
            Ok(_) => finished(&mut client)["error-desc"].to_string(),
            Err(error) => error.to_string(),
        };
        assert!(reason.contains("symbolic link"), "{reason}");
        assert_eq!(fs::read(path("victim")).unwrap(), b"precious");
    }
    client.execute("migrate", json!({ "uri": format!("file:{}", path("guest").display()) })).unwrap();
    assert_eq!(finished(&mut client)["status"], "completed");
    assert_eq!(mode("guest"), 0o600);
}
