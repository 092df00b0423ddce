//! Snapshots of a guest that runs on (capability `background-snapshot`).

use crate::Test;
use crate::incoming::wait_for_status;
use crate::lazy::{capabilities, runs};
use crate::lifecycle::Monitor;
use crate::qmp::{finished, refused};
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::path::Path;

pub(crate) const TESTS: &[Test] = &[
    ("snapshot_is_of_one_instant_of_a_guest_that_runs_on", of_one_instant),
    ("snapshot_of_a_stopped_guest_leaves_it_stopped", of_a_stopped_guest),
    ("snapshot_that_fails_leaves_the_guest_running", failed),
    ("snapshot_for_a_peer_that_takes_nothing_does_not_hold_the_guest_up", for_no_peer),
];

/// Takes a snapshot at first so slowly that the guest has written to its pages again and again before their turn comes.
fn take(here: &mut Monitor, path: &Path, capability: &[&str]) -> Value {
    capabilities(here, &[&["background-snapshot"], capability].concat());
    here.execute("migrate-set-parameters", json!({ "max-bandwidth": 64 << 10 }));
    let uri = json!({ "uri": format!("file:{}", path.display()) });
    here.execute("migrate", uri.clone());
    wait_for_status(here, "active");
    if here.status() == "running" {
        runs(here);
    }
    assert_eq!(here.execute("query-migrate", json!({}))["status"], "active");
    here.execute("migrate-set-parameters", json!({ "max-bandwidth": 10u64 << 30 }));
    let done = finished(&mut here.qmp);
    assert_eq!(done["status"], "completed", "{done}");
    assert_eq!(done["ram"]["remaining"], 0, "{done}");
    uri
}

fn of_one_instant() {
    let directory = tempfile::tempdir().unwrap();
    let memories: [&[&str]; 2] = [
        &[],
        &["--object", "memory-backend-memfd,id=microvm.ram,size=32M", "-M", "microvm,memory-backend=microvm.ram"],
    ];
    for (n, memory) in memories.into_iter().enumerate() {
        let mut here = Monitor::start(directory.path(), &format!("here{n}"), "", memory);
        runs(&here);
        for capability in [&[][..], &["mapped-ram"]] {
            let name = format!("{n}-{}", capability.len());
            let uri = take(&mut here, &directory.path().join(&name), capability);
            assert_eq!(here.status(), "running");
            let mut there = Monitor::start(
                directory.path(),
                &format!("there{name}"),
                "",
                &[memory, &["--incoming", "defer"]].concat(),
            );
            capabilities(&mut there, capability);
            there.execute("migrate-incoming", uri);
            wait_for_status(&mut there, "completed");
            // Who checks each page before it rewrites it knows whether they are of one instant.
            runs(&there);
        }
        // Nothing of it is left here.
        runs(&here);
    }
}

fn of_a_stopped_guest() {
    let directory = tempfile::tempdir().unwrap();
    let mut here = Monitor::start(directory.path(), "here", "", &[]);
    runs(&here);
    here.execute("stop", json!({}));
    let uri = take(&mut here, &directory.path().join("guest"), &[]);
    assert_eq!(here.status(), "paused");
    let mut there = Monitor::start(directory.path(), "there", "", &["--incoming", "defer"]);
    there.execute("migrate-incoming", uri);
    wait_for_status(&mut there, "completed");
    assert_eq!(there.status(), "paused");
    for monitor in [&mut here, &mut there] {
        monitor.execute("cont", json!({}));
    }
    runs(&here);
    runs(&there);
}

fn failed() {
    let directory = tempfile::tempdir().unwrap();
    let mut here = Monitor::start(directory.path(), "here", "", &[]);
    // It has written more than the pipe and its reader take.
    runs(&here);
    capabilities(&mut here, &["background-snapshot"]);
    here.execute("migrate", json!({ "uri": "exec:head -c 100000 >/dev/null" }));
    let done = finished(&mut here.qmp);
    assert_eq!(done["status"], "failed", "{done}");
    assert_eq!(here.status(), "running");
    runs(&here);
    // What does not go with it is refused in QEMU's words.
    let both = json!({ "capabilities": [{ "capability": "return-path", "state": true }] });
    let why = refused(&mut here.qmp, "migrate-set-capabilities", both);
    assert_eq!(why, "Background-snapshot is not compatible with return-path");
    // And the next one is whole.
    take(&mut here, &directory.path().join("guest"), &[]);
}

fn for_no_peer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nobody");
    let _nobody = UnixListener::bind(&path).unwrap();
    let mut here = Monitor::start(directory.path(), "here", "", &[]);
    runs(&here);
    capabilities(&mut here, &["background-snapshot"]);
    here.execute("migrate", json!({ "uri": format!("unix:{}", path.display()) }));
    wait_for_status(&mut here, "active");
    // The guest writes, and can be stopped, though no page goes.
    runs(&here);
    here.execute("stop", json!({}));
    here.execute("cont", json!({}));
    assert_eq!(here.execute("query-migrate", json!({}))["status"], "active");
    here.execute("migrate_cancel", json!({}));
    assert_eq!(finished(&mut here.qmp)["status"], "cancelled");
    assert_eq!(here.status(), "running");
    runs(&here);
}
