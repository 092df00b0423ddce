//! What a stream may cost: inputs that claim much and say little, and the options that bound what cannot follow the
//! input.

use crate::sample::{Background, Ran, file, qevm_reading, stream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Nothing here takes a second. What does not end at all is found by this.
const HANGS: Duration = Duration::from_secs(120);

fn hostile(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/hostile").join(name)
}

fn qevm(arguments: &[&str], input: &Path) -> Ran {
    let input = input.to_str().expect("a path in UTF-8");
    Background::start(arguments.iter().chain([&input])).end(HANGS)
}

fn assert_limit(ran: &Ran, names: &str) {
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains(": limit at byte ") && ran.stderr.contains(names), "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
}

#[test]
fn absent_pages_cost_nothing() {
    for name in ["block-43.qevm", "scatter-200.qevm"] {
        let ran = qevm(&["verify", "--json"], &hostile(name));
        assert_eq!((ran.code, ran.json()["ok"].as_bool()), (Some(0), Some(true)), "{name}: {}", ran.stderr);
    }
    let ran = qevm(&["verify", "--json"], &hostile("block-43.qevm"));
    assert_eq!(ran.json()["ram"][0]["pages"], 1);
    // Of 4096 times 'A' and 2^43 - 4096 zeroes, reckoned with polynomials in another program.
    assert_eq!(ran.json()["ram"][0]["crc32"], "d552d0fb");
    let dir = tempfile::tempdir().unwrap();
    for (form, name) in [("plain", "a"), ("mapped-ram", "b")] {
        let out = dir.path().join(name);
        let arguments = ["convert", "--max-ram=8T", "--format", form, "--out", out.to_str().unwrap()];
        assert_eq!(qevm(&arguments, &hostile("block-43.qevm")).code, Some(0), "{form}");
        let again = qevm(&["verify", "--json"], &out).json();
        assert_eq!(again["ram"][0]["crc32"], ran.json()["ram"][0]["crc32"], "{form}");
        let written = std::os::unix::fs::MetadataExt::blocks(&out.metadata().unwrap()) * 512;
        assert!(written < 64 << 10, "{form}: {written} bytes");
    }
}

#[test]
fn memory_that_has_to_be_produced_is_bounded_by_max_ram() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (plain, mapped, folder, raw) = (path("plain"), path("mapped"), path("folder"), path("raw"));
    let commands: [&[&str]; 6] = [
        &["verify", "--ram-digest=sha256"],
        &["inspect", "--ram-digest=sha256"],
        &["extract", "--ram", &folder],
        &["extract", "--memory", &raw],
        &["convert", "--out", &plain],
        &["convert", "--format=mapped-ram", "--out", &mapped],
    ];
    for arguments in commands {
        assert_limit(&qevm(arguments, &hostile("block-43.qevm")), "--max-ram");
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let ran = Background::start(["send".as_ref(), hostile("block-43.qevm").as_os_str(), address.as_ref()]).end(HANGS);
    assert_limit(&ran, "--max-ram");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    // A small guest, and a smaller bound.
    let guest = file(&dir, "guest", &stream("5.2-plain"));
    assert_limit(&qevm(&["verify", "--ram-digest=sha256", "--max-ram=1M"], &guest), "--max-ram");
    assert_eq!(qevm(&["verify", "--ram-digest=sha256", "--max-ram=1G"], &guest).code, Some(0));
    // Nothing has to be produced for a CRC-32.
    assert_eq!(qevm(&["verify", "--max-ram=1M"], &guest).code, Some(0));
}

#[test]
fn temporary_files_are_bounded_by_max_spool() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = stream("5.2-plain");
    let guest = file(&dir, "guest", &bytes);
    assert_limit(&qevm(&["verify", "--ram-digest=sha256", "--max-spool=8K"], &guest), "--max-spool");
    assert_eq!(qevm(&["verify", "--ram-digest=sha256", "--max-spool=64M"], &guest).code, Some(0));
    // Reading from a file in order needs none; from a pipe, the rest of the stream is put aside.
    assert_eq!(qevm(&["verify", "--max-spool=0"], &guest).code, Some(0));
    assert_limit(&qevm_reading(["verify", "--max-spool=1K", "-"], &bytes), "--max-spool");
    // What can be there after the memory is bounded anyway.
    assert_limit(&qevm(&["verify"], &hostile("bomb-spool.zst")), "bytes after the first device section");
    assert_limit(&qevm(&["verify", "--max-spool=1M"], &hostile("bomb-spool.zst")), "--max-spool");
}

#[test]
fn elements_without_bytes_are_one_field() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("devices.json");
    let ran = qevm(&["extract", "--devices", out.to_str().unwrap()], &hostile("nodes-1.qevm"));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(out.metadata().unwrap().len() < 4096);
    let ran = qevm(&["inspect", "--fields"], &hostile("nodes-1.qevm"));
    assert!(ran.code == Some(0) && ran.stdout.len() < 4096, "{}", ran.stdout.len());
    let both = hostile("nodes-1.qevm");
    assert_eq!(qevm(&["diff", both.to_str().unwrap()], &both).code, Some(0));
}
