//! `qevm receive` and `qevm send` with peers that do not keep to the rules: a named error in time, never a hang.

use crate::sample::{Background, file, path, qevm, stream};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Ends a test that hangs: far above what any of these takes on a slow and busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);
/// Inside of the section that lists the RAM blocks.
const IN_SETUP: usize = 60;

/// A recorded source with two page channels.
pub(crate) struct Sources {
    pub(crate) main: Vec<u8>,
    pub(crate) channels: [Vec<u8>; 2],
}

pub(crate) fn sources() -> Sources {
    let [main, first, second] =
        ["10.0-multifd-zstd", "10.0-multifd-zstd.channel-0", "10.0-multifd-zstd.channel-1"].map(stream);
    Sources { main, channels: [first, second] }
}

pub(crate) fn receive(dir: &tempfile::TempDir, options: &[&str]) -> Background {
    let address = format!("unix:{}", dir.path().join("s").display());
    let out = dir.path().join("out").display().to_string();
    let mut arguments = vec!["receive", &address, "--json", "--out", &out];
    arguments.extend(options);
    Background::start(&arguments)
}

/// A connection that has said `bytes`. A receiver that has given up may have closed it.
pub(crate) fn say(dir: &tempfile::TempDir, bytes: &[u8]) -> UnixStream {
    let started = Instant::now();
    // The socket is there a moment before it listens.
    let mut socket = loop {
        match UnixStream::connect(dir.path().join("s")) {
            Ok(socket) => break socket,
            Err(error) => assert!(started.elapsed() < LIMIT, "it does not listen: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let _ = socket.write_all(bytes);
    socket
}

#[test]
fn channels_may_come_before_the_main_channel_and_in_any_order() {
    let (dir, sources) = (tempfile::tempdir().unwrap(), sources());
    let receiver = receive(&dir, &["--multifd-channels", "2", "--multifd-compression", "zstd", "--timeout", "300"]);
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
        // One of them waits for the time-out, which begins when the last has come; a busy machine must not let it come
        // before.
        options.extend(["--timeout", if word.starts_with("of 3") { "4" } else { "300" }]);
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

/// Nothing more has to come then, and how long a description is waited for is not the user's to say.
#[test]
fn a_source_that_has_said_everything_is_not_given_up() {
    let dir = tempfile::tempdir().unwrap();
    // No devices and no description: one block of one page of zeroes.
    let mut main = b"QEVM\0\0\0\x03\x07\0\0\0\x07microvm".to_vec();
    main.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04");
    main.extend(b"\x03mem\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    main.extend(b"\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\x03mem\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0");
    let receiver = receive(&dir, &["--timeout", "1"]);
    let socket = say(&dir, &main);
    let ran = receiver.end(LIMIT);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    drop(socket);
}

/// A source waits for SHUT and does not close before: with a description after the end and, as in postcopy, without.
#[test]
fn a_source_hears_that_its_guest_has_arrived_before_it_closes() {
    for name in ["7.2-return-path", "7.2-postcopy"] {
        let dir = tempfile::tempdir().unwrap();
        let receiver = receive(&dir, &[]);
        let mut socket = say(&dir, &stream(name));
        let mut answers = Vec::new();
        while !answers.ends_with(&message(1, &[0; 4])) {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            answers.push(byte[0]);
        }
        drop(socket);
        let ran = receiver.end(LIMIT);
        assert_eq!((ran.code, ran.json()["handover"].as_str()), (Some(0), Some("confirmed")), "{}", ran.stderr);
    }
}

/// SHUT 0 makes a source give up its guest, so it must not be said while pages of a page channel are missing.
#[test]
fn the_source_is_told_that_a_channel_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = receive(&dir, &["--multifd-channels", "1", "--timeout", "4"]);
    let mut socket = say(&dir, &stream("7.2-return-path"));
    let mut answers = Vec::new();
    let _ = socket.read_to_end(&mut answers);
    assert_eq!(receiver.end(LIMIT).code, Some(1));
    assert!(answers.ends_with(&[0, 1, 0, 4, 0, 0, 0, 1]), "SHUT 1 comes last: {answers:x?}");
}

/// A destination that reads nothing and says `words`, one after the other.
fn destination(dir: &Path, words: Vec<Vec<u8>>, pause: Duration) -> impl FnOnce() {
    let listener = UnixListener::bind(dir.join("t")).unwrap();
    let saying = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut reader = socket.try_clone().unwrap();
        let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        for word in words {
            if socket.write_all(&word).is_err() {
                break;
            }
            std::thread::sleep(pause);
        }
        reading.join().unwrap().ok();
    });
    || saying.join().unwrap()
}

/// The header of a message of the return path, and its body.
fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), body].concat()
}

#[test]
fn what_was_not_asked_for_is_refused_by_name() {
    let (shut, pong, request) = (message(1, &[0; 4]), message(2, &[0; 4]), message(4, &[0; 12]));
    let acknowledge = message(7, &[]);
    for (words, word) in [
        (vec![pong; 100_000], "PONG 0x0"),
        (vec![request], "REQ_PAGES"),
        (vec![message(6, &[0; 4])], "RESUME_ACK"),
        (vec![acknowledge.clone(), acknowledge], "SWITCHOVER_ACK for the second time"),
        (vec![message(9, &[])], "message type 9"),
        (vec![shut], "after"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let early = word == "after";
        let over = match early {
            // It reads nothing until it has said that it has all.
            true => destination_in_a_hurry(dir.path(), words.concat()),
            false => Box::new(destination(dir.path(), words, Duration::ZERO)) as Box<dyn FnOnce()>,
        };
        let ran = send_to("10.0", dir.path(), &["--zero-page-detection", "none"]).end(LIMIT);
        assert_eq!(ran.code, Some(1), "{word}: {}", ran.stderr);
        assert!(ran.stderr.contains(word) && ran.stderr.lines().count() == 1, "{word}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{word}");
        over();
    }
}

/// A destination that says `word` when it has read hardly anything.
fn destination_in_a_hurry(dir: &Path, word: Vec<u8>) -> Box<dyn FnOnce()> {
    let listener = UnixListener::bind(dir.join("t")).unwrap();
    let saying = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        // What comes after the header is sent when the source has read its file.
        socket.read_exact(&mut [0; 9]).unwrap();
        socket.write_all(&word).unwrap();
        // The answer is read while the source waits for room. It would be as wrong if it had sent all by now, but then
        // the user could not tell.
        std::thread::sleep(Duration::from_millis(500));
        std::io::copy(&mut socket, &mut std::io::sink()).ok();
    });
    Box::new(|| saying.join().unwrap())
}

/// However long a destination goes on to talk: the time for its last word is limited.
#[test]
fn an_answer_that_never_ends_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let drops = message(1, &[0; 4]).into_iter().take(7).map(|byte| vec![byte]).collect();
    let over = destination(dir.path(), drops, Duration::from_millis(400));
    let ran = send(dir.path(), &[]).end(LIMIT);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("no answer within 1 s"), "{}", ran.stderr);
    over();
}

fn send(dir: &Path, options: &[&str]) -> Background {
    send_to("7.2", dir, options)
}

fn send_to(release: &str, dir: &Path, options: &[&str]) -> Background {
    let (stream, address) =
        (path("7.2-return-path.zst").display().to_string(), format!("unix:{}", dir.join("t").display()));
    let mut arguments = vec!["send", "--to", release, "--timeout", "1"];
    arguments.extend(options);
    arguments.extend([stream.as_str(), address.as_str()]);
    Background::start(&arguments)
}

#[test]
fn a_destination_that_stands_still_is_given_up() {
    for options in [&[][..], &["--multifd-channels", "2"], &["--multifd-channels", "200"]] {
        let dir = tempfile::tempdir().unwrap();
        // Connections wait in the backlog, and are never read.
        let _listener = UnixListener::bind(dir.path().join("t")).unwrap();
        let ran = send(dir.path(), options).end(LIMIT);
        assert_eq!(ran.code, Some(1), "{options:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("multifd-channels"), "{options:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{options:?}");
    }
}

/// A destination that is not there is known before a large file is read, and one that is does not take a source that
/// reads for a stranger.
#[test]
fn a_source_connects_and_says_what_it_is_before_it_reads() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("t")).unwrap();
    let bytes = stream("7.2-return-path");
    let address = format!("unix:{}", dir.path().join("t").display());
    let mut sending = Background::start_with_input(["send", "--to", "7.2", "--no-return-path", "-", &address]);
    let mut input = sending.input();
    input.write_all(&bytes[..64]).unwrap();
    let (mut socket, _) = listener.accept().unwrap();
    let mut start = [0; 8];
    socket.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"QEVM\0\0\0\x03");
    input.write_all(&bytes[64..]).unwrap();
    drop(input);
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    assert_eq!(sending.end(LIMIT).code, Some(0));
    // It comes once.
    let sent = file(&dir, "sent", &[&start[..], &rest].concat()).display().to_string();
    assert_eq!(qevm(["verify", &sent]).code, Some(0));

    let refused = Background::start(["send", "/dev/zero", "unix:/nonexistent/socket"]).end(LIMIT);
    assert!(refused.code == Some(2) && refused.stderr.contains("connect"), "{}", refused.stderr);
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
