//! Who uses the image of a disk during a migration, and what `late-block-activate` does to that.

use crate::Test;
use crate::guest::{Guest, PATIENCE};
use qevm_wire::{Profile, QemuVersion};
use reference_vmm::devices::{Block, BlockOptions, VirtioSlot};
use reference_vmm::qmp::{Client, ClientError, Server};
use reference_vmm::vmm::Vmm;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("drives_go_with_a_guest_that_stands_still", go_with_a_guest_that_stands_still),
    ("drives_stay_free_until_cont_under_late_block_activate", stay_free_until_cont),
    ("drives_are_the_sources_before_the_switchover", are_the_sources_before_the_switchover),
    ("drives_that_somebody_else_uses_keep_the_guest_at_the_source", keep_the_guest_at_the_source),
];

/// The bytes of the locks for a disk that is written (`/proc/locks` of QEMU 11.1).
const USED_FOR_WRITING: i64 = 101;
const NOBODY_ELSE_WRITES: i64 = 201;

fn lock(file: &File, operation: i32, kind: i32, byte: i64) -> bool {
    let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
    let mut lock = libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 };
    // SAFETY: the descriptor is open, and the lock is there to be read and written.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), operation, &mut lock) }, 0);
    i32::from(lock.l_type) != libc::F_UNLCK
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Whether a monitor uses the image.
fn is_used(path: &Path) -> bool {
    let file = open(path);
    [USED_FOR_WRITING, NOBODY_ELSE_WRITES].map(|byte| lock(&file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)) == [true; 2]
}

/// Another process uses the image until the result is dropped.
fn intrude(path: &Path) -> File {
    let file = open(path);
    lock(&file, libc::F_OFD_SETLK, libc::F_RDLCK, NOBODY_ELSE_WRITES);
    file
}

struct Side {
    vmm: Arc<Vmm>,
    _server: Server,
    qmp: Client,
}

impl Side {
    fn new(directory: &Path, name: &str, image: &Path, incoming: bool) -> Side {
        File::options().create(true).append(true).open(image).unwrap().set_len(1 << 20).unwrap();
        let block = Block::open(BlockOptions { file: image.into(), ..BlockOptions::default() }).unwrap();
        let Guest { machine, .. } = Guest::configured(32 << 20, 1, "dirty=1M hold=1M zero=1M", |config| {
            config.virtio = vec![VirtioSlot::block(block)];
        });
        let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), incoming);
        let path = directory.join(name);
        let server = Server::start(&path, vmm.clone()).unwrap();
        Side { vmm, _server: server, qmp: Client::connect(&path, PATIENCE).unwrap() }
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    fn refused(&mut self, command: &str) -> String {
        match self.qmp.execute(command, json!({})) {
            Err(ClientError::Refused { desc, .. }) => desc,
            other => panic!("{command}: {other:?}"),
        }
    }

    fn switch_on(&mut self, names: &[&str]) {
        let list: Vec<_> = names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list }));
    }

    fn status(&mut self) -> String {
        let told = self.execute("query-migrate", json!({}));
        told["status"].as_str().unwrap_or_default().to_owned()
    }

    fn wait(&mut self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.status() != wanted {
            assert!(Instant::now() < deadline, "{} instead of {wanted}", self.execute("query-migrate", json!({})));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_running(&mut self) -> bool {
        self.execute("query-status", json!({}))["running"] == true
    }
}

fn start(here: &mut Side, there: &mut Side, directory: &Path) {
    let uri = json!({ "uri": format!("unix:{}", directory.join("stream").display()) });
    there.execute("migrate-incoming", uri.clone());
    here.execute("migrate", uri);
}

fn go_with_a_guest_that_stands_still() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    let mut here = Side::new(directory.path(), "here", &image, false);
    let mut there = Side::new(directory.path(), "there", &image, true);
    assert!(!is_used(&image), "a machine that waits for a guest uses no disk");
    here.vmm.machine().activate().unwrap();
    assert!(is_used(&image));
    start(&mut here, &mut there, directory.path());
    here.wait("completed");
    there.wait("completed");
    assert!(!there.is_running());
    assert!(is_used(&image), "the destination has locked the disk though the guest is paused");
    assert!(here.refused("cont").contains("Failed to get \"write\" lock"));
    there.execute("cont", json!({}));
    assert!(there.is_running() && is_used(&image));
}

fn stay_free_until_cont() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    let mut here = Side::new(directory.path(), "here", &image, false);
    let mut there = Side::new(directory.path(), "there", &image, true);
    there.switch_on(&["late-block-activate"]);
    here.vmm.machine().activate().unwrap();
    start(&mut here, &mut there, directory.path());
    here.wait("completed");
    there.wait("completed");
    assert!(!there.is_running() && !is_used(&image));
    let intruder = intrude(&image);
    assert!(there.refused("cont").contains("Failed to get \"write\" lock"));
    assert!(!there.is_running());
    drop(intruder);
    there.execute("cont", json!({}));
    assert!(there.is_running() && is_used(&image));
    assert!(here.refused("cont").contains("Is another process using the image"));
}

fn are_the_sources_before_the_switchover() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    let mut here = Side::new(directory.path(), "here", &image, false);
    let mut there = Side::new(directory.path(), "there", &image, true);
    here.execute("cont", json!({}));
    here.switch_on(&["pause-before-switchover", "return-path"]);
    there.switch_on(&["late-block-activate", "return-path"]);
    start(&mut here, &mut there, directory.path());
    here.wait("pre-switchover");
    assert!(is_used(&image) && !here.is_running());
    here.execute("migrate_cancel", json!({}));
    here.wait("cancelled");
    assert!(is_used(&image) && here.is_running(), "a guest that has stayed has its disk");

    let mut there = Side::new(directory.path(), "again", &image, true);
    there.switch_on(&["late-block-activate", "return-path"]);
    std::fs::remove_file(directory.path().join("stream")).ok();
    start(&mut here, &mut there, directory.path());
    here.wait("pre-switchover");
    here.execute("migrate-continue", json!({ "state": "pre-switchover" }));
    here.wait("completed");
    let deadline = Instant::now() + PATIENCE;
    while !there.is_running() {
        assert!(Instant::now() < deadline, "the guest does not start");
    }
    assert!(is_used(&image), "it runs, so that its disk is locked, late or not");
}

fn keep_the_guest_at_the_source() {
    let directory = tempfile::tempdir().unwrap();
    // Two copies, as of a disk that is mirrored.
    let [image, copy] = ["disk", "copy"].map(|name| directory.path().join(name));
    let mut here = Side::new(directory.path(), "here", &image, false);
    let mut there = Side::new(directory.path(), "there", &copy, true);
    here.execute("cont", json!({}));
    here.switch_on(&["return-path"]);
    there.switch_on(&["return-path"]);
    let _intruder = intrude(&copy);
    start(&mut here, &mut there, directory.path());
    here.wait("failed");
    assert!(here.is_running() && is_used(&image));
    assert!(!there.is_running());
}
