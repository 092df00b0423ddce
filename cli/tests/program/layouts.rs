//! Device sections read without the description of their stream: by known layouts, and by a schema of QEMU's.

use crate::sample::{Ran, file, qevm, stream};
use serde_json::Value;
use std::io::Read;
use std::path::PathBuf;

/// Streams that have a description, and what `inspect` needs besides their file.
const DESCRIBED: [(&str, &str); 3] =
    [("5.2-plain", "--offset=0"), ("7.2-return-path", "--offset=0"), ("11.1-mapped-ram", "--offset=4096")];

fn inspect(path: &std::path::Path, more: &[&str]) -> Ran {
    let all = ["inspect", "--json", "--fields"].iter().chain(more).copied().chain(path.to_str());
    qevm(all)
}

fn fields(report: &Value) -> &Vec<Value> {
    report["fields"].as_array().expect("a list of fields")
}

/// `-dump-vmstate` of the release that wrote `stream`.
fn schema(dir: &tempfile::TempDir, stream: &str) -> PathBuf {
    let release = stream.split('-').next().unwrap();
    let dumps = concat!(env!("CARGO_MANIFEST_DIR"), "/../devices/tests/data/dump-vmstate");
    let packed = std::fs::File::open(format!("{dumps}/{release}.json.gz")).expect("a recorded dump");
    let mut text = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut text).expect("a whole gzip file");
    file(dir, "schema.json", &text)
}

#[test]
fn known_layouts_give_the_fields_that_the_description_gives() {
    let dir = tempfile::tempdir().unwrap();
    for (name, offset) in DESCRIBED {
        let path = file(&dir, name, &stream(name));
        let described = inspect(&path, &[offset]).json();
        let known = inspect(&path, &[offset, "--no-description"]).json();
        assert!(fields(&described).len() > 200, "{name}: {}", fields(&described).len());
        assert_eq!(known["opaque_bytes"], 0, "{name}: {}", known["notes"]);
        for (known, described) in fields(&known).iter().zip(fields(&described)) {
            assert_eq!(known, described, "{name}");
        }
        assert_eq!(fields(&known).len(), fields(&described).len());
    }
}

#[test]
fn a_schema_gives_the_values_that_the_description_gives() {
    let dir = tempfile::tempdir().unwrap();
    for (name, offset) in DESCRIBED {
        let path = file(&dir, name, &stream(name));
        let schema = format!("--schema={}", schema(&dir, name).display());
        let described = inspect(&path, &[offset]).json();
        let read = inspect(&path, &[offset, "--no-description", &schema]).json();
        assert_eq!(read["opaque_bytes"], 0, "{name}: {}", read["notes"]);
        // A schema knows no types: what it reads as a number may be signed or a flag.
        let by_schema = |field: &&Value| field["type"] == "number";
        let place = |field: &Value| (field["offset"].clone(), field["idstr"].clone(), field["size"].clone());
        let places: Vec<_> = fields(&described).iter().map(place).collect();
        let numbers: Vec<_> = fields(&read).iter().filter(by_schema).collect();
        assert!(name.starts_with("11") == (numbers.len() > 50), "{name}: {} numbers", numbers.len());
        for number in numbers {
            let at = places.iter().position(|known| *known == place(number));
            let same = at.unwrap_or_else(|| panic!("{name}: {number} is no field of the description"));
            let described = &fields(&described)[same];
            let strip = |path: &Value| path.as_str().unwrap().replace(['[', ']'], "");
            assert!(strip(&described["path"]).starts_with(&strip(&number["path"])), "{number} and {described}");
            match (number["value"].as_u64(), described["value"].as_i64()) {
                (Some(number), Some(described)) if described >= 0 => assert_eq!(number, described as u64),
                _ => {}
            }
        }
    }
}

#[test]
fn what_is_there_of_a_truncated_stream_is_shown_before_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let whole = stream("7.2-return-path");
    let described = inspect(&file(&dir, "whole", &whole), &[]).json();
    let serial = described["sections"].as_array().unwrap().last().unwrap()["offset"].as_u64().unwrap();
    let cut = file(&dir, "cut", &whole[..serial as usize + 20]);
    let schema = format!("--schema={}", schema(&dir, "7.2").display());
    for more in [&[][..], &[schema.as_str()]] {
        let ran = inspect(&cut, more);
        let report = ran.json();
        assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{}", ran.stderr);
        assert_eq!(report["error"]["kind"], "truncated");
        assert_eq!(report["opaque_bytes"], 0, "{}", report["notes"]);
        let before = |field: &&Value| field["offset"].as_u64().unwrap() < serial;
        assert_eq!(fields(&report).len(), fields(&described).iter().filter(before).count());
    }
}

#[test]
fn what_nothing_explains_is_said_to_be_opaque() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = stream("7.2-postcopy");
    let at = bytes.windows(5).position(|window| window == b"i8259").unwrap();
    bytes[at + 4] = b'x';
    let verify = |bytes: &[u8]| qevm(["verify".as_ref(), "--json".as_ref(), file(&dir, "s", bytes).as_os_str()]);
    let ran = verify(&bytes);
    assert_eq!((ran.code, &ran.json()["opaque_bytes"]), (Some(0), &16.into()));
    let ran = qevm(["verify".as_ref(), file(&dir, "s", &bytes).as_os_str()]);
    assert!(ran.stdout.contains("'i825x'") && ran.stdout.contains("16 of 16 bytes opaque"), "{}", ran.stdout);
    assert!(ran.stdout.contains("no layout of this name and version is known"), "{}", ran.stdout);
}

#[test]
fn a_schema_that_is_none_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "stream", &stream("5.2-plain"));
    let bad = file(&dir, "bad.json", b"{\"ioapic\": 1}");
    let with = |schema: &str| inspect(&path, &["--schema", schema]);
    let ran = with(bad.to_str().unwrap());
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{}", ran.stderr);
    assert!(ran.stderr.contains("bad.json"), "{}", ran.stderr);
    let ran = with("/nonexistent/schema");
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(2), 1), "{}", ran.stderr);
}

#[test]
fn device_state_is_extracted_as_json_down_to_each_field() {
    let dir = tempfile::tempdir().unwrap();
    let main = file(&dir, "stream", &stream("7.2-return-path"));
    let out = dir.path().join("devices.json");
    let extract = || qevm(["extract", "--json", "--devices", out.to_str().unwrap(), main.to_str().unwrap()]);
    let ran = extract();
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert_eq!(ran.json()["files"][0]["content"], "14 device sections");
    let devices: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!(devices["machine"], "microvm");
    // The leaves are those that `inspect` lists, in the same order.
    fn leaves<'a>(field: &'a Value, found: &mut Vec<(&'a Value, &'a Value)>) {
        match field["fields"].as_array() {
            Some(fields) => fields.iter().for_each(|field| leaves(field, found)),
            None => found.push((&field["offset"], &field["value"])),
        }
    }
    let mut extracted = Vec::new();
    let sections = devices["sections"].as_array().unwrap();
    sections.iter().for_each(|section| leaves(section, &mut extracted));
    let inspected = inspect(&main, &[]).json();
    let listed: Vec<_> = fields(&inspected).iter().map(|field| (&field["offset"], &field["value"])).collect();
    assert_eq!(extracted, listed);
    let ids: Vec<_> = sections.iter().map(|section| (&section["idstr"], &section["instance_id"])).collect();
    assert!(ids.contains(&(&"i8259".into(), &1.into())), "{ids:?}");
    // Nothing is overwritten.
    assert_eq!(extract().code, Some(2));
}
