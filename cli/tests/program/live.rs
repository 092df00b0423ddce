//! `qevm check qmp:SOCKET`: two QEMUs that run, by what real ones have answered. See `qmp/README.md`.

use crate::sample::{Ran, file, qevm};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A QEMU that answers as the recorded one did; `change` is what is different about it.
fn machine(dir: &TempDir, name: &str, change: impl FnOnce(&mut Value)) -> String {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/qmp/{name}.json.xz"));
    let out = Command::new("xz").arg("-dc").arg(packed).output().expect("xz is part of every Debian");
    let mut recorded: Value = serde_json::from_slice(&out.stdout).expect("a recording");
    change(&mut recorded);
    let mut number = 0;
    let (listener, socket) = loop {
        let socket = dir.path().join(format!("{name}-{number}"));
        match UnixListener::bind(&socket) {
            Ok(listener) => break (listener, socket),
            Err(error) => assert!(number < 10, "{error}"),
        }
        number += 1;
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // Who has heard enough goes away.
            let _ = answer(&stream.unwrap(), &recorded);
        }
    });
    format!("qmp:{}", socket.display())
}

fn answer(stream: &UnixStream, recorded: &Value) -> std::io::Result<()> {
    let mut writer = stream;
    writeln!(writer, "{}", recorded["greeting"])?;
    for line in BufReader::new(stream).lines() {
        let command: Value = serde_json::from_str(&line?).expect("JSON");
        let name = command["execute"].as_str().expect("a command");
        let key = format!("{name} {}", command["arguments"]);
        let reply = match recorded["answers"].get(&key) {
            Some(reply) => reply.clone(),
            None => json!({"error": {"class": "CommandNotFound", "desc": format!("{key} was not recorded")}}),
        };
        // Events come at any time.
        writeln!(writer, "{}\n{reply}", json!({"event": "RTC_CHANGE", "data": {"offset": 0}}))?;
    }
    Ok(())
}

fn check(source: &str, destination: &str) -> Ran {
    qevm(["check", "--json", source, "--against", destination])
}

/// Subject and outcome of each finding.
fn findings(ran: &Ran) -> Vec<(String, String)> {
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let all = ran.json()["findings"].as_array().expect("a list").clone();
    all.iter().map(|finding| (text(finding, "subject"), text(finding, "outcome"))).collect()
}

#[test]
fn machines_set_up_alike_can_take_each_others_guest() {
    let dir = tempfile::tempdir().unwrap();
    let pairs = [("a", "a"), ("new", "old"), ("old", "new")];
    for (source, destination) in pairs {
        let ran = check(&machine(&dir, source, |_| {}), &machine(&dir, destination, |_| {}));
        assert_eq!((ran.code, findings(&ran)), (Some(0), vec![]), "{source} to {destination}: {}", ran.stderr);
        let compared = ran.json()["compared"].as_array().unwrap().len();
        assert_eq!(compared, 10, "{}", ran.stdout);
    }
}

#[test]
fn what_differs_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let ran = check(&machine(&dir, "a", |_| {}), &machine(&dir, "other", |_| {}));
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let found = findings(&ran);
    for (subject, outcome) in [
        ("capability multifd", "fails"),
        ("RAM block '/rom@etc/acpi/tables'", ""),
        ("processors", "fails"),
        ("possible processors", "fails"),
        ("property vectors of virtio-net-pci at pcie.0 02.0", "fails"),
        ("property slot of pcie-root-port at pcie.0 03.0", "fails"),
        ("device virtio-rng-pci at rp 00.0", "fails"),
    ] {
        let outcomes: Vec<_> = found.iter().filter(|(name, _)| name == subject).map(|(_, is)| is.as_str()).collect();
        let expected: Vec<_> = Some(outcome).filter(|outcome| !outcome.is_empty()).into_iter().collect();
        assert_eq!(outcomes, expected, "{subject}: {found:?}");
    }
    // For people, with what to do.
    let ran = qevm(["check", &machine(&dir, "a", |_| {}), "--against", &machine(&dir, "other", |_| {})]);
    assert!(
        ran.stdout.contains("-smp 2") && ran.stdout.contains("the destination will refuse the guest"),
        "{}",
        ran.stdout
    );
}

#[test]
fn flags_that_the_destination_lacks_are_not_decidable() {
    let dir = tempfile::tempdir().unwrap();
    let ran = check(&machine(&dir, "a", |_| {}), &machine(&dir, "flags", |_| {}));
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let subject = "flags of the processor (qemu64-x86_64-cpu)".to_owned();
    assert_eq!(findings(&ran), [(subject, "may fail".to_owned())]);
    assert_eq!(ran.json()["findings"][0]["source"], "pni, sse3");
    // A guest does not miss what it has never seen.
    let ran = check(&machine(&dir, "flags", |_| {}), &machine(&dir, "a", |_| {}));
    assert_eq!((ran.code, findings(&ran)), (Some(0), vec![]));
}

#[test]
fn dumps_and_domains_tell_of_a_destination_too() {
    let dir = tempfile::tempdir().unwrap();
    let source = machine(&dir, "a", |_| {});
    let dump = |machine: &str| {
        let fields = [json!({"field": "cpu_ticks_offset", "version_id": 0, "field_exists": false, "size": 8})];
        let description = json!({"name": "timer", "version_id": 2, "minimum_version_id": 1, "Fields": fields});
        let timer = json!({"Name": "timer", "version_id": 2, "minimum_version_id": 1, "Description": description});
        json!({"vmschkmachine": {"Name": machine}, "timer": timer}).to_string().into_bytes()
    };
    for (machine, code) in [("pc-q35-11.1", 0), ("pc-q35-10.0", 1)] {
        let dump = file(&dir, "x.vmstate", &dump(machine)).display().to_string();
        let ran = check(&source, &dump);
        assert_eq!(ran.code, Some(code), "{machine}: {}", ran.stderr);
    }
    let address = |bus, slot| format!("<address type='pci' domain='0x0000' bus='{bus}' slot='{slot}' function='0x0'/>");
    let domain = |memory, net: &str| {
        format!(
            "<domain type='qemu'><memory unit='MiB'>{memory}</memory><vcpu>2</vcpu>
            <os><type arch='x86_64' machine='pc-q35-11.1'>hvm</type></os><devices>
            <interface type='user'><model type='virtio'/>{net}</interface>
            <controller type='pci' model='pcie-root-port'>{}</controller></devices></domain>",
            address("0x00", "0x03")
        )
    };
    // The port of the recording has another name than libvirt gives one.
    let on_port = "device virtio-rng-pci at rp 00.0";
    for (xml, expected) in [
        (domain(64, &address("0x00", "0x02")), vec![on_port]),
        (domain(32, &address("0x00", "0x02")), vec!["memory", on_port]),
        (domain(64, &address("0x00", "0x04")), vec!["device virtio-net-pci at pcie.0 02.0", on_port]),
    ] {
        let xml = file(&dir, "guest.xml", xml.as_bytes()).display().to_string();
        let ran = check(&source, &xml);
        let subjects: Vec<_> = findings(&ran).into_iter().map(|(subject, _)| subject).collect();
        assert_eq!((ran.code, subjects), (Some(1), expected.iter().map(|&name| name.to_owned()).collect()));
    }
}

#[test]
fn what_is_no_qemu_is_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let good = machine(&dir, "a", |_| {});
    let silent = dir.path().join("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let rude = machine(&dir, "a", |recorded| recorded["greeting"] = json!({"hello": 1}));
    let stream = file(&dir, "stream", &crate::sample::stream("5.2-plain")).display().to_string();
    for (source, destination) in [
        (format!("qmp:{}", silent.display()), good.clone()),
        (rude, good.clone()),
        ("qmp:/nonexistent/socket".to_owned(), good.clone()),
        (good.clone(), stream.clone()),
        (good.clone(), "/nonexistent/file".to_owned()),
        (stream, good),
    ] {
        let ran = check(&source, &destination);
        assert_eq!(ran.code, Some(2), "{source} against {destination}: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    }
}
