//! Guests that come from a page server: `qevm serve` as a library, in this process.

use crate::Test;
use crate::incoming::wait_for_status;
use crate::lazy::{capabilities, runs};
use crate::lifecycle::Monitor;
use crate::qmp::{finished, refused};
use parking_lot::Mutex;
use qevm::serve::{Limits, Server};
use qevm::socket::{Address, Listener};
use qevm_inspect::bounds::Spool;
use qevm_inspect::rewrite::mapped_file::MappedFile;
use qevm_inspect::stream::Inputs;
use reference_vmm::payload::Progress;
use serde_json::{Value, json};
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("page_server_gives_guests_of_any_image", any_image),
    ("page_server_gives_ten_guests_at_once_what_they_touch", ten_guests),
    ("page_server_that_dies_or_cannot_read_stops_the_guest_with_the_reason", dies),
];

/// What a guest asks for at the least: the 200 pages that it has written, with the 64 KiB that each of them lies in.
const REQUESTS: u64 = 200 * 4096 / (64 << 10);

/// A page server until it is dropped.
struct Served {
    server: Arc<Server>,
    socket: PathBuf,
    uri: String,
    over: Arc<AtomicBool>,
}

impl Served {
    fn start(image: &Path) -> Served {
        let socket = image.with_extension("pages");
        let mut inputs = Inputs::of_file(image).unwrap();
        let file = MappedFile::index(&mut inputs, Spool::unlimited(), &mut |_| ()).unwrap();
        let limits = Limits { clients: 100, patience: Duration::from_secs(60) };
        let server = Server::new(file, image.display().to_string(), limits);
        let listener = Listener::bind(&Address::Unix(socket.clone())).unwrap();
        let (uri, over) = (listener.nbd_uri(), Arc::new(AtomicBool::new(false)));
        let (accepting, until) = (server.clone(), over.clone());
        thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                accepting.accept(&listener).unwrap();
                thread::sleep(Duration::from_millis(2));
            }
        });
        Served { server, socket, uri, over }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// A guest that has run, saved as a plain stream or with capability `mapped-ram`.
fn save(directory: &Path, mapped: bool) -> PathBuf {
    let path = directory.join(if mapped { "mapped" } else { "plain" });
    let mut here = Monitor::start(directory, &format!("here{mapped}"), "", &[]);
    runs(&here);
    if mapped {
        capabilities(&mut here, &["mapped-ram"]);
    }
    here.execute("migrate", json!({ "uri": format!("file:{}", path.display()) }));
    assert_eq!(finished(&mut here.qmp)["status"], "completed");
    path
}

fn any_image() {
    let directory = tempfile::tempdir().unwrap();
    let (plain, mapped) = (save(directory.path(), false), save(directory.path(), true));
    let packed = directory.path().join("packed");
    zstd::stream::copy_encode(File::open(&plain).unwrap(), File::create(&packed).unwrap(), 1).unwrap();
    for (n, image) in [plain, mapped, packed].into_iter().enumerate() {
        let served = Served::start(&image);
        // All of it, while the guest runs.
        let mut there = Monitor::start(directory.path(), &format!("ahead{n}"), "", &["--incoming", &served.uri]);
        let done = wait_for_status(&mut there, "completed");
        assert_eq!((&done["ram"]["remaining"], &done["blocked-reasons"]), (&0.into(), &Value::Null), "{done}");
        runs(&there);
        // Only what it touches.
        let options = ["--incoming", &served.uri, "--no-load-ahead"];
        let mut there = Monitor::start(directory.path(), &format!("touched{n}"), "", &options);
        wait_for_status(&mut there, "postcopy-active");
        runs(&there);
        let later = there.execute("query-migrate", json!({}));
        let reason = format!("guest memory is still being loaded from {}", served.uri);
        assert_eq!((&later["status"], &later["blocked-reasons"]), (&json!("postcopy-active"), &json!([reason])));
        assert!(later["ram"]["postcopy-requests"].as_u64() >= Some(REQUESTS), "{later}");
        // Before it starts, with all of its memory.
        let mut there = Monitor::start(directory.path(), &format!("full{n}"), "", &["--incoming", "defer"]);
        let without = refused(&mut there.qmp, "migrate-incoming", json!({ "uri": "nbd+unix:///x" }));
        assert_eq!(
            without,
            "'nbd+unix:///x' is not nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH: expected '?socket=' and a path"
        );
        capabilities(&mut there, &["mapped-ram"]);
        there.execute("migrate-incoming", json!({ "uri": served.uri }));
        wait_for_status(&mut there, "completed");
        runs(&there);
        let why = refused(&mut there.qmp, "migrate", json!({ "uri": served.uri }));
        assert!(why.contains("none goes to one"), "{why}");
    }
}

fn ten_guests() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(&save(directory.path(), false));
    let options = ["--incoming", &served.uri, "--no-load-ahead"];
    let start = |n| Monitor::start(directory.path(), &format!("guest{n}"), "", &options);
    let mut guests: Vec<Monitor> = (0..10).map(start).collect();
    for guest in &mut guests {
        wait_for_status(guest, "postcopy-active");
    }
    guests.iter().for_each(runs);
    let mut requests = 0;
    for guest in &mut guests {
        let now = guest.execute("query-migrate", json!({}));
        requests += now["ram"]["postcopy-requests"].as_u64().unwrap();
        assert_eq!(guest.status(), "running");
    }
    assert!(requests >= 10 * REQUESTS, "{requests}");
    let totals = served.server.totals();
    assert_eq!(totals.clients.load(Ordering::Relaxed), 20);
    // Of its 32 MiB, none has needed more than a part; pages of zeroes are not read at all.
    let (reads, bytes) = (totals.reads.load(Ordering::Relaxed), totals.bytes.load(Ordering::Relaxed));
    assert!(reads >= 10 * REQUESTS && bytes < 10 * (8 << 20), "{reads} reads, {bytes} bytes");
}

/// Passes on what clients and a server say, until it is cut.
struct Relay(Arc<Mutex<Vec<UnixStream>>>);

impl Relay {
    fn start(path: &Path, server: &Path) -> Relay {
        let (listener, streams) = (UnixListener::bind(path).unwrap(), Arc::new(Mutex::new(Vec::new())));
        let (kept, server) = (streams.clone(), server.to_owned());
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), UnixStream::connect(&server).unwrap());
                for (mut from, mut to) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server.try_clone().unwrap(), client.try_clone().unwrap()),
                ] {
                    // It ends when it is cut.
                    thread::spawn(move || io::copy(&mut from, &mut to));
                }
                kept.lock().extend([client, server]);
            }
        });
        Relay(streams)
    }

    fn cut(&self) {
        // Those that are closed already need not be.
        self.0.lock().iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

fn dies() {
    let directory = tempfile::tempdir().unwrap();
    let image = save(directory.path(), false);
    let served = Served::start(&image);
    for (name, words) in [("dies", "the page server"), ("cut", "truncated at byte")] {
        let relayed = directory.path().join(name);
        let relay = Relay::start(&relayed, &served.socket);
        let uri = format!("nbd+unix:///?socket={}", relayed.display());
        let options = ["--incoming", &uri, "--no-load-ahead", "-S"];
        let mut there = Monitor::start(directory.path(), &format!("guest-{name}"), "", &options);
        wait_for_status(&mut there, "postcopy-active");
        match name {
            "dies" => relay.cut(),
            _ => File::options().write(true).open(&image).unwrap().set_len(0x1000).unwrap(),
        }
        there.execute("cont", json!({}));
        let (_, status) = there.end();
        assert_eq!(status.code(), Some(1));
        let last = there.said().lines().next_back().unwrap_or_default().to_owned();
        assert!(last.contains("load of migration failed") && last.contains(words), "{last}");
        assert!(last.contains("RAM block 'microvm.ram'"), "{last}");
        let stale = there.text().lines().filter_map(Progress::parse).map(|progress| progress.stale).sum::<u64>();
        assert_eq!(stale, 0, "{}", there.text());
    }
}
