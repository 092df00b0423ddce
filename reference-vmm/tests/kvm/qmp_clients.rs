//! Clients that do not behave cannot keep the monitor from others.

use crate::Test;
use crate::qmp::{PATIENCE, refused, serve};
use reference_vmm::qmp::Client;
use serde_json::json;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

pub(crate) const TESTS: &[Test] = &[
    ("qmp_drops_a_client_that_does_not_read", drops_a_client_that_does_not_read),
    ("qmp_answers_a_broken_line_of_3_mib_once", answers_a_broken_line_once),
    ("qmp_keeps_what_a_client_has_handed_over", keeps_what_a_client_has_handed_over),
];

fn drops_a_client_that_does_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, client, _console) = serve(directory.path(), "q", false);
    drop(client);
    let path = directory.path().join("q");
    let mut hung = UnixStream::connect(&path).unwrap();
    hung.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    // Until neither side takes anything.
    hung.set_write_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    let flooded = loop {
        if let Err(error) = hung.write_all(&b"{\"execute\": \"query-commands\"}\n".repeat(100)) {
            break error;
        }
    };
    assert!(matches!(flooded.kind(), ErrorKind::WouldBlock | ErrorKind::BrokenPipe), "{flooded}");
    let mut next = Client::connect(&path, PATIENCE).unwrap();
    assert_eq!(next.execute("query-status", json!({})).unwrap()["status"], "prelaunch");
}

/// As QEMU 11.1: an error for the line, however it is read, and the next request is answered.
fn answers_a_broken_line_once() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, client, _console) = serve(directory.path(), "q", false);
    drop(client);
    let mut stream = UnixStream::connect(directory.path().join("q")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    stream.write_all(&vec![b'a'; 3 << 20]).expect("it is read whether or not the error is");
    stream.write_all(b"\n{\"execute\": \"quit\"}\n").unwrap();
    let mut text = String::new();
    while text.lines().count() < 4 || !text.ends_with('\n') {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "{text}");
        text += std::str::from_utf8(&piece[..count]).unwrap();
    }
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].contains("QMP") && lines[1] == "{\"return\":{}}" && lines[3] == lines[1], "{text}");
    assert!(lines[2].contains("JSON parse error"), "{text}");
}

/// As QEMU 11.1: what `getfd` and `add-fd` have taken stays when the client leaves, and what no command has taken is
/// closed.
fn keeps_what_a_client_has_handed_over() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, mut client, _console) = serve(directory.path(), "q", false);
    let file = File::open("/dev/null").unwrap();
    client.execute_with("getfd", json!({ "fdname": "kept" }), &file).unwrap();
    client.execute_with("add-fd", json!({}), &file).unwrap();
    client.execute_with("query-status", json!({}), &file).unwrap();
    drop(client);
    let mut next = Client::connect(&directory.path().join("q"), PATIENCE).unwrap();
    let nothing = refused(&mut next, "getfd", json!({ "fdname": "more" }));
    assert_eq!(nothing, "No file descriptor supplied via SCM_RIGHTS");
    assert_eq!(next.execute("query-fdsets", json!({})).unwrap().as_array().map(Vec::len), Some(1));
    next.execute("closefd", json!({ "fdname": "kept" })).unwrap();
}
