//! Files that hold guest memory or device state: their owner's alone, whole or not there, and never in the place of
//! something that is still held.

use crate::sample::{file, qevm, qevm_after, stream};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What can be written, the arguments that write it, and the file that appears (in `DIR`).
const WRITERS: [(&[&str], &str); 7] = [
    (&["convert", "--out", "DIR/out"], "out"),
    (&["convert", "--format", "mapped-ram", "--out", "DIR/out"], "out"),
    (&["extract", "--ram", "DIR"], "block-0.raw"),
    (&["extract", "--memory", "DIR/out"], "out"),
    (&["extract", "--elf", "DIR/out"], "out"),
    (&["extract", "--kdump", "DIR/out"], "out"),
    (&["extract", "--devices", "DIR/out"], "out"),
];

/// A stream of a guest whose memory has the usual name, as `--memory`, `--elf` and `--kdump` want it.
fn guest(dir: &TempDir) -> PathBuf {
    let (recorded, mut usual) = (stream("7.2-return-path"), Vec::new());
    let (name, mut at) = (b"\x03mem", 0);
    while at < recorded.len() {
        match recorded[at..].starts_with(name) {
            true => usual.extend(b"\x0bmicrovm.ram"),
            false => usual.push(recorded[at]),
        }
        at += if recorded[at..].starts_with(name) { name.len() } else { 1 };
    }
    file(dir, "guest.qevm", &usual)
}

/// The arguments of a writer for `dir` and a stream.
fn arguments(writer: &[&str], dir: &Path, more: &[&str], stream: &Path) -> Vec<String> {
    let (dir, stream) = (dir.display().to_string(), stream.display().to_string());
    let given = writer.iter().map(|word| word.replace("DIR", &dir));
    given.chain(more.iter().map(|word| (*word).to_owned())).chain([stream]).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("the directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

#[test]
fn no_other_user_can_read_them() {
    let input = tempfile::tempdir().unwrap();
    let guest = guest(&input);
    for (writer, _) in WRITERS {
        let dir = tempfile::tempdir().unwrap();
        let ran = qevm_after("umask 0", arguments(writer, dir.path(), &[], &guest));
        assert_eq!(ran.code, Some(0), "{writer:?}: {}", ran.stderr);
        let names = names(dir.path());
        assert!(!names.is_empty(), "{writer:?}");
        for name in names {
            let mode = fs::metadata(dir.path().join(&name)).unwrap().mode();
            assert_eq!(mode & 0o777, 0o600, "{writer:?}: {name}");
        }
    }
}

#[test]
fn what_is_there_stays_without_force() {
    let input = tempfile::tempdir().unwrap();
    let guest = guest(&input);
    for (writer, name) in WRITERS {
        for link in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (taken, victim) = (dir.path().join(name), dir.path().join("victim"));
            fs::write(&victim, "precious").unwrap();
            match link {
                true => symlink(&victim, &taken).unwrap(),
                false => fs::write(&taken, "precious").unwrap(),
            }
            let ran = qevm(arguments(writer, dir.path(), &[], &guest));
            assert_eq!(ran.code, Some(2), "{writer:?}: {}", ran.stderr);
            assert!(ran.stderr.contains("--force"), "{writer:?}: {}", ran.stderr);
            assert_eq!(fs::read(&taken).unwrap(), b"precious", "{writer:?}");
            assert_eq!(fs::symlink_metadata(&taken).unwrap().is_symlink(), link, "{writer:?}");
        }
    }
}

#[test]
fn force_replaces_a_link_and_not_what_it_points_to() {
    let input = tempfile::tempdir().unwrap();
    let guest = guest(&input);
    for (writer, name) in WRITERS {
        let dir = tempfile::tempdir().unwrap();
        let (taken, victim) = (dir.path().join(name), dir.path().join("victim"));
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, &taken).unwrap();
        let ran = qevm(arguments(writer, dir.path(), &["--force"], &guest));
        assert_eq!(ran.code, Some(0), "{writer:?}: {}", ran.stderr);
        assert_eq!(fs::read(&victim).unwrap(), b"precious", "{writer:?}");
        let written = fs::symlink_metadata(&taken).unwrap();
        assert!(written.is_file() && written.len() > 8, "{writer:?}: {written:?}");
    }
}

/// The disk is full, as far as the program can tell, or the program is killed: `ulimit -f` does both.
#[test]
fn half_a_file_does_not_stay() {
    let input = tempfile::tempdir().unwrap();
    let guest = guest(&input);
    for first in ["ulimit -f 1", "trap '' XFSZ; ulimit -f 1"] {
        for (writer, _) in WRITERS {
            let dir = tempfile::tempdir().unwrap();
            let ran = qevm_after(first, arguments(writer, dir.path(), &[], &guest));
            assert_ne!(ran.code, Some(0), "{writer:?}");
            assert!(names(dir.path()).is_empty(), "{first}: {writer:?}: {:?} {}", names(dir.path()), ran.stderr);
        }
    }
}

#[test]
fn whole_files_do_not_stay_alone() {
    let input = tempfile::tempdir().unwrap();
    let guest = file(&input, "guest.qevm", &stream("7.2-return-path"));
    let dir = tempfile::tempdir().unwrap();
    let writer = ["extract", "--devices", "DIR/devices", "--ram", "DIR/ram", "--memory", "DIR/memory"];
    let writer = [&writer[..], &["--memory-block", "no such block"]].concat();
    let ran = qevm(arguments(&writer, dir.path(), &[], &guest));
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("no RAM block"), "{}", ran.stderr);
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn one_name_is_for_one_file() {
    let input = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let writer = ["extract", "--memory", "DIR/out", "--elf", "DIR/out"];
    let ran = qevm(arguments(&writer, dir.path(), &["--force"], &guest(&input)));
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert_eq!(names(dir.path()), [""; 0]);
}
