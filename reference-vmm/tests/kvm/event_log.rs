//! `--event-log` has what happened, whether or not a QMP client was told.

use crate::Test;
use crate::lifecycle::Monitor;
use crate::qmp::finished;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

pub(crate) const TESTS: &[Test] = &[("event_log_tells_of_a_migration", tells_of_a_migration)];

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn tells_of_a_migration() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let log = |name: &str| file(name).display().to_string();
    let mut source = Monitor::start(directory.path(), "here", "", &["--event-log", &log("here.log")]);
    let waiting = ["--event-log", &log("there.log"), "--incoming", "defer"];
    let mut destination = Monitor::start(directory.path(), "there", "", &waiting);
    let uri = json!({ "uri": format!("unix:{}", file("migration").display()) });
    destination.execute("migrate-incoming", uri.clone());
    source.execute("migrate", uri);
    let told = finished(&mut source.qmp);
    assert_eq!(told["status"], "completed", "{told}");
    // A client is not told of the migration without capability events.
    assert!(source.qmp.events.iter().all(|event| event["event"] == "STOP"), "{:?}", source.qmp.events);
    for monitor in [&mut source, &mut destination] {
        monitor.execute("quit", json!({}));
        assert!(monitor.end().1.success());
    }

    let here = lines(&file("here.log"));
    let name = |line: &Value| match (&line["event"], &line["data"]["status"]) {
        (Value::String(name), Value::String(status)) => format!("{name} {status}"),
        (name, _) => name.as_str().unwrap().to_owned(),
    };
    let names: Vec<String> = here.iter().map(name).filter(|name| name != "MIGRATION_PASS").collect();
    let wanted = ["RESUME", "MIGRATION setup", "MIGRATION active", "STOP", "MIGRATION device", "MIGRATION completed"];
    assert_eq!(names[..6], wanted, "{names:?}");
    assert_eq!(names.last().map(String::as_str), Some("SHUTDOWN"));
    let seconds = |line: &Value| {
        line["timestamp"]["seconds"].as_f64().unwrap() * 1e6 + line["timestamp"]["microseconds"].as_f64().unwrap()
    };
    assert!(here.iter().map(seconds).is_sorted(), "{here:?}");
    // Each round with what is left of each part, and at the end what QMP says.
    let passes: Vec<&Value> = here.iter().filter(|line| line["event"] == "MIGRATION_PASS").collect();
    let last = passes.last().expect("the dirty log was read");
    let parts = last["x-migration"]["x-parts"].as_array().unwrap_or_else(|| panic!("{last}"));
    assert!(parts.iter().any(|part| part["name"] == "microvm.ram" && part["remaining"].is_u64()), "{last}");
    let end = here.iter().find(|line| line["data"]["status"] == "completed").unwrap();
    for member in ["downtime", "total-time", "ram"] {
        assert_eq!(end["x-migration"][member], told[member], "{end}");
    }
    // Both ends are reference-vmm's: what comes after the verdict is apart. Microseconds of parts are rounded down.
    let parts = end["x-migration"]["downtime-us"].as_object().unwrap_or_else(|| panic!("{end}"));
    let paused = parts.iter().filter(|(name, _)| *name != "confirm").map(|(_, us)| us.as_u64().unwrap()).sum::<u64>();
    let downtime = told["downtime"].as_u64().unwrap() * 1000;
    assert!((downtime.saturating_sub(10)..downtime + 1000).contains(&paused), "{end}");
    for part in ["stop", "device-state", "last-round", "send", "load"] {
        assert!(parts[part].as_u64() > Some(0), "{part}: {end}");
    }
    assert!(end["x-migration"]["rounds"].as_u64() >= Some(1) && end["x-migration"]["round"]["bytes"].is_u64(), "{end}");

    let there: Vec<String> = lines(&file("there.log")).iter().map(name).collect();
    assert!(there.ends_with(&["RESUME".into(), "MIGRATION completed".into(), "SHUTDOWN".into()]), "{there:?}");
}
