//! Guests that run before their memory is loaded from a file.

use crate::Test;
use crate::incoming::wait_for_status;
use crate::lifecycle::Monitor;
use crate::qmp::{finished, refused};
use reference_vmm::payload::Progress;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;

pub(crate) const TESTS: &[Test] = &[
    ("lazy_a_guest_runs_while_its_memory_is_loaded", loaded_ahead),
    ("lazy_memory_stays_in_the_file_until_it_is_touched", left_in_the_file),
    ("lazy_a_file_that_is_cut_stops_the_guest_with_the_reason", cut_file),
];

pub(crate) fn capabilities(monitor: &mut Monitor, on: &[&str]) {
    let list: Vec<Value> = on.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    monitor.execute("migrate-set-capabilities", json!({ "capabilities": list }));
}

/// Waits until the guest has rewritten all of its memory twice from now on, and checked each page before; it has lost
/// nothing.
pub(crate) fn runs(monitor: &Monitor) {
    let seen = monitor.text().len();
    let passes = |text: &str| {
        let new = text.get(seen..).unwrap_or_default().lines();
        new.filter_map(Progress::parse).map(|progress| progress.pass).collect::<Vec<_>>()
    };
    monitor
        .wait_for("progress", |text| passes(text).first().zip(passes(text).last()).is_some_and(|(a, b)| *b >= a + 2));
    assert!(monitor.text().lines().filter_map(Progress::parse).all(|progress| progress.stale == 0));
}

fn save(directory: &Path) -> Value {
    let mut here = Monitor::start(directory, "here", "", &[]);
    runs(&here);
    capabilities(&mut here, &["mapped-ram"]);
    let uri = json!({ "uri": format!("file:{}", directory.join("guest").display()) });
    here.execute("migrate", uri.clone());
    assert_eq!(finished(&mut here.qmp)["status"], "completed");
    uri
}

fn loaded_ahead() {
    let directory = tempfile::tempdir().unwrap();
    let uri = save(directory.path());
    let memories: [&[&str]; 3] = [
        &[],
        &["--object", "memory-backend-memfd,id=microvm.ram,size=32M", "-M", "microvm,memory-backend=microvm.ram"],
        &["--mem-prealloc"],
    ];
    for (n, memory) in memories.into_iter().enumerate() {
        let options = [memory, &["--incoming", "defer"]].concat();
        let mut there = Monitor::start(directory.path(), &format!("there{n}"), "", &options);
        capabilities(&mut there, &["mapped-ram", "postcopy-ram"]);
        there.execute("migrate-incoming", uri.clone());
        let done = wait_for_status(&mut there, "completed");
        assert_eq!(done["ram"]["remaining"], 0, "{done}");
        assert_eq!(done["blocked-reasons"], Value::Null);
        assert_eq!(there.status(), "running");
        runs(&there);
        // It may leave again, but not to such a file under both capabilities.
        let why = refused(&mut there.qmp, "migrate", json!({ "uri": "file:/nonexistent" }));
        assert_eq!(why, "Mapped-ram migration is incompatible with postcopy");
    }
}

fn left_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let uri = save(directory.path());
    let options = ["--incoming", "defer", "--no-load-ahead"];
    let mut there = Monitor::start(directory.path(), "there", "", &options);
    capabilities(&mut there, &["mapped-ram", "postcopy-ram"]);
    there.execute("migrate-incoming", uri);
    wait_for_status(&mut there, "postcopy-active");
    // The guest is started after that.
    there.wait_for_events(&["RESUME"]);
    assert_eq!(there.status(), "running");
    let active = there.execute("query-migrate", json!({}));
    let reason = format!("guest memory is still being loaded from file:{}", directory.path().join("guest").display());
    assert_eq!(active["blocked-reasons"], json!([reason]));
    assert_eq!(refused(&mut there.qmp, "migrate", json!({ "uri": "unix:/nonexistent" })), reason);
    // The guest rewrites a MiB, and checks the page before it does. With a page comes what is around it in 64 KiB.
    runs(&there);
    let later = there.execute("query-migrate", json!({}));
    let (requests, remaining) = (&later["ram"]["postcopy-requests"], &later["ram"]["remaining"]);
    assert!(requests.as_u64().is_some_and(|requests| requests >= 16), "{later}");
    let before = &active["ram"]["remaining"];
    assert!(before.as_u64().is_some_and(|before| remaining.as_u64() <= Some(before)), "{later} after {active}");
}

/// The file is cut after the guest has started: pages that it has not touched are gone.
fn cut_file() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path());
    for stays in [false, true] {
        let path = directory.path().join(format!("copy{stays}"));
        fs::copy(directory.path().join("guest"), &path).unwrap();
        let options = ["--incoming", "defer", "--no-load-ahead", "-S"];
        let mut there = Monitor::start(directory.path(), &format!("there{stays}"), "", &options);
        capabilities(&mut there, &["mapped-ram", "postcopy-ram"]);
        let uri = json!({ "uri": format!("file:{}", path.display()), "exit-on-error": !stays });
        there.execute("migrate-incoming", uri);
        wait_for_status(&mut there, "postcopy-active");
        File::options().write(true).open(&path).unwrap().set_len(0x10_0000).unwrap();
        there.execute("cont", json!({}));
        if stays {
            let failed = wait_for_status(&mut there, "failed");
            assert!(failed["error-desc"].as_str().unwrap().contains("RAM block 'microvm.ram'"), "{failed}");
            assert_eq!(there.status(), "internal-error");
            let why = refused(&mut there.qmp, "cont", json!({}));
            assert!(why.starts_with("guest memory is lost: "), "{why}");
        } else {
            let (_, status) = there.end();
            assert_eq!(status.code(), Some(1));
            let last = there.said().lines().next_back().unwrap_or_default().to_owned();
            assert!(last.contains("load of migration failed") && last.contains("RAM block 'microvm.ram'"), "{last}");
        }
        assert!(
            there.text().lines().filter_map(Progress::parse).all(|progress| progress.stale == 0),
            "{}",
            there.text()
        );
    }
}
