//! `qevm verify` on recorded migrations of real QEMUs: the contract of `--json`, and what RAM must be.

use crate::sample::{file, path, qevm, qevm_reading, stream};
use serde_json::Value;

/// Digests that QEMU itself gave; see `streams/README.md`.
struct Expected {
    stream: &'static str,
    release: &'static str,
    mem_crc32: &'static str,
    mem_sha256: &'static str,
}

const EXPECTED: [Expected; 6] = [
    Expected {
        stream: "5.2-plain",
        release: "5.2 microvm",
        mem_crc32: "c611748e",
        mem_sha256: "3ac3c68180b72778954a584ae305fcf332ce683af7deac76bc8a1f026617206d",
    },
    Expected {
        stream: "7.2-return-path",
        release: "7.2 microvm",
        mem_crc32: "62d828c8",
        mem_sha256: "a36e4836d1a48bcbc641e290894795ef4b961be3ac2311a8894a7a37e14f3668",
    },
    Expected {
        stream: "7.2-postcopy",
        release: "7.2 microvm",
        mem_crc32: "62d828c8",
        mem_sha256: "a36e4836d1a48bcbc641e290894795ef4b961be3ac2311a8894a7a37e14f3668",
    },
    // A packet with pages has the flag SYNC as well and used up two packet numbers, so that one is left out.
    Expected {
        stream: "7.2-multifd-zlib",
        release: "7.2 microvm",
        mem_crc32: "62d828c8",
        mem_sha256: "a36e4836d1a48bcbc641e290894795ef4b961be3ac2311a8894a7a37e14f3668",
    },
    Expected {
        stream: "10.0-multifd-zstd",
        release: "10.0 microvm",
        mem_crc32: "deab7121",
        mem_sha256: "1b3836453ffad5374d340fd8d1e2b26214d76a5361decb0aace93fdf6cfa6974",
    },
    Expected {
        stream: "11.1-mapped-ram",
        release: "11.1 microvm",
        mem_crc32: "52f5e92b",
        mem_sha256: "e852c0c9d7183ca22e002cfb0c0ca11ae917ac057ef7adf853c0d226be91e3e4",
    },
];

/// The arguments after `verify` for a stream that lies in `dir`, and the sum of its files' bytes.
fn arguments(dir: &tempfile::TempDir, name: &str) -> (Vec<String>, u64) {
    let main = stream(name);
    let mut bytes = main.len() as u64;
    let mut arguments = vec![file(dir, name, &main).display().to_string()];
    if name.contains("mapped-ram") {
        arguments.push("--offset=4096".into());
        bytes -= 4096;
    }
    if name.contains("multifd") {
        for number in [1, 0] {
            let channel = stream(&format!("{name}.channel-{number}"));
            bytes += channel.len() as u64;
            let path = file(dir, &format!("{name}.channel-{number}"), &channel);
            arguments.push(format!("--channel={}", path.display()));
        }
    }
    let back = path(&format!("{name}.back"));
    if let Ok(metadata) = back.metadata() {
        bytes += metadata.len();
        arguments.push(format!("--return-path={}", back.display()));
    }
    (arguments, bytes)
}

fn block<'a>(report: &'a Value, name: &str) -> &'a Value {
    let blocks = report["ram"].as_array().expect("a list");
    blocks.iter().find(|block| block["name"] == name).unwrap_or_else(|| panic!("no block {name}"))
}

#[test]
fn ram_is_what_qemu_says_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for Expected { stream, release, mem_crc32, mem_sha256 } in EXPECTED {
        let (arguments, bytes) = arguments(&dir, stream);
        for (digest, expected) in [("crc32", mem_crc32), ("sha256", mem_sha256)] {
            let ran = qevm(["verify", "--json", "--ram-digest", digest].map(String::from).iter().chain(&arguments));
            assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{stream}");
            let report = ran.json();
            assert_eq!(report["ok"], true, "{stream}");
            assert_eq!(report["error"], Value::Null);
            assert_eq!(report["reencoded_identical"], true);
            assert_eq!(report["bytes"], bytes, "{stream}");
            assert_eq!(block(&report, "mem")[digest], expected, "{stream}");
            assert_eq!(block(&report, "mem")["used_length"], 4 << 20);
            let profile = report["qemu_profile"].as_str().unwrap();
            assert!(profile.starts_with(release), "{stream}: {profile}");
            // The description names every field; a postcopy stream has none, but known layouts explain it.
            assert_eq!(report["opaque_bytes"], 0, "{stream}");
        }
    }
}

#[test]
fn the_json_object_has_exactly_the_promised_keys() {
    let dir = tempfile::tempdir().unwrap();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let whole = stream("7.2-return-path");
    for (bytes, code) in [(&whole[..], 0), (&whole[..1000], 1), (b"", 1), (b"no stream at all", 1)] {
        let path = file(&dir, "stream", bytes);
        let ran = qevm(["verify".as_ref(), "--json".as_ref(), path.as_os_str()]);
        assert_eq!(ran.code, Some(code));
        let report = ran.json();
        assert_eq!(
            keys(&report),
            "ok bytes opaque_bytes device_bytes reencoded_identical qemu_profile sections ram error"
        );
        if code == 0 {
            assert_eq!(keys(&report["sections"][0]), "idstr instance_id version_id offset size");
            assert_eq!(keys(&report["ram"][0]), "name used_length pages zero_pages crc32");
        } else {
            assert_eq!(keys(&report["error"]), "kind offset path message");
            assert_eq!(report["ok"], false);
        }
    }
}

#[test]
fn sections_lie_where_they_are_said_to() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = stream("7.2-return-path");
    let report = qevm(["verify".as_ref(), "--json".as_ref(), file(&dir, "s", &bytes).as_os_str()]).json();
    let sections = report["sections"].as_array().unwrap();
    let number = |section: &Value, key: &str| section[key].as_u64().unwrap() as usize;
    assert_eq!(sections.len(), 15);
    for section in sections {
        let (offset, size) = (number(section, "offset"), number(section, "size"));
        let name = section["idstr"].as_str().unwrap();
        assert!([1, 4].contains(&bytes[offset]), "{name}: START or FULL");
        assert_eq!(usize::from(bytes[offset + 5]), name.len());
        assert_eq!(&bytes[offset + 6..][..name.len()], name.as_bytes());
        if name != "ram" {
            assert_eq!(bytes[offset + size - 5], 0x7e, "{name}: footer");
            assert_eq!(bytes[offset + size - 4..][..4], bytes[offset + 1..][..4], "{name}: id in the footer");
        }
    }
    // Device sections follow each other without a gap, up to the end of the stream.
    let devices = &sections[1..];
    for pair in devices.windows(2) {
        assert_eq!(number(&pair[0], "offset") + number(&pair[0], "size"), number(&pair[1], "offset"));
    }
    let last = devices.last().unwrap();
    assert_eq!(bytes[number(last, "offset") + number(last, "size")..][..2], [0, 6]);
}

#[test]
fn standard_input_gives_the_same_report_as_the_file() {
    let dir = tempfile::tempdir().unwrap();
    for (name, offset) in [("5.2-plain", "0"), ("7.2-postcopy", "0"), ("11.1-mapped-ram", "4096")] {
        let bytes = stream(name);
        let path = file(&dir, name, &bytes);
        let arguments = ["verify", "--json", "--offset", offset];
        let from_file = qevm(arguments.into_iter().chain([path.to_str().unwrap()]));
        let from_pipe = qevm_reading(arguments.into_iter().chain(["-"]), &bytes);
        assert_eq!((from_pipe.code, from_pipe.stderr.as_str()), (Some(0), ""), "{name}");
        assert_eq!(from_pipe.json(), from_file.json(), "{name}");
    }
}

#[test]
fn a_compressed_stream_is_read_like_the_plain_one() {
    let compressed = path("5.2-plain.zst");
    let ran = qevm(["verify".as_ref(), "--json".as_ref(), compressed.as_os_str()]);
    assert_eq!(block(&ran.json(), "mem")["crc32"], EXPECTED[0].mem_crc32);
}

#[test]
fn channels_must_all_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let (arguments, _) = arguments(&dir, "10.0-multifd-zstd");
    let main_only = qevm(["verify", "--json", &arguments[0]]);
    assert_eq!(main_only.code, Some(1));
    assert!(main_only.stderr.contains("--channel"), "{}", main_only.stderr);
    assert_eq!(main_only.json()["error"]["kind"], "mismatch");
    let one_missing = qevm(["verify", "--json", &arguments[0], &arguments[1]]);
    assert_eq!((one_missing.code, &one_missing.json()["error"]["kind"]), (Some(1), &"mismatch".into()));
    // Looking at the main channel alone is no fault.
    let inspected = qevm(["inspect", &arguments[0]]);
    assert_eq!(inspected.code, Some(0));
    assert!(inspected.stdout.contains("none was given (--channel)"), "{}", inspected.stdout);
}

#[test]
fn a_return_path_is_checked_against_the_main_channel() {
    let dir = tempfile::tempdir().unwrap();
    let main = file(&dir, "main", &stream("7.2-return-path"));
    let back = std::fs::read(path("7.2-return-path.back")).unwrap();
    let verify = |back: &[u8]| {
        let back = format!("--return-path={}", file(&dir, "back", back).display());
        qevm(["verify", "--json", &back, main.to_str().unwrap()])
    };
    assert_eq!(verify(&back).code, Some(0));
    // PONG to a PING that was never sent.
    let mut wrong = back.clone();
    wrong[7] = 9;
    let ran = verify(&wrong);
    assert_eq!((ran.code, &ran.json()["error"]["kind"]), (Some(1), &"mismatch".into()));
    assert_eq!(ran.json()["error"]["offset"], 4);
    let ran = verify(&back[..back.len() - 1]);
    assert_eq!((ran.code, &ran.json()["error"]["kind"]), (Some(1), &"truncated".into()));
}
