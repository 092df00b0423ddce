//! `qevm check`: its verdict, its exit codes, and what it says.

use crate::sample::{file, path, qevm, stream};

fn recorded(name: &str) -> String {
    path(&format!("{name}.zst")).display().to_string()
}

#[test]
fn a_stream_loads_where_it_came_from() {
    let stream = recorded("7.2-return-path");
    let ran = qevm(["check", &stream, "--against", &stream]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(ran.stdout.starts_with("nothing stops the stream from loading: no differences"), "{}", ran.stdout);
    let json = qevm(["check", "--json", &stream, "--against", &stream]).json();
    assert_eq!((json["verdict"].as_str(), json["findings"].as_array().map(Vec::len)), (Some("loads"), Some(0)));
    assert_eq!(json["compared"].as_array().map(Vec::len), Some(6));
}

#[test]
fn what_is_known_of_the_destination_is_compared() {
    let stream = recorded("7.2-return-path");
    let arguments = ["check", "--json", &stream, "--machine", "pc-q35-7.2", "--ram-block", "mem=8M", "--qemu", "7.2"];
    let ran = qevm(arguments);
    assert_eq!(ran.code, Some(1));
    let json = ran.json();
    let said: Vec<_> = json["findings"].as_array().unwrap().iter().map(|f| f["qemu_says"].as_str().unwrap()).collect();
    let machine = "Machine type received is 'microvm' and local is 'pc-q35-7.2'";
    assert_eq!(said, [machine, "Size mismatch: mem: 0x400000 != 0x800000: Invalid argument"]);
    assert_eq!((json["verdict"].as_str(), json["error"].is_null()), (Some("fails"), true));

    let text = qevm(["check", &stream, "--ram-block", "mem=0x400001"]);
    assert_eq!(text.code, Some(1));
    for words in ["RAM block 'mem'", "0x400000 bytes", "0x400001 bytes", "usual cause:", "1 fatal"] {
        assert!(text.stdout.contains(words), "{words}: {}", text.stdout);
    }
    // The source turned postcopy on; a destination that did not refuses its advice.
    let postcopy = recorded("7.2-postcopy");
    assert_eq!(qevm(["check", &postcopy, "--capability", "postcopy-ram=off"]).code, Some(1));
    assert_eq!(qevm(["check", &postcopy, "--capability", "postcopy-ram=on"]).code, Some(0));
}

#[test]
fn a_newer_stream_does_not_load_in_an_older_release() {
    let (new, old) = (recorded("11.1-mapped-ram"), recorded("7.2-return-path"));
    let json = qevm(["check", "--json", "--offset", "4096", &new, "--against", &old]).json();
    let fails = |kind: &str, name: &str| {
        let findings = json["findings"].as_array().unwrap();
        findings.iter().any(|f| f["kind"] == kind && f["name"] == name && f["outcome"] == "fails")
    };
    assert!(fails("command", "SWITCHOVER_START") && fails("capability", "mapped-ram"), "{json}");
}

#[test]
fn a_bad_stream_and_a_bad_destination_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let whole = stream("5.2-plain");
    let cut = file(&dir, "cut", &whole[..whole.len() / 2]).display().to_string();
    let good = recorded("5.2-plain");
    let ran = qevm(["check", "--json", &cut, "--against", &good]);
    let json = ran.json();
    assert_eq!(
        (ran.code, json["verdict"].as_str(), json["error"]["kind"].as_str()),
        (Some(1), Some("fails"), Some("truncated"))
    );
    assert_eq!(ran.stderr.lines().count(), 1);

    let schema = file(&dir, "schema", b" {\"rtc\": {\"Name\": 7}").display().to_string();
    for arguments in [
        &["check", &good][..],
        &["check", &good, "--against", &cut],
        &["check", &good, "--against", &schema],
        &["check", &good, "--against", "/nonexistent/stream"],
        &["check", &good, "--capability", "multi-fd=on"],
        &["check", &good, "--capability", "multifd"],
        &["check", &good, "--ram-block", "pc.ram=16E"],
        &["check", &good, "--ram-block", "pc.ram=99999999999T"],
        &["check", &good, "--uuid", "2bbd4b29"],
    ] {
        let ran = qevm(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        assert!(!ran.stderr.is_empty() && ran.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_schema_tells_of_device_models() {
    let dir = tempfile::tempdir().unwrap();
    let old = r#"{"vmschkmachine": {"Name": "microvm"}, "mc146818rtc": {"Name": "mc146818rtc", "Description": {"name":
        "mc146818rtc", "version_id": 2, "minimum_version_id": 1, "Fields": []}}}"#;
    let schema = file(&dir, "schema.json", old.as_bytes()).display().to_string();
    let ran = qevm(["check", "--json", &recorded("7.2-return-path"), "--against", &schema]);
    let finding = &ran.json()["findings"][0];
    assert_eq!((ran.code, finding["name"].as_str()), (Some(1), Some("mc146818rtc")));
    assert_eq!((finding["found"].as_str(), finding["expected"].as_str()), (Some("version 3"), Some("versions 1 to 2")));
}

/// Two streams of `streams/reported`, and what the QEMU that would load the first says.
fn reported(stream: &str, destination: &str) -> crate::sample::Ran {
    let [stream, destination] = [stream, destination].map(|name| path(&format!("reported/{name}.q.xz")));
    qevm(["check".into(), stream, "--against".into(), destination])
}

#[test]
fn what_qemu_refuses_is_refused() {
    let refused = [
        ("blkq-a", "blkq-b", "VQ 0 vring.num 256 exceeds allocated max 128"),
        ("x-100-111-rng-a", "x-100-111-rng-b", "VQ 0 vring.num 1024 exceeds allocated max 8"),
        ("rpslot-a", "rpslot-b", "get_pci_config_device: Bad config data: i=0x6a read: a device: 12"),
        ("maxcpus4", "maxcpus8", "-smp maxcpus="),
        ("maxcpus8", "maxcpus4", "-smp maxcpus="),
        ("slots2", "slots4", "-m slots="),
        ("slots4", "slots2", "-m slots="),
    ];
    for (stream, destination, words) in refused {
        let ran = reported(stream, destination);
        assert_eq!(ran.code, Some(1), "{stream} to {destination}: {}{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains(words), "{stream} to {destination}: {}", ran.stdout);
    }
}

#[test]
fn what_qemu_loads_is_not_suspected() {
    for (stream, destination) in [("blkq-b", "blkq-a"), ("x-111-100-a", "x-111-100-b"), ("blkq-a", "blkq-a")] {
        let ran = reported(stream, destination);
        assert_eq!(ran.code, Some(0), "{stream} to {destination}: {}{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains("nothing stops the stream from loading"), "{stream}: {}", ran.stdout);
    }
}

/// Without a stream of the destination it is unknown how long its queues are.
#[test]
fn a_queue_that_no_driver_has_set_up_is_doubtful() {
    let stream = path("reported/x-100-111-rng-a.q.xz");
    let ran = qevm(["check".into(), stream, "--qemu".into(), "11.1".into(), "--machine".into(), "pc-q35-10.0".into()]);
    assert_eq!(ran.code, Some(3), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("the destination may refuse the stream"), "{}", ran.stdout);
    assert!(ran.stdout.contains("not decidable") && ran.stdout.contains("--against FILE"), "{}", ran.stdout);
}
