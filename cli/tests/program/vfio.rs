//! Migrations with VFIO devices, recorded from QEMU (savevm/tests/data/vfio): the configuration is named to the
//! register, and the devices' own data are counted wherever they come.

use crate::sample::{Ran, file, qevm};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Bytes that the sample device `mtty` with two ports sends. (kernel documentation of the sample)
const MTTY: u64 = 96;
const SECTION: &str = "0000:00:01.0/vfio";

fn recorded(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../savevm/tests/data/vfio").join(format!("{name}.zst"));
    zstd::decode_all(&std::fs::read(&path).unwrap()[..]).unwrap()
}

/// The files of a recording: the main channel first.
fn files(dir: &tempfile::TempDir, name: &str) -> Vec<PathBuf> {
    let names = [name.to_owned(), format!("{name}-channel-1"), format!("{name}-channel-2")];
    let count = if name.ends_with("multifd") { 3 } else { 1 };
    names[..count].iter().map(|name| file(dir, name, &recorded(name))).collect()
}

fn arguments(files: &[PathBuf]) -> Vec<String> {
    let [main, channels @ ..] = files else { panic!("no files") };
    let channels = channels.iter().map(|path| format!("--channel={}", path.display()));
    channels.chain([main.display().to_string()]).collect()
}

fn inspect(files: &[PathBuf], more: &[&str]) -> Ran {
    let all = ["inspect", "--json", "--fields"].iter().chain(more).map(|word| (*word).to_owned());
    qevm(all.chain(arguments(files)))
}

/// Path and value of each field of a section, in order.
fn fields(report: &Value, section: &str) -> Vec<(String, Value)> {
    let all = report["fields"].as_array().expect("a list of fields").iter();
    let of = all.filter(|field| field["idstr"] == section);
    of.map(|field| (field["path"].as_str().unwrap().to_owned(), field["value"].clone())).collect()
}

#[test]
fn the_configuration_is_named_to_the_register_on_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut first: Option<Vec<_>> = None;
    for name in ["11.1-plain", "11.1-ack", "10.0-ack", "11.1-multifd", "10.0-multifd", "11.1-two-devices"] {
        let files = files(&dir, name);
        for more in [&[][..], &["--no-description"]] {
            let ran = inspect(&files, more);
            assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr);
            let report = ran.json();
            assert_eq!(report["opaque_bytes"], 0, "{name}: {}", report["notes"]);
            let devices = if name == "11.1-two-devices" { 2 } else { 1 };
            assert_eq!(report["device_bytes"], devices * MTTY, "{name}");
            let fields = fields(&report, SECTION);
            let value = |path: &str| {
                let path = format!("parent_obj.config.{path}");
                let found = fields.iter().find(|field| field.0 == path);
                found.unwrap_or_else(|| panic!("{name}: no {path}")).1.as_u64().unwrap()
            };
            // Linux's samples/vfio-mdev/mtty: its IDs, a serial port of type 16550.
            assert_eq!((value("vendor_id"), value("device_id")), (0x4348, 0x3253));
            assert_eq!((value("class"), value("subclass"), value("programming_interface")), (7, 0, 2));
            assert_eq!((value("interrupt_pin"), value("command")), (1, 0));
            assert_eq!((value("bar0") & 1, value("bar1") & 1), (1, 1), "two ports of I/O");
            let all = first.get_or_insert_with(|| fields.clone());
            assert_eq!(*all, fields, "{name} {more:?}");
        }
    }
}

#[test]
fn a_register_that_differs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = recorded("11.1-plain");
    let whole = file(&dir, "whole", &bytes);
    let report = inspect(std::slice::from_ref(&whole), &[]).json();
    let all = report["fields"].as_array().unwrap();
    let line = all.iter().find(|field| field["path"] == "parent_obj.config.interrupt_line").unwrap();
    let mut other = bytes;
    other[line["offset"].as_u64().unwrap() as usize] = 0x5a;
    let other = file(&dir, "other", &other);
    let ran = qevm(["diff".as_ref(), "--json".as_ref(), whole.as_os_str(), other.as_os_str()]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let report = ran.json();
    let [difference] = &report["differences"].as_array().unwrap()[..] else { panic!("{report}") };
    assert_eq!(difference["place"], format!("{SECTION} instance 0 › parent_obj.config.interrupt_line"));
    assert_eq!((&difference["first"], &difference["second"]), (&"0x0".into(), &"0x5a".into()));
}
