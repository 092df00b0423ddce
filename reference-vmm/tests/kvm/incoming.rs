//! The destination as a process: who calls, what has to arrive, and who runs the guest in the end.

use crate::Test;
use crate::lifecycle::Monitor;
use crate::qmp::{PATIENCE, finished};
use qevm_savevm::framing::SectionKind;
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{Decode, Driver};
use reference_vmm::payload::Progress;
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("incoming_strangers_neither_end_nor_delay_the_wait", strangers),
    ("incoming_who_says_the_header_alone_is_no_source", header_alone),
    ("incoming_exit_on_error_false_waits_for_another_guest", exit_on_error),
    ("incoming_a_guest_arrives_only_if_all_of_it_came", all_of_it),
    ("incoming_a_guest_starts_only_when_its_source_knows", source_knows),
    ("incoming_is_completed_when_the_guest_runs", completed_when_it_runs),
];

const POLL: Duration = Duration::from_millis(5);

/// The port at which `monitor` waits.
fn port(monitor: &mut Monitor) -> u16 {
    let migration = monitor.execute("query-migrate", json!({}));
    migration["socket-address"][0]["port"].as_str().unwrap().parse().unwrap()
}

fn connect(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).unwrap()
}

fn send(port: u16, bytes: &[u8]) -> TcpStream {
    let mut stream = connect(port);
    stream.write_all(bytes).unwrap();
    stream
}

/// Waits until the migration to `monitor` has this status.
pub(crate) fn wait_for_status(monitor: &mut Monitor, wanted: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let migration = monitor.execute("query-migrate", json!({}));
        if migration["status"] == wanted {
            return migration;
        }
        assert!(Instant::now() < deadline, "{migration}, wanted {wanted}: {}", monitor.said());
        std::thread::sleep(POLL);
    }
}

/// Waits until it is in the log, which is written beside everything else.
fn says(monitor: &Monitor, text: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !monitor.said().contains(text) {
        assert!(Instant::now() < deadline, "no '{text}': {}", monitor.said());
        std::thread::sleep(POLL);
    }
}

fn waits(monitor: &mut Monitor) {
    assert_eq!(monitor.execute("query-migrate", json!({}))["status"], "setup", "{}", monitor.said());
    assert_eq!(monitor.status(), "inmigrate");
}

/// Waits for this many lines of progress from the guest, which has lost nothing.
fn runs(monitor: &Monitor) {
    monitor.wait_for("progress", |text| text.lines().filter_map(Progress::parse).count() >= 3);
    assert!(monitor.text().lines().filter_map(Progress::parse).all(|progress| progress.stale == 0));
}

/// A guest that was saved while it ran.
fn saved(directory: &Path) -> Vec<u8> {
    let mut source = Monitor::start(directory, "saved", "", &[]);
    runs(&source);
    let file = directory.join("guest");
    source.execute("migrate", json!({ "uri": format!("file:{}", file.display()) }));
    assert_eq!(finished(&mut source.qmp)["status"], "completed");
    fs::read(file).unwrap()
}

fn descriptors(monitor: &Monitor) -> usize {
    fs::read_dir(format!("/proc/{}/fd", monitor.child.id())).unwrap().count()
}

fn threads(monitor: &Monitor) -> usize {
    fs::read_dir(format!("/proc/{}/task", monitor.child.id())).unwrap().count()
}

fn strangers() {
    let directory = tempfile::tempdir().unwrap();
    let multifd = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    for (name, channels) in [("plain", false), ("multifd", true)] {
        // Fewer descriptors than callers.
        let mut there = Monitor::with_descriptors(200, directory.path(), name, &["--incoming", "defer"]);
        if channels {
            there.execute("migrate-set-capabilities", multifd.clone());
        }
        there.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
        let (port, before) = (port(&mut there), (descriptors(&there), threads(&there)));
        let callers: [&[u8]; 5] = [
            &[0x16, 3, 1, 2, 0, 1, 0, 1],
            b"GET / HTTP/1.1\r\n\r\n",
            &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0],
            b"LibvirtQemudSave\x02\0\0\0",
            b"what is this",
        ];
        let mut open: Vec<_> = callers.map(|bytes| send(port, bytes)).into();
        // Each of them is sent away.
        for stream in &mut open {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
        }
        let named = [
            "a TLS ClientHello",
            "an HTTP request",
            "a file compressed with gzip",
            "a libvirt save image",
            "(77 68 61 74 20 69 73 20)",
        ];
        for name in named {
            says(&there, name);
        }
        // A scan.
        (0..100).for_each(|_| drop(connect(port)));
        // Five thousand who say nothing, some hundred of whom stay.
        for number in 0..5000 {
            let stream = connect(port);
            match number % 10 {
                0 => open.push(stream),
                1 => drop(send(port, b"QEVM\0\0")),
                _ => {}
            }
        }
        waits(&mut there);
        assert!(descriptors(&there) <= before.0 + 200 / 4 + 1 + 2 * usize::from(channels));
        // The log may have one that counts lines.
        assert!(threads(&there) <= before.1 + 2);
        let lines = there.said().lines().filter(|line| line.contains("dropped a connection")).count();
        assert!(lines < 1000, "{lines} lines of the log for 5000 callers");
        // None of those who stay is in the source's way.
        let mut here = Monitor::start(directory.path(), &format!("{name}-source"), "", &[]);
        if channels {
            here.execute("migrate-set-capabilities", multifd.clone());
        }
        runs(&here);
        here.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }));
        assert_eq!(finished(&mut here.qmp)["status"], "completed");
        wait_for_status(&mut there, "completed");
        assert_eq!(there.status(), "running");
        runs(&there);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "no source is waited for any more");
    }
}

/// As a source that hangs, or a scanner that knows the format, by the first eight bytes.
fn header_alone() {
    const HEADER: &[u8] = b"QEVM\0\0\0\x03";
    let directory = tempfile::tempdir().unwrap();
    let mut there = Monitor::start(directory.path(), "there", "", &["--incoming", "tcp:127.0.0.1:0"]);
    let port = port(&mut there);
    // One hangs as long as the test takes, and one leaves.
    let _hangs = send(port, HEADER);
    drop(send(port, HEADER));
    says(&there, "it sent the start of a migration stream and was closed");
    waits(&mut there);
    let mut here = Monitor::start(directory.path(), "here", "", &[]);
    runs(&here);
    here.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }));
    assert_eq!(finished(&mut here.qmp)["status"], "completed");
    wait_for_status(&mut there, "completed");
    runs(&there);
}

fn exit_on_error() {
    let directory = tempfile::tempdir().unwrap();
    let stream = saved(directory.path());
    let mut there = Monitor::start(directory.path(), "there", "", &["--incoming", "defer"]);
    let anywhere = json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false });
    // A guest that stops half-way, and one that never is: the RAM is not empty any more when the last one comes.
    for broken in [[&stream[..stream.len() / 2], &[0; 64]].concat(), b"QEVM\0\0\0\x03\x77".to_vec()] {
        there.execute("migrate-incoming", anywhere.clone());
        let port = port(&mut there);
        // It may not be read to its end.
        let _ = connect(port).write_all(&broken);
        let failed = wait_for_status(&mut there, "failed");
        assert!(failed["error-desc"].as_str().is_some_and(|why| why.contains("at byte")), "{failed}");
        assert_eq!(there.status(), "inmigrate");
    }
    there.execute("migrate-incoming", anywhere);
    let port = port(&mut there);
    drop(send(port, &stream));
    wait_for_status(&mut there, "completed");
    assert_eq!(there.status(), "running");
    runs(&there);

    // Without it the monitor ends, as before.
    let mut ends = Monitor::start(directory.path(), "ends", "", &["--incoming", "tcp:127.0.0.1:0"]);
    let port = self::port(&mut ends);
    drop(send(port, b"QEVM\0\0\0\x03\x77"));
    let (_, status) = ends.end();
    assert_eq!(status.code(), Some(1));
    assert!(ends.said().contains("load of migration failed: "), "{}", ends.said());
}

/// Where the sections of a stream are: kind, name, instance, bytes from the type to after the footer.
fn sections(stream: &[u8]) -> Vec<(SectionKind, String, u32, Range<usize>)> {
    let mut driver = Driver::new(stream, Decoder::new(DecoderOptions::default()));
    let (mut found, mut start) = (Vec::new(), (SectionKind::Full, 0));
    loop {
        let at = (driver.decoder().offset() + driver.payload().remaining()) as usize;
        let closed = match driver.next().unwrap().expect("the end of the stream") {
            Event::Section { kind, .. } | Event::SectionPart { kind, .. } => {
                start = (kind, at);
                None
            }
            Event::SectionFooter { section_id, .. } => Some(section_id),
            Event::Eof => return found,
            _ => None,
        };
        if let Some(section_id) = closed {
            let header = driver.decoder().sections().get(section_id).unwrap();
            let (idstr, instance) = (header.idstr.to_string(), header.instance_id);
            found.push((start.0, idstr, instance, start.1..driver.decoder().offset() as usize));
        }
    }
}

fn all_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let stream = saved(directory.path());
    let sections = sections(&stream);
    let without = |left_out: &dyn Fn(SectionKind, &str) -> bool| {
        let (mut rest, mut from) = (Vec::new(), 0);
        for (_, _, _, range) in sections.iter().filter(|(kind, name, ..)| left_out(*kind, name)) {
            rest.extend_from_slice(&stream[from..range.start]);
            from = range.end;
        }
        assert!(from > 0, "nothing was left out");
        [&rest, &stream[from..]].concat()
    };
    let (_, _, _, twice) = sections.iter().find(|(_, name, ..)| name == "fw_cfg").unwrap();
    let again = [&stream[..twice.end], &stream[twice.start..]].concat();
    let cases = [
        (without(&|_, name| name == "ram"), "without START of section 'ram'"),
        (without(&|kind, name| name == "ram" && kind == SectionKind::End), "without END of section 'ram'"),
        (without(&|_, name| name == "timer"), "section 'timer' 0 did not arrive"),
        (without(&|_, name| name == "i8254"), "section 'i8254' 0 did not arrive"),
        (again, "section 'fw_cfg' 0 has come before"),
    ];
    let mut there = Monitor::start(directory.path(), "there", "", &["--incoming", "defer"]);
    for (damaged, why) in cases {
        there.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false }));
        let port = port(&mut there);
        let _ = connect(port).write_all(&damaged);
        let failed = wait_for_status(&mut there, "failed");
        assert!(failed["error-desc"].as_str().is_some_and(|said| said.contains(why)), "{failed}, not {why}");
        assert_eq!(there.status(), "inmigrate");
    }
    assert_eq!(there.text(), "", "the guest has run");
}

/// The stream of a source that asked for a return path.
fn with_return_path(stream: &[u8]) -> Vec<u8> {
    // Magic, version; type, length and text of the configuration section.
    let length = u32::from_be_bytes(stream[9..13].try_into().unwrap()) as usize;
    let (head, rest) = stream.split_at(13 + length);
    [head, &[8, 0, 1, 0, 0], rest].concat()
}

const SHUT_0: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

fn source_knows() {
    let directory = tempfile::tempdir().unwrap();
    let stream = with_return_path(&saved(directory.path()));
    let arriving = |name: &str| {
        let mut there = Monitor::start(directory.path(), name, "", &["--incoming", "tcp:127.0.0.1:0"]);
        let port = port(&mut there);
        (there, send(port, &stream))
    };
    // A source that takes the word, and closes.
    let (mut there, mut source) = arriving("told");
    let mut heard = Vec::new();
    source.set_read_timeout(Some(PATIENCE)).unwrap();
    source.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, SHUT_0);
    wait_for_status(&mut there, "completed");
    assert_eq!(there.status(), "running");
    runs(&there);

    // Sources that leave with the last byte: as one that was cancelled in `device`, and resumes its guest.
    for (name, reset) in [("closed", false), ("reset", true)] {
        let mut there = Monitor::start(directory.path(), name, "", &["--incoming", "tcp:127.0.0.1:0"]);
        let port = port(&mut there);
        let mut source = connect(port);
        if reset {
            // Closing throws away what has not come, which is the last byte at most.
            let (last, all) = stream.split_last().unwrap();
            source.write_all(all).unwrap();
            wait_for_status(&mut there, "active");
            std::thread::sleep(Duration::from_millis(200));
            rustix::net::sockopt::set_socket_linger(&source, Some(Duration::ZERO)).unwrap();
            source.write_all(&[*last]).unwrap();
        } else {
            source.write_all(&stream).unwrap();
        }
        drop(source);
        let failed = wait_for_status(&mut there, "failed");
        let why = failed["error-desc"].as_str().unwrap();
        if !(reset && why.contains("cannot receive")) {
            assert!(why.contains("the guest is here and paused") && why.contains("say 'cont' here"), "{why}");
            assert_eq!(there.execute("query-status", json!({})), json!({ "status": "paused", "running": false }));
            assert_eq!(there.text(), "", "the guest has run");
            says(&there, "say 'cont' here");
            // The operator has looked at the source.
            there.execute("cont", json!({}));
            assert_eq!(there.status(), "running");
            runs(&there);
        }
    }
}

fn completed_when_it_runs() {
    let directory = tempfile::tempdir().unwrap();
    let stream = saved(directory.path());
    for (name, options, resumes) in [("runs", &[][..], true), ("stays", &["-S"][..], false)] {
        let options = [&["--incoming", "defer"], options].concat();
        let mut there = Monitor::start(directory.path(), name, "", &options);
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        there.execute("migrate-set-capabilities", events);
        there.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
        let port = port(&mut there);
        drop(send(port, &stream));
        // As QEMU 11.1: RESUME, then that it is completed.
        let wanted = ["MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed"];
        let wanted: Vec<_> = wanted.into_iter().filter(|event| resumes || *event != "RESUME").collect();
        there.wait_for_events(&wanted);
        assert_eq!(there.status(), if resumes { "running" } else { "paused" });
    }
}
