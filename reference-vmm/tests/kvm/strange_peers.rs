//! A source and what may be at the other end of its connection, which is a real socket or pipe.

use crate::Test;
use crate::guest::{Console, PATIENCE};
use crate::qmp::{finished, refused, serve};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use parking_lot::Mutex;
use reference_vmm::qmp::{Client, Server};
use reference_vmm::vmm::Vmm;
use serde_json::{Value, json};
use std::io::{self, PipeReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("source_keeps_a_guest_that_a_silent_peer_was_sent", keeps_a_guest_that_a_silent_peer_was_sent),
    ("source_refuses_answers_that_were_not_asked_for", refuses_answers_that_were_not_asked_for),
    ("source_keeps_the_end_back_until_everything_is_loaded", keeps_the_end_back_until_everything_is_loaded),
    ("source_does_not_resume_a_guest_that_may_run_elsewhere", does_not_resume_a_guest_that_may_run_elsewhere),
    ("source_resumes_when_the_destination_says_that_it_failed", resumes_when_the_destination_says_that_it_failed),
    ("source_waits_until_a_pipe_was_read_to_its_end", waits_until_a_pipe_was_read_to_its_end),
    ("source_counts_time_while_its_link_is_silent", counts_time_while_its_link_is_silent),
    ("source_is_cancelled_while_it_connects", is_cancelled_while_it_connects),
    ("source_tells_no_pass_behind_stop", tells_no_pass_behind_stop),
];

/// What a destination says to a PING, given its value and how many came before.
type Answers = fn(u32, usize) -> Vec<u8>;

/// Values of the PINGs of a source, in their order.
const PINGS: [u32; 3] = [1, 0x5145_4801, 0x5145_4804];
const SHUT: u16 = 1;
const PONG: u16 = 2;

fn message(kind: u16, value: u32) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &4_u16.to_be_bytes(), &value.to_be_bytes()].concat()
}

fn pong(value: u32, _: usize) -> Vec<u8> {
    message(PONG, value)
}

/// A listener at an address that takes a stream in.
struct Peer {
    uri: String,
    seen: Arc<Mutex<Seen>>,
    /// Makes it reset the connection.
    reset: Arc<AtomicBool>,
}

#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    /// Up to where there are no further PINGs.
    looked_at: usize,
    pings: Vec<u32>,
    /// The source has closed.
    ended: bool,
}

impl Peer {
    fn start(answers: Answers) -> Peer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let (seen, reset) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let (noted, told) = (seen.clone(), reset.clone());
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
            let mut chunk = vec![0; 1 << 16];
            while !told.load(Ordering::SeqCst) {
                let count = match stream.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(_) => break,
                };
                let mut seen = noted.lock();
                seen.bytes.extend_from_slice(&chunk[..count]);
                let new = seen.new_pings();
                let before = seen.pings.len();
                seen.pings.extend(&new);
                drop(seen);
                for (i, value) in new.into_iter().enumerate() {
                    // The source may have gone.
                    let _ = stream.write_all(&answers(value, before + i));
                }
            }
            if told.load(Ordering::SeqCst) {
                // As a host that has restarted, or a process that has not read everything.
                setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
            }
            drop(stream);
            noted.lock().ended = true;
        });
        Peer { uri, seen, reset }
    }

    /// Resets the connection.
    fn reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        self.wait("the connection is not closed", |seen| seen.ended);
    }

    fn wait(&self, what: &str, mut reached: impl FnMut(&Seen) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !reached(&self.seen.lock()) {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the last byte of the stream proper came, after the last device and the last PING.
    fn has_the_end(&self) -> bool {
        let seen = self.seen.lock();
        let last = command(PINGS[2]);
        let at = seen.bytes.windows(last.len()).position(|window| *window == last);
        at.is_some_and(|at| seen.bytes.len() > at + last.len())
    }
}

impl Seen {
    /// PINGs beyond those that are known.
    fn new_pings(&mut self) -> Vec<u32> {
        let mut new = Vec::new();
        while let Some(value) = PINGS.get(self.pings.len() + new.len()) {
            let wanted = command(*value);
            let Some(at) = self.bytes[self.looked_at..].windows(wanted.len()).position(|window| *window == wanted)
            else {
                self.looked_at = self.bytes.len().saturating_sub(wanted.len() - 1).max(self.looked_at);
                break;
            };
            self.looked_at += at + wanted.len();
            new.push(*value);
        }
        new
    }
}

/// A PING as it stands in the stream.
fn command(value: u32) -> [u8; 9] {
    let [a, b, c, d] = value.to_be_bytes();
    [8, 0, 2, 0, 4, a, b, c, d]
}

/// A machine whose guest runs, and a client of it.
struct Source {
    client: Client,
    console: Console,
    _vmm: Arc<Vmm>,
    _server: Server,
    _directory: tempfile::TempDir,
}

impl Source {
    fn start() -> Source {
        let directory = tempfile::tempdir().unwrap();
        let (vmm, server, mut client, console) = serve(directory.path(), "source", false);
        client.execute("cont", json!({})).unwrap();
        console.wait_for_line("qevm-payload pass=");
        // However slowly the peer takes it in, the guest is stopped.
        let parameters = json!({ "max-bandwidth": 0, "downtime-limit": 2_000_000 });
        client.execute("migrate-set-parameters", parameters).unwrap();
        Source { client, console, _vmm: vmm, _server: server, _directory: directory }
    }

    fn migrate(&mut self, peer: &Peer) {
        self.client.execute("migrate", json!({ "uri": peer.uri })).unwrap();
    }

    fn run_state(&mut self) -> String {
        let status = self.client.execute("query-status", json!({})).unwrap();
        status["status"].as_str().unwrap().into()
    }

    fn migration(&mut self) -> Value {
        self.client.execute("query-migrate", json!({})).unwrap()
    }

    fn wait_for(&mut self, wanted: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let migration = self.migration();
            if migration["status"] == wanted {
                return migration;
            }
            assert!(Instant::now() < deadline, "{migration}, {wanted} wanted");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The migration has failed, and the guest goes on here.
    fn goes_on(&mut self) -> String {
        let migration = finished(&mut self.client);
        assert_eq!(migration["status"], "failed", "{migration}");
        assert_eq!(self.run_state(), "running", "{migration}");
        let lines = self.console.lines().len();
        let deadline = Instant::now() + PATIENCE;
        while self.console.lines().len() == lines {
            assert!(Instant::now() < deadline, "the guest prints nothing");
            thread::sleep(Duration::from_millis(5));
        }
        migration["error-desc"].as_str().unwrap().into()
    }
}

/// Without a word from the destination nothing says that the guest is anywhere but here. Its user has asked for
/// nothing: the capabilities are the default ones.
fn keeps_a_guest_that_a_silent_peer_was_sent() {
    let mut source = Source::start();
    let peer = Peer::start(|_, _| Vec::new());
    source.migrate(&peer);
    peer.wait("the return path is not opened", |seen| seen.pings.len() == 2);
    let capabilities = source.client.execute("query-migrate-capabilities", json!({})).unwrap();
    assert!(capabilities.as_array().unwrap().contains(&json!({ "capability": "return-path", "state": false })));
    // It is not even stopped.
    assert_eq!(source.wait_for("active")["status"], "active");
    assert_eq!(source.run_state(), "running");
    peer.reset();
    source.goes_on();
}

fn refuses_answers_that_were_not_asked_for() {
    let cases: [(Answers, &str); 5] = [
        (|_, n| if n == 0 { message(PONG, 7) } else { Vec::new() }, "PONG 0x7 answers no PING"),
        (|value, _| [pong(value, 0), pong(value, 0)].concat(), "PONG 0x1 answers no PING"),
        (|_, _| message(SHUT, 0), "SHUT 0"),
        (|_, _| vec![0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0], "pages are requested"),
        (|_, _| message(6, 1), "RESUME_ACK"),
    ];
    let mut source = Source::start();
    for (answers, expected) in cases {
        let peer = Peer::start(answers);
        source.migrate(&peer);
        let why = source.goes_on();
        assert!(why.contains(expected), "{why}");
    }
}

/// A destination that has stopped before it has loaded everything may go on at any time, and must not find the end
/// then.
fn keeps_the_end_back_until_everything_is_loaded() {
    let mut source = Source::start();
    for cut in [false, true] {
        let peer = Peer::start(|value, _| if value == PINGS[2] { Vec::new() } else { pong(value, 0) });
        source.migrate(&peer);
        source.wait_for("device");
        peer.wait("the last question does not come", |seen| seen.pings.len() == 3);
        assert_eq!(source.run_state(), "finish-migrate");
        if cut {
            peer.reset();
            source.goes_on();
        } else {
            source.client.execute("migrate_cancel", json!({})).unwrap();
            source.wait_for("cancelled");
            assert_eq!(source.run_state(), "running");
            peer.wait("the source does not close", |seen| seen.ended);
        }
        assert!(!peer.has_the_end());
    }
}

/// As a QEMU whose answer is lost: it has everything, and runs the guest.
fn does_not_resume_a_guest_that_may_run_elsewhere() {
    for cancel in [false, true] {
        let mut source = Source::start();
        let peer = Peer::start(pong);
        source.migrate(&peer);
        source.wait_for("device");
        let deadline = Instant::now() + PATIENCE;
        while !peer.has_the_end() {
            assert!(Instant::now() < deadline, "the end does not come");
            thread::sleep(Duration::from_millis(2));
        }
        if cancel {
            source.client.execute("migrate_cancel", json!({})).unwrap();
        } else {
            peer.reset();
        }
        let migration = finished(&mut source.client);
        let why = migration["error-desc"].as_str().unwrap();
        assert!(why.contains("may run there") && why.contains("'cont'"), "{why}");
        assert_eq!(why.contains("cancelled"), cancel, "{why}");
        assert_eq!(source.run_state(), "postmigrate");
        // Nor does the next command make a second one of it…
        let again = refused(&mut source.client, "migrate", json!({ "uri": "exec:cat > /dev/null" }));
        assert_eq!(again, "Can't migrate the vm that was paused due to previous migration");
        assert_eq!(source.migration()["status"], "failed");
        // …until the operator, who has seen that it does not run there, says so.
        source.client.execute("cont", json!({})).unwrap();
        assert_eq!(source.run_state(), "running");
    }
}

fn resumes_when_the_destination_says_that_it_failed() {
    let mut source = Source::start();
    let peer =
        Peer::start(|value, n| if n == 2 { [pong(value, n), message(SHUT, 1)].concat() } else { pong(value, n) });
    source.migrate(&peer);
    let why = source.goes_on();
    assert!(why.contains("SHUT 1"), "{why}");
    // What has arrived is completed.
    let peer = Peer::start(pong);
    source.migrate(&peer);
    source.wait_for("device");
}

/// What lies in a pipe is at no destination.
fn waits_until_a_pipe_was_read_to_its_end() {
    for all in [false, true] {
        let mut source = Source::start();
        let (mut reader, writer) = io::pipe().unwrap();
        source.client.execute_with("getfd", json!({ "fdname": "pipe" }), &writer).unwrap();
        drop(writer);
        source.client.execute("migrate", json!({ "uri": "fd:pipe" })).unwrap();
        // All but what the pipe holds at the end.
        let mut chunk = vec![0; 4096];
        while source.migration()["status"] != "device" {
            let unread = read_some(&mut reader, &mut chunk);
            assert!(unread > 0, "the source has closed");
        }
        if all {
            while read_some(&mut reader, &mut chunk) > 0 {}
            source.wait_for("completed");
            assert_eq!(source.run_state(), "postmigrate");
        } else {
            drop(reader);
            source.goes_on();
        }
    }
}

fn read_some(reader: &mut PipeReader, chunk: &mut [u8]) -> usize {
    reader.read(chunk).unwrap()
}

/// An operator sees by it that nothing goes on.
fn counts_time_while_its_link_is_silent() {
    let mut source = Source::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    source.client.execute("migrate", json!({ "uri": uri })).unwrap();
    let (_silent, _) = listener.accept().unwrap();
    source.wait_for("active");
    let times: Vec<u64> = (0..4)
        .map(|_| {
            thread::sleep(Duration::from_millis(150));
            source.migration()["total-time"].as_u64().unwrap()
        })
        .collect();
    assert!(times.is_sorted_by(|a, b| b - a >= 100), "{times:?}");
    source.client.execute("migrate_cancel", json!({})).unwrap();
    source.wait_for("cancelled");
}

fn tells_no_pass_behind_stop() {
    let mut source = Source::start();
    let events = json!([{ "capability": "events", "state": true }]);
    source.client.execute("migrate-set-capabilities", json!({ "capabilities": events })).unwrap();
    source.client.events.clear();
    source.client.execute("migrate", json!({ "uri": "exec:cat > /dev/null" })).unwrap();
    assert_eq!(finished(&mut source.client)["status"], "completed");
    // The last of them may come after a reply that knows of it.
    let deadline = Instant::now() + PATIENCE;
    let told = loop {
        source.client.execute("query-status", json!({})).unwrap();
        let told = source.client.events.iter();
        let told = told.map(|event| (event["event"].as_str().unwrap(), &event["data"]["status"]));
        let told: Vec<_> = told.map(|(name, status)| status.as_str().unwrap_or(name).to_owned()).collect();
        if told.last().is_some_and(|last| last == "completed") {
            break told;
        }
        assert!(Instant::now() < deadline, "{told:?}");
        thread::sleep(Duration::from_millis(10));
    };
    let passes = told.iter().position(|name| name == "STOP").unwrap();
    assert!(told[..passes].contains(&"MIGRATION_PASS".into()), "{told:?}");
    // As QEMU 11.1 tells it.
    assert_eq!(told[passes..], ["STOP", "device", "completed"], "{told:?}");
}

/// A connection that the other end does not take up, as behind a firewall or at a host that hangs.
fn is_cancelled_while_it_connects() {
    let directory = tempfile::tempdir().unwrap();
    let (_vmm, _server, mut client, _console) = serve(directory.path(), "qmp", false);
    client.execute("cont", json!({})).unwrap();
    let path = directory.path().join("hangs");
    let listener = UnixListener::bind(&path).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _first_in_the_queue = UnixStream::connect(&path).unwrap();
    let hangs = json!({ "uri": format!("unix:{}", path.display()) });
    for _ in 0..2 {
        client.execute("migrate", hangs.clone()).unwrap();
        assert_eq!(client.execute("query-migrate", json!({})).unwrap()["status"], "setup");
        client.execute("migrate_cancel", json!({})).unwrap();
        assert_eq!(finished(&mut client)["status"], "cancelled");
        assert_eq!(client.execute("query-status", json!({})).unwrap()["status"], "running");
    }
    // The next one need not wait for those.
    let file = directory.path().join("guest");
    client.execute("migrate", json!({ "uri": format!("file:{}", file.display()) })).unwrap();
    assert_eq!(finished(&mut client)["status"], "completed");
}
