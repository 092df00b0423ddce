//! Images with internal snapshots: each is read by its name or number, and named where none was chosen.

use crate::reported::{base, good, reported, run};
use crate::sample::file;
use tempfile::TempDir;

#[test]
fn snapshots_are_read_whatever_their_names_are_long() {
    let dir = TempDir::new().unwrap();
    let two = file(&dir, "two.qcow2", &reported("two.qcow2"));
    for name in ["before-upgrade", "after-upgrade", "1", "2"] {
        assert!(good(&dir, &format!("verify --snapshot {name} FILE"), &two).contains("nothing opaque"));
    }
    let ran = run(&dir, "inspect FILE", &two);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("before-upgrade") && ran.stderr.contains("after-upgrade"), "{}", ran.stderr);
    let extended = file(&dir, "extl2.qcow2", &reported("extl2.qcow2"));
    assert!(good(&dir, "verify FILE", &extended).contains("nothing opaque"));
}

/// A qcow2 image whose snapshots have these names, of which every second is of the disk alone: `two7.qcow2` with
/// another table, as QEMU writes it: entries at multiples of eight bytes, nothing after the last.
fn image_with_snapshots(names: &[String]) -> Vec<u8> {
    let mut image = reported("two7.qcow2");
    let word = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let half = |image: &[u8], at: usize| u16::from_be_bytes(image[at..at + 2].try_into().unwrap()) as usize;
    let table = word(&image, 64) as usize;
    let (id_len, name_len) = (half(&image, table + 12), half(&image, table + 14));
    let extra = u32::from_be_bytes(image[table + 36..table + 40].try_into().unwrap()) as usize;
    let entry = image[table..table + 40 + extra].to_vec();
    assert_eq!(&image[table + 40 + extra + id_len..][..name_len], b"before1");
    image.truncate(table);
    for (number, name) in names.iter().enumerate() {
        let id = (number + 1).to_string();
        image.resize(image.len().next_multiple_of(8), 0);
        let start = image.len();
        image.extend(&entry);
        image[start + 12..start + 14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        image[start + 14..start + 16].copy_from_slice(&(name.len() as u16).to_be_bytes());
        image[start + 16..start + 20].copy_from_slice(&1_790_000_000u32.to_be_bytes());
        image[start + 24..start + 32].copy_from_slice(&90_061_234_567_890u64.to_be_bytes());
        if number % 2 == 1 {
            image[start + 32..start + 36].fill(0);
            image[start + 40..start + 48].fill(0);
        }
        image.extend(id.bytes());
        image.extend(name.bytes());
    }
    image[60..64].copy_from_slice(&(names.len() as u32).to_be_bytes());
    image
}

#[test]
fn snapshots_of_any_number_and_length_of_name_are_listed_and_read() {
    let dir = TempDir::new().unwrap();
    for number in 1..9 {
        let names: Vec<String> = (0..number).map(|at| "s".repeat(at * 3 + number)).collect();
        let image = file(&dir, "image.qcow2", &image_with_snapshots(&names));
        for (at, name) in names.iter().enumerate() {
            let ran = run(&dir, &format!("verify --snapshot {name} FILE"), &image);
            if at % 2 == 0 {
                assert_eq!(ran.code, Some(0), "{number} {name}: {}", ran.stderr);
                good(&dir, &format!("verify --snapshot {} FILE", at + 1), &image);
            } else {
                assert_eq!(ran.code, Some(2));
                assert!(ran.stderr.contains("has no VM state"), "{}", ran.stderr);
            }
        }
        let ran = run(&dir, "inspect FILE", &image);
        if number < 3 {
            assert_eq!(ran.code, Some(0), "only one has state: {}", ran.stderr);
            continue;
        }
        assert_eq!((ran.code, ran.stderr.lines().count()), (Some(2), 1));
        let state = "2026-09-21T14:13:20Z, 240.9 KiB of VM state, guest clock 0025:01:01.234";
        assert!(ran.stderr.contains(&format!("'{}' (ID 1, {state})", names[0])), "{}", ran.stderr);
        assert!(ran.stderr.contains(&format!("'{}' (ID 2, 2026-09-21T14:13:20Z, of the disk alone)", names[1])));
        let json = run(&dir, "inspect --json --snapshot 1 FILE", &image).json();
        let container = &json["containers"][0];
        assert_eq!(container["snapshots"].as_array().map(Vec::len), Some(number));
        assert_eq!(container["snapshot"]["name"].as_str(), Some(names[0].as_str()));
    }
}

#[test]
fn both_sides_of_a_comparison_can_be_snapshots() {
    let dir = TempDir::new().unwrap();
    let two = file(&dir, "two7.qcow2", &reported("two7.qcow2"));
    let plain = file(&dir, "base.q", &base());
    let none = "no differences\n";
    assert_eq!(good(&dir, "diff --snapshot before1 FILE FILE", &two), none);
    assert_eq!(good(&dir, "diff --snapshot before1 --snapshot 1 FILE FILE", &two), none);
    let other = run(&dir, "diff --no-ram --snapshot before1 --snapshot abcdefg FILE FILE", &two);
    assert!(other.code.is_some_and(|code| code < 2) && other.stderr.is_empty(), "{}", other.stderr);
    for words in [
        format!("diff --snapshot before1 {} FILE", plain.display()),
        format!("diff --snapshot 2 FILE {}", plain.display()),
    ] {
        assert_eq!(run(&dir, &words, &two).code, Some(1), "another guest: {words}");
    }
    for words in
        ["diff FILE FILE", "diff --snapshot 1 --snapshot 2 --snapshot 1 FILE FILE", "diff --snapshot x FILE FILE"]
    {
        assert_eq!(run(&dir, words, &two).code, Some(2), "{words}");
    }
    assert_eq!(run(&dir, "diff --snapshot x FILE FILE", &plain).code, Some(2), "no image");

    for words in [
        "check --snapshot before1 --against FILE FILE",
        "check --snapshot before1 --against-snapshot abcdefg --against FILE FILE",
        "check --against-snapshot 2 --against FILE DIR/base.q",
    ] {
        let ran = run(&dir, words, &two);
        assert!(ran.code.is_some_and(|code| code < 2), "{words}: {}", ran.stderr);
    }
    let unchosen = run(&dir, "check --against FILE DIR/base.q", &two);
    assert!(unchosen.code == Some(2) && unchosen.stderr.contains("--against-snapshot"), "{}", unchosen.stderr);
}
