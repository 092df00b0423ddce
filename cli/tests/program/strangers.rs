//! `qevm receive` among connections that are no migration: they are named and dropped, cost next to nothing, and
//! neither delay a migration nor end it.

use crate::receive::{LIMIT, receive, say, sources};
use crate::sample::{Background, Ran, qevm, stream};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// SHUT 0.
const SHUT_0: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
/// Inside of the memory of the recorded streams.
const HALF: usize = 40_000;

const TLS: &[u8] = b"\x16\x03\x01\0\xc8\x01\0\0\xc4\x03\x03";
const FOREIGN: [(&[u8], &str); 5] = [
    (TLS, "a TLS ClientHello"),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "an HTTP request"),
    (b"\x1f\x8b\x08\0xxxxxxxx", "a file compressed with gzip"),
    (b"LibvirtQemudSave\x02\0\0\0", "a libvirt save image"),
    (b"garbage", "bytes of no kind known here (67"),
];

/// Sends the second half of a stream and gives all answers, the connection still open.
fn finish(socket: &mut UnixStream, rest: &[u8]) -> Vec<u8> {
    socket.write_all(rest).unwrap();
    let mut answers = Vec::new();
    let mut piece = [0; 64];
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    while !answers.ends_with(&SHUT_0) {
        let count = socket.read(&mut piece).unwrap();
        assert!(count > 0, "the connection ends after {answers:x?}");
        answers.extend(&piece[..count]);
    }
    answers
}

fn is_closed(socket: &mut UnixStream) -> bool {
    socket.set_nonblocking(true).unwrap();
    !matches!(socket.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

fn wait_closed(socket: &mut UnixStream) {
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    loop {
        match socket.read(&mut [0]) {
            Ok(0) => return,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => panic!("it is not dropped: {other:?}"),
        }
    }
}

fn arrived(ran: &Ran) {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(report["handover"], "confirmed", "{report}");
    let mem = report["ram"].as_array().unwrap().iter().find(|block| block["name"] == "mem").unwrap();
    assert_eq!(mem["crc32"], "62d828c8", "{report}");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn strangers_are_dropped_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = receive(&dir, &[]);
    let mut silent = say(&dir, b"");
    let mut slow = say(&dir, b"QE");
    for (first, _) in FOREIGN {
        wait_closed(&mut say(&dir, first));
        drop(say(&dir, first));
    }
    wait_closed(&mut silent);
    wait_closed(&mut slow);
    let mut socket = say(&dir, &stream("7.2-return-path"));
    finish(&mut socket, &[]);
    drop(socket);
    let ran = receiver.end(LIMIT);
    arrived(&ran);
    for word in FOREIGN.iter().map(|(_, word)| *word).chain(["nothing (", "a few bytes (51 45"]) {
        assert!(
            ran.stderr.contains(&format!("dropped a connection from this host: {word}"))
                || word == "a libvirt save image"
        );
    }
}

#[test]
fn an_idle_wait_ends_and_says_what_had_come() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = receive(&dir, &["--timeout", "1"]);
    let _open = [say(&dir, TLS), say(&dir, FOREIGN[1].0), say(&dir, b""), say(&dir, b"")];
    let ran = receiver.end(LIMIT);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let last = ran.stderr.lines().last().unwrap();
    for word in ["no main channel came within 1 s", "TLS", "HTTP", "nothing (2 times)"] {
        assert!(last.contains(word), "{word}: {}", ran.stderr);
    }
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}

/// The guest is paused from the source's last byte to SHUT: no peer that says nothing, or the wrong thing, makes that
/// longer. All strangers here are still connected when SHUT comes.
#[test]
fn strangers_do_not_hold_the_handover_back() {
    let main = stream("7.2-return-path");
    for options in [&[][..], &["--multifd-channels", "0"], &["--timeout", "10"]] {
        let dir = tempfile::tempdir().unwrap();
        let receiver = receive(&dir, options);
        let _before = [say(&dir, b""), say(&dir, TLS)];
        let mut socket = say(&dir, &main[..HALF]);
        let _during = [say(&dir, b"garbage"), say(&dir, &main[..100])];
        let mut silent = [say(&dir, b""), say(&dir, b"\x11\x22")];
        finish(&mut socket, &main[HALF..]);
        let held = silent.iter_mut().filter_map(|socket| (!is_closed(socket)).then_some(())).count();
        drop(socket);
        arrived(&receiver.end(LIMIT));
        assert_eq!(held, 2, "they were waited for");
        assert_eq!(names(dir.path()), ["out", "out.return-path"]);
    }
}

/// Channels that could be the migration's, but are another's.
#[test]
fn a_second_source_with_channels_is_turned_away() {
    let sources = sources();
    for options in [&[][..], &["--multifd-channels", "2"]] {
        let dir = tempfile::tempdir().unwrap();
        let receiver = receive(&dir, &[options, &["--timeout", "10"]].concat());
        let mut sockets = vec![say(&dir, &sources.main[..10_000])];
        sockets.extend(sources.channels.iter().map(|channel| say(&dir, &channel[..1000])));
        for bytes in [&sources.main, &sources.channels[0], &sources.channels[1]] {
            wait_closed(&mut say(&dir, bytes));
        }
        sockets[0].write_all(&sources.main[10_000..]).unwrap();
        for (socket, channel) in sockets[1..].iter_mut().zip(&sources.channels) {
            socket.write_all(&channel[1000..]).unwrap();
        }
        drop(sockets);
        let ran = receiver.end(LIMIT);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(ran.stderr.contains("a second migration") && ran.stderr.contains("a second connection for channel"));
        assert_eq!(names(dir.path()), ["out", "out.channel-0", "out.channel-1"]);
    }
}

/// Thousands of connections, more than the process may have descriptors for, before and during a migration.
#[test]
fn a_flood_costs_a_bounded_number_of_descriptors_and_no_thread_or_file() {
    let main = stream("7.2-return-path");
    for (first, descriptors) in [("true", 400), ("ulimit -n 64", 64)] {
        let dir = tempfile::tempdir().unwrap();
        let (address, out) = (format!("unix:{}/s", dir.path().display()), dir.path().join("out").display().to_string());
        let receiver = Background::start_after(first, ["receive", &address, "--json", "--out", &out]);
        let proc = format!("/proc/{}", receiver.id());
        let mut socket = None;
        let mut silent = Vec::new();
        let mut most = 0;
        for number in 0..5000 {
            if number == 2500 {
                socket = Some(say(&dir, &main[..HALF]));
            }
            match number % 10 {
                0 if silent.len() < 400 => silent.push(say(&dir, b"")),
                1 => drop(say(&dir, b"garbage")),
                2 if socket.is_some() => drop(say(&dir, &main[..100])),
                _ => drop(say(&dir, b"")),
            }
            if number % 500 == 0 {
                most = most.max(names(Path::new(&format!("{proc}/fd"))).len());
                assert!(names(Path::new(&format!("{proc}/task"))).len() <= 2);
                assert!(names(dir.path()).iter().all(|name| name == "s"), "{:?}", names(dir.path()));
            }
        }
        finish(socket.as_mut().unwrap(), &main[HALF..]);
        drop(socket);
        let ran = receiver.end(LIMIT);
        arrived(&ran);
        assert!(most <= descriptors, "{most} descriptors");
        assert!(ran.stderr.contains("more connections"), "{}", ran.stderr);
        assert!(ran.stderr.lines().count() < 1000, "{} lines", ran.stderr.lines().count());
    }
}

/// What is said of strangers is not read: that is no reason to stop.
#[test]
fn a_log_that_is_not_read_holds_nothing_up() {
    let main = stream("7.2-return-path");
    let dir = tempfile::tempdir().unwrap();
    let (address, out) = (format!("unix:{}/s", dir.path().display()), dir.path().join("out").display().to_string());
    // A pipe that has room for one line, that it listens, and stays open.
    let full = "mkfifo \"$5.log\"; exec 3<>\"$5.log\" 2>&3; dd if=/dev/zero of=\"$5.log\" oflag=nonblock bs=4096 count=15 \
                2>/dev/null";
    let arguments = ["receive", &address, "--json", "--out", &out];
    let full = full.replace("$5", &out);
    let receiver = Background::start_after(&full, arguments);
    for _ in 0..100 {
        drop(say(&dir, b"garbage"));
    }
    let mut socket = say(&dir, &main[..HALF]);
    finish(&mut socket, &main[HALF..]);
    drop(socket);
    arrived(&receiver.end(LIMIT));
}

/// Exit code 0 if and only if SHUT 0 was said.
#[test]
fn a_source_that_leaves_early_keeps_its_guest() {
    let main = stream("7.2-return-path");
    for kept in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options: &[&str] = if kept { &["--keep-partial"] } else { &[] };
        let receiver = receive(&dir, options);
        // All of the stream, and the connection closed before an answer could come.
        drop(say(&dir, &main));
        let ran = receiver.end(LIMIT);
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        assert_eq!(ran.json()["handover"], "refused");
        let expected: &[&str] = if kept { &["out.partial", "out.return-path.partial"] } else { &[] };
        assert_eq!(names(dir.path()), expected);
    }
    // What comes to light afterwards changes nothing for the source.
    let dir = tempfile::tempdir().unwrap();
    let (address, out) = (format!("unix:{}/s", dir.path().display()), dir.path().join("out").display().to_string());
    let receiver = Background::start_after("exec >/dev/full", ["receive", &address, "--out", &out]);
    let mut socket = say(&dir, &main[..HALF]);
    finish(&mut socket, &main[HALF..]);
    drop(socket);
    assert_eq!(receiver.end(LIMIT).code, Some(0));
}

#[test]
fn without_a_return_path_it_is_said_what_that_means() {
    let dir = tempfile::tempdir().unwrap();
    let (address, out) = (format!("unix:{}/s", dir.path().display()), dir.path().join("out").display().to_string());
    let receiver = Background::start(["receive", &address, "--out", &out]);
    drop(say(&dir, &stream("5.2-plain")));
    let ran = receiver.end(LIMIT);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("it opened no return path"), "{}", ran.stdout);
}

#[test]
fn what_is_received_is_its_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (address, out) = (format!("unix:{}/s", dir.path().display()), dir.path().join("out").display().to_string());
    let receiver = Background::start_after("umask 0", ["receive", &address, "--out", &out]);
    let mut socket = say(&dir, &stream("7.2-return-path"));
    assert_eq!(fs::metadata(dir.path().join("s")).unwrap().mode() & 0o777, 0o600);
    finish(&mut socket, &[]);
    drop(socket);
    assert_eq!(receiver.end(LIMIT).code, Some(0));
    for name in names(dir.path()) {
        assert_eq!(fs::metadata(dir.path().join(&name)).unwrap().mode() & 0o777, 0o600, "{name}");
    }
    // And a process that is killed leaves nothing.
    let dir = tempfile::tempdir().unwrap();
    let receiver = receive(&dir, &[]);
    let socket = say(&dir, &stream("7.2-return-path")[..HALF]);
    std::thread::sleep(Duration::from_millis(50));
    receiver.kill();
    drop(socket);
    assert_eq!(names(dir.path()), ["s"]);
}

#[test]
fn names_that_are_taken_are_refused_before_the_migration() {
    let sources = sources();
    for name in ["out", "out.channel-0", "out.channel-1", "out.return-path"] {
        let dir = tempfile::tempdir().unwrap();
        let (taken, victim) = (dir.path().join(name), dir.path().join("victim"));
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, &taken).unwrap();
        let out = dir.path().join("out").display().to_string();
        let address = format!("unix:{}/s", dir.path().display());
        let ran = qevm(["receive", &address, "--out", &out]);
        assert_eq!(ran.code, Some(2), "{name}: {}", ran.stderr);
        assert!(ran.stderr.contains(name) && ran.stderr.contains("--force"), "{}", ran.stderr);

        let receiver = receive(&dir, &["--force", "--timeout", "10"]);
        let mut sockets = vec![say(&dir, &sources.main)];
        sockets.extend(sources.channels.iter().map(|channel| say(&dir, channel)));
        drop(sockets);
        let ran = receiver.end(LIMIT);
        assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr);
        assert_eq!(fs::read(&victim).unwrap(), b"precious", "{name}");
        // This source opens no return path: that file has nothing to be replaced with.
        assert_eq!(fs::symlink_metadata(&taken).unwrap().is_file(), name != "out.return-path", "{name}");
    }
}

/// The same over TCP, where a source is named by its address, and one that resets the connection has not heard.
#[test]
fn strangers_over_tcp_are_named_by_their_address() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("tcp:127.0.0.1:{port}");
    let receiver = Background::start(["receive", &address, "--json", "--out", &out]);
    let started = Instant::now();
    let connect = || loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(socket) => return socket,
            Err(error) => assert!(started.elapsed() < LIMIT, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut foreign = connect();
    foreign.write_all(TLS).unwrap();
    let peer = foreign.local_addr().unwrap();
    assert!(matches!(foreign.read(&mut [0]), Ok(0) | Err(_)));
    let _silent = connect();
    let mut source = connect();
    source.set_read_timeout(Some(LIMIT)).unwrap();
    source.write_all(&stream("7.2-return-path")).unwrap();
    let mut answers = Vec::new();
    while !answers.ends_with(&SHUT_0) {
        let mut piece = [0; 64];
        let count = source.read(&mut piece).unwrap();
        assert!(count > 0, "{answers:x?}");
        answers.extend(&piece[..count]);
    }
    source.shutdown(Shutdown::Both).unwrap();
    let ran = receiver.end(LIMIT);
    arrived(&ran);
    assert!(ran.stderr.contains(&format!("dropped a connection from {peer}: a TLS ClientHello")), "{}", ran.stderr);
}
