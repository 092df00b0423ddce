//! `qevm serve`: what clients get, and what those cost that want something else. The client here is written from the
//! protocol's specification; QEMU's own are in conformance.

use crate::sample::{Background, file, path, qevm, stream};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A server, and what it printed when it listened.
struct Served {
    child: Child,
    said: Value,
    socket: PathBuf,
}

impl Served {
    fn start(folder: &Path, arguments: &[&str]) -> Served {
        let socket = folder.join("pages sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_qevm"))
            .args(["serve", "--json", "--listen", &format!("unix:{}", socket.display())])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let said = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        Served { child, said, socket }
    }

    fn connect(&self) -> Client {
        Client::new(UnixStream::connect(&self.socket).unwrap(), true)
    }

    /// Ends it as an operator does, and gives what it has said.
    fn end(mut self) -> String {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM)
            .unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(!self.socket.exists());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

struct Client {
    stream: UnixStream,
    len: u64,
    structured: bool,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    /// These bytes, and how many of them came as zeroes.
    Bytes(Vec<u8>, u64),
    Error(u32, String),
}

impl Client {
    fn new(stream: UnixStream, structured: bool) -> Client {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut client = Client { stream, len: 0, structured };
        assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&[0, 0, 0, 3]);
        if structured {
            client.send(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
            assert_eq!(client.take(20)[8..], [0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0]);
        }
        // GO, the empty name, nothing more to be told.
        client.send(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        let told = client.take(20 + 12);
        assert_eq!(
            told[..20],
            [&0x0003_e889_0455_65a9u64.to_be_bytes()[..], &[0, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0, 12]].concat()
        );
        client.len = u64::from_be_bytes(told[22..30].try_into().unwrap());
        assert_eq!(told[30..], [1, 3]);
        assert_eq!(client.take(20)[8..], [0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0]);
        client
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn word(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn ask(&mut self, command: u16, offset: u64, len: u32, payload: &[u8]) -> Reply {
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
        request.extend(command.to_be_bytes());
        request.extend(*b"a cookie");
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(payload);
        self.send(&request);
        if !self.structured {
            assert_eq!(self.word(), 0x6744_6698);
            let error = self.word();
            assert_eq!(self.take(8), b"a cookie");
            return match error {
                0 => Reply::Bytes(self.take(len as usize), 0),
                error => Reply::Error(error, String::new()),
            };
        }
        let (mut bytes, mut zeroes, mut failed) = (Vec::new(), 0, None);
        loop {
            assert_eq!(self.word(), 0x668e_33ef);
            let kind = self.word();
            assert_eq!(self.take(8), b"a cookie");
            let len = self.word() as usize;
            let content = self.take(len);
            match kind & 0xffff {
                0 => assert_eq!(len, 0),
                1 => {
                    assert_eq!(content[..8], (offset + bytes.len() as u64).to_be_bytes());
                    bytes.extend(&content[8..]);
                }
                2 => {
                    assert_eq!(content[..8], (offset + bytes.len() as u64).to_be_bytes());
                    let hole = u32::from_be_bytes(content[8..].try_into().unwrap());
                    bytes.resize(bytes.len() + hole as usize, 0);
                    zeroes += u64::from(hole);
                }
                kind => {
                    assert!(kind == 0x8001 || kind == 0x8002, "chunk of type {kind:#x}");
                    let error = u32::from_be_bytes(content[..4].try_into().unwrap());
                    let text = usize::from(u16::from_be_bytes([content[4], content[5]]));
                    failed = Some((error, String::from_utf8(content[6..6 + text].to_vec()).unwrap()));
                }
            }
            if kind >> 16 == 1 {
                return failed.map_or(Reply::Bytes(bytes, zeroes), |(error, text)| Reply::Error(error, text));
            }
        }
    }

    fn read(&mut self, offset: u64, len: u32) -> Reply {
        self.ask(0, offset, len, &[])
    }

    /// All of the export, and how much of it was told to be zero.
    fn all(&mut self, step: u32) -> (Vec<u8>, u64) {
        let (mut all, mut zeroes) = (Vec::new(), 0);
        while (all.len() as u64) < self.len {
            let left = self.len - all.len() as u64;
            match self.read(all.len() as u64, u64::from(step).min(left) as u32) {
                Reply::Bytes(bytes, told) => {
                    all.extend(bytes);
                    zeroes += told;
                }
                error => panic!("{error:?}"),
            }
        }
        (all, zeroes)
    }
}

#[test]
fn every_image_is_served_as_the_mapped_ram_file_that_convert_writes() {
    let dir = tempfile::tempdir().unwrap();
    let plain = file(&dir, "plain", &stream("5.2-plain")).display().to_string();
    let mapped = file(&dir, "mapped", &stream("11.1-mapped-ram")).display().to_string();
    let packed = |name: &str| path(&format!("{name}.zst")).display().to_string();
    let (first, second) = (packed("10.0-multifd-zstd.channel-0"), packed("10.0-multifd-zstd.channel-1"));
    for arguments in [
        &[plain.as_str()][..],
        &["--offset", "4096", &mapped],
        &[&packed("7.2-postcopy")],
        &["--channel", &first, "--channel", &second, &packed("10.0-multifd-zstd")],
    ] {
        let out = dir.path().join("out");
        let convert = ["convert", "--force", "--format", "mapped-ram", "--out", out.to_str().unwrap()];
        let converted = qevm(convert.iter().chain(arguments));
        assert_eq!(converted.code, Some(0), "{}", converted.stderr);
        let expected = std::fs::read(&out).unwrap();
        let served = Served::start(dir.path(), arguments);
        let uri = format!("nbd+unix:///?socket={}", served.socket.display().to_string().replace(' ', "%20"));
        assert_eq!(served.said["listening"], Value::from(vec![uri]));
        assert_eq!(
            (served.said["len"].as_u64(), &served.said["page_size"]),
            (Some(expected.len() as u64), &4096.into())
        );
        assert!(served.said["blocks"].as_array().unwrap().iter().any(|block| block["name"] == "mem"));
        // Several at once, one of which takes simple replies.
        let mut simple = Client::new(UnixStream::connect(&served.socket).unwrap(), false);
        let mut clients = [served.connect(), served.connect()];
        for client in &mut clients {
            let (all, zeroes) = client.all(1 << 20);
            assert!(all == expected, "{arguments:?}");
            assert!(zeroes > all.len() as u64 / 2, "{zeroes} of {}", all.len());
        }
        assert!(simple.all(700_001).0 == expected, "{arguments:?}");
        // DISC has no reply.
        clients[0].send(&[&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2][..], &[0; 20]].concat());
        assert_eq!(clients[0].stream.read(&mut [0]).unwrap(), 0);
        assert!(served.end().contains("3 clients"));
    }
}

#[test]
fn what_cannot_be_had_is_an_error_and_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let plain = file(&dir, "plain", &stream("5.2-plain"));
    let served = Served::start(dir.path(), &[plain.to_str().unwrap()]);
    let mut client = served.connect();
    let refused = |reply: Reply, error: u32, words: &str| match reply {
        Reply::Error(found, text) if found == error && text.contains(words) => {}
        other => panic!("{other:?}, expected error {error} with '{words}'"),
    };
    let len = client.len;
    refused(client.read(len - 1, 2), 22, "beyond the end");
    refused(client.read(u64::MAX, 4096), 22, "beyond the end");
    refused(client.ask(1, 0, 100_000, &vec![7; 100_000]), 1, "read-only");
    for command in [3, 4, 6, 7, 99] {
        refused(client.ask(command, 0, 4096, &[]), 22, "only reads");
    }
    assert_eq!(client.read(5, 0), Reply::Bytes(Vec::new(), 0));
    // The image is cut under the server's hands.
    let (all, _) = client.all(1 << 20);
    let pages =
        all.chunks_exact(4096).enumerate().filter(|(_, page)| page.iter().filter(|byte| **byte != 0).count() > 1000);
    let pages: Vec<u64> = pages.map(|(number, _)| number as u64 * 4096).collect();
    File::options().write(true).open(&plain).unwrap().set_len(1000).unwrap();
    let mut simple = Client::new(UnixStream::connect(&served.socket).unwrap(), false);
    let mut lost = 0;
    for at in pages {
        match client.read(at, 4096) {
            Reply::Bytes(..) => {}
            Reply::Error(error, text) => {
                assert_eq!(error, 5);
                assert!(text.contains(": truncated at byte ") && text.contains("RAM block '"), "{text}");
                assert_eq!(simple.read(at, 4096), Reply::Error(5, String::new()));
                lost += 1;
            }
        }
    }
    assert!(lost > 0);
    // What lies in no page is still there.
    assert_eq!(client.read(0, 4), Reply::Bytes(b"QEVM".to_vec(), 0));
    let said = served.end();
    assert_eq!(said.matches("truncated at byte").count(), 2, "{said}");
}

#[test]
fn a_page_is_never_read_from_a_file_that_was_changed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = stream("5.2-plain");
    let plain = file(&dir, "plain", &bytes);
    let served = Served::start(dir.path(), &[plain.to_str().unwrap()]);
    let mut client = served.connect();
    let (all, _) = client.all(1 << 20);
    let page = all.chunks(4096).position(|page| page.iter().filter(|byte| **byte != 0).count() > 1000).unwrap() as u64;
    File::options().write(true).open(&plain).unwrap().write_all_at(&[1], 5).unwrap();
    match client.read(page * 4096, 4096) {
        Reply::Error(5, text) => assert!(text.contains("changed"), "{text}"),
        other => panic!("{other:?}"),
    }
    served.end();
}

#[test]
fn strangers_and_those_beyond_the_limit_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let image = path("7.2-return-path.zst").display().to_string();
    let served = Served::start(dir.path(), &["--max-clients", "3", &image]);
    let mut first = served.connect();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"] {
        let mut stranger = UnixStream::connect(&served.socket).unwrap();
        stranger.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stranger.read_exact(&mut [0; 18]).unwrap();
        stranger.write_all(garbage).unwrap();
        // It may be reset, as not all of it was read.
        let _ = stranger.read_to_end(&mut Vec::new());
    }
    // Options without end.
    let mut endless = UnixStream::connect(&served.socket).unwrap();
    endless.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let options = b"IHAVEOPT\0\0\0\x03\0\0\0\0".repeat(40);
    endless.read_exact(&mut [0; 18]).unwrap();
    let _ = endless.write_all(&[&[0, 0, 0, 3][..], &options].concat());
    let _ = endless.read_to_end(&mut Vec::new());
    drop(endless);
    let (second, third) = (served.connect(), served.connect());
    let mut fourth = UnixStream::connect(&served.socket).unwrap();
    fourth.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(fourth.read(&mut [0]).unwrap_or(0), 0);
    drop((second, third));
    assert!(matches!(first.read(0, 4096), Reply::Bytes(..)));
    let said = served.end();
    for words in [
        "handshake flags 0x47455420",
        "length of an option is 4294967295",
        "more than 32 options",
        "there are 3 already",
    ] {
        assert!(said.contains(words), "'{words}' in {said}");
    }
}

#[test]
fn a_bad_image_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = stream("5.2-plain");
    let cut = file(&dir, "cut", &bytes[..bytes.len() / 2]).display().to_string();
    let listen = format!("unix:{}", dir.path().join("socket").display());
    let end = |arguments: &[&str]| Background::start(arguments).end(Duration::from_secs(60));
    let ran = end(&["serve", "--json", "--listen", &listen, &cut]);
    assert_eq!((ran.code, &ran.json()["error"]["kind"]), (Some(1), &"truncated".into()), "{}", ran.stderr);
    // The pages of a compressed image go to a temporary file.
    let packed = path("5.2-plain.zst").display().to_string();
    let ran = end(&["serve", "--max-spool", "64K", "--listen", &listen, &packed]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains(": limit at byte ") && ran.stderr.contains("--max-spool"), "{}", ran.stderr);
    for arguments in [
        &["serve", &packed][..],
        &["serve", &packed, "--listen", "vsock:1:2"],
        &["serve", &packed, "--listen", "unix:/nonexistent/folder/socket"],
        &["serve", &packed, "--listen", &listen, "--listen", &listen],
        &["serve", "/nonexistent/image", "--listen", &listen],
        &["serve", &packed, "--listen", &listen, "--timeout", "0"],
    ] {
        assert_eq!(end(arguments).code, Some(2), "{arguments:?}");
    }
}
