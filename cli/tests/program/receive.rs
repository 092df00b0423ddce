//! `qevm receive` and `qevm send` with peers that do not keep to the rules: a named error in time, never a hang.

use crate::sample::{Background, path, qevm, stream};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Far more than any of these may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Inside of the section that lists the RAM blocks.
const IN_SETUP: usize = 60;

/// A recorded source with two page channels.
struct Sources {
    main: Vec<u8>,
    channels: [Vec<u8>; 2],
}

fn sources() -> Sources {
    let [main, first, second] =
        ["10.0-multifd-zstd", "10.0-multifd-zstd.channel-0", "10.0-multifd-zstd.channel-1"].map(stream);
    Sources { main, channels: [first, second] }
}

fn receive(dir: &tempfile::TempDir, options: &[&str]) -> Background {
    let address = format!("unix:{}", dir.path().join("s").display());
    let out = dir.path().join("out").display().to_string();
    let mut arguments = vec!["receive", &address, "--json", "--out", &out];
    arguments.extend(options);
    Background::start(&arguments)
}

/// A connection that has said `bytes`. A receiver that has given up may have closed it.
fn say(dir: &tempfile::TempDir, bytes: &[u8]) -> UnixStream {
    let started = Instant::now();
    // The socket is there a moment before it listens.
    let mut socket = loop {
        match UnixStream::connect(dir.path().join("s")) {
            Ok(socket) => break socket,
            Err(error) => assert!(started.elapsed() < LIMIT, "nobody listens: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let _ = socket.write_all(bytes);
    socket
}

#[test]
fn channels_may_come_before_the_main_channel_and_in_any_order() {
    let (dir, sources) = (tempfile::tempdir().unwrap(), sources());
    let receiver = receive(&dir, &["--multifd-channels", "2", "--multifd-compression", "zstd", "--timeout", "10"]);
    let mut sockets = Vec::new();
    for bytes in [&sources.channels[1], &sources.channels[0], &sources.main] {
        sockets.push(say(&dir, bytes));
    }
    sockets.iter().for_each(|socket| socket.shutdown(Shutdown::Write).unwrap());
    let ran = receiver.end(LIMIT);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let ram = ran.json()["ram"].clone();
    assert!(ram.as_array().unwrap().iter().any(|b| b["name"] == "mem" && b["crc32"] == "deab7121"), "{ram}");
}

#[test]
fn what_does_not_fit_ends_in_a_named_error() {
    let sources = sources();
    let broken = &sources.channels[1][..sources.channels[1].len() - 100];
    /// Options, what the channels say, and a word of the error.
    type Case<'a> = (&'a [&'a str], &'a [&'a [u8]], &'a str);
    let cases: [Case<'_>; 6] = [
        (&["--multifd-channels", "1"], &[&sources.channels[0], &sources.channels[1]], "multifd-channels is 1 here"),
        (&["--multifd-channels", "3"], &[&sources.channels[0], &sources.channels[1]], "of 3 multifd channels came"),
        (&["--multifd-channels", "0"], &[&sources.channels[0]], "none is expected"),
        (&["--multifd-compression", "zlib"], &[&sources.channels[0], &sources.channels[1]], "zlib"),
        (&[], &[&sources.channels[0], &sources.channels[0]], "a second connection for channel"),
        (&[], &[&sources.channels[0], broken], "truncated"),
    ];
    for (options, channels, word) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options.to_vec();
        options.extend(["--timeout", "2"]);
        let receiver = receive(&dir, &options);
        let mut sockets = vec![say(&dir, &sources.main)];
        sockets.extend(channels.iter().map(|bytes| say(&dir, bytes)));
        sockets.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Write)));
        let ran = receiver.end(LIMIT);
        assert_eq!(ran.code, Some(1), "{word}: {}", ran.stderr);
        let last = ran.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("qevm: ") && last.contains(word), "{word}: {}", ran.stderr);
    }
}

#[test]
fn a_silent_source_is_given_up() {
    let main = stream("7.2-return-path");
    for bytes in [&b""[..], &main[..2], &main[..IN_SETUP], &main[..main.len() / 2]] {
        let dir = tempfile::tempdir().unwrap();
        let receiver = receive(&dir, &["--timeout", "1"]);
        let _silent = say(&dir, bytes);
        let ran = receiver.end(LIMIT);
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        assert!(ran.stderr.contains("within 1 s"), "{}", ran.stderr);
    }
}

/// SHUT 0 makes a source give up its guest, so it must not be said while a page channel is behind.
#[test]
fn the_source_is_told_that_a_channel_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = receive(&dir, &["--multifd-channels", "1", "--timeout", "1"]);
    let mut socket = say(&dir, &stream("7.2-return-path"));
    let mut answers = Vec::new();
    let _ = socket.read_to_end(&mut answers);
    assert_eq!(receiver.end(LIMIT).code, Some(1));
    assert!(answers.ends_with(&[0, 1, 0, 4, 0, 0, 0, 1]), "SHUT 1 comes last: {answers:x?}");
}

fn send(dir: &Path, options: &[&str]) -> Background {
    let (stream, address) =
        (path("7.2-return-path.zst").display().to_string(), format!("unix:{}", dir.join("t").display()));
    let mut arguments = vec!["send", "--to", "7.2", "--timeout", "1"];
    arguments.extend(options);
    arguments.extend([stream.as_str(), address.as_str()]);
    Background::start(&arguments)
}

#[test]
fn a_destination_that_stands_still_is_given_up() {
    for options in [&[][..], &["--multifd-channels", "2"], &["--multifd-channels", "200"]] {
        let dir = tempfile::tempdir().unwrap();
        // Connections wait in the backlog, and nobody ever reads them.
        let _listener = UnixListener::bind(dir.path().join("t")).unwrap();
        let ran = send(dir.path(), options).end(LIMIT);
        assert_eq!(ran.code, Some(1), "{options:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("multifd-channels"), "{options:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{options:?}");
    }
}

#[test]
fn a_destination_that_hangs_up_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("t")).unwrap();
    let sending = send(dir.path(), &[]);
    drop(listener.accept().unwrap());
    let ran = sending.end(LIMIT);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
}

#[test]
fn what_the_release_refuses_is_refused_before_connecting() {
    let stream = path("7.2-return-path.zst").display().to_string();
    for options in [
        &["--to", "7.2", "--zero-page-detection", "multifd"][..],
        &["--to", "7.2", "--multifd-channels", "2", "--multifd-flush-after-each-section", "off"],
        &["--to", "3.1", "--multifd-channels", "2"],
        &["--to", "9.1", "--multifd-channels", "2", "--multifd-compression", "qatzip"],
        &["--multifd-channels", "2", "--multifd-compression", "qpl"],
        &["--multifd-channels", "2", "--multifd-compression", "zlib", "--multifd-level", "10"],
        &["--multifd-channels", "0"],
        &["--multifd-compression", "zlib"],
    ] {
        let mut arguments = vec!["send"];
        arguments.extend(options);
        arguments.extend([stream.as_str(), "unix:/nonexistent/socket"]);
        let ran = qevm(arguments);
        assert_eq!(ran.code, Some(2), "{options:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("connect"), "{options:?}: {}", ran.stderr);
    }
}
