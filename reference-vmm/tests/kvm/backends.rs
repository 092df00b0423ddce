//! Machines whose RAM a memory backend is.

use crate::Test;
use crate::lifecycle::{Monitor, without_userfaultfd};
use crate::qmp::{finished, refused};
use reference_vmm::payload::Progress;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Command;

pub(crate) const TESTS: &[Test] = &[
    ("backend_a_guest_goes_from_each_kind_of_memory_to_the_next", each_kind),
    ("backend_a_guest_does_not_come_to_memory_of_another_name", another_name),
    ("backend_what_qemu_refuses_is_refused_at_the_start", refused_at_the_start),
];
/// These need huge pages, which the tests reserve for themselves.
pub(crate) const HUGE_PAGE_TESTS: &[Test] = &[("backend_a_guest_comes_to_huge_pages_and_leaves_them", huge_pages)];

/// These need a host that can take userfaultfd away from a process.
pub(crate) const USERFAULTFD_TESTS: &[Test] = &[("backend_what_the_kernel_cannot_do_is_refused", no_userfaultfd)];

/// Where Linux keeps the number of huge pages of 2 MiB.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// For a guest of 32 MiB.
const NEEDED: u64 = 16;

fn huge(what: &str) -> u64 {
    let text = fs::read_to_string(Path::new(HUGE_PAGES).join(what)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn reserve(number: u64) -> bool {
    fs::write(Path::new(HUGE_PAGES).join("nr_hugepages"), number.to_string()).is_ok()
}

/// Why there is no memory in huge pages here; tries to reserve what is needed and gives it back.
pub(crate) fn huge_pages_missing() -> Option<&'static str> {
    let (number, free) = (huge("nr_hugepages"), huge("free_hugepages"));
    if free >= NEEDED {
        return None;
    }
    let reserved = reserve(number + NEEDED) && huge("free_hugepages") >= NEEDED;
    reserve(number);
    (!reserved).then_some("no 16 huge pages of 2 MiB can be reserved")
}

/// Why userfaultfd cannot be taken away from a process here.
pub(crate) fn userfaultfd_stays() -> Option<&'static str> {
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let hidden = sysctl.trim() == "0" && without_userfaultfd("true").output().is_ok_and(|ended| ended.status.success());
    (!hidden)
        .then_some("userfaultfd cannot be taken away from a process: that needs root and vm.unprivileged_userfaultfd=0")
}

/// The words are those of QEMU 11.1.3, which was started in the same way.
fn no_userfaultfd() {
    let directory = tempfile::tempdir().unwrap();
    let on = |capability: &str| json!({ "capabilities": [{ "capability": capability, "state": true }] });
    let mut there = Monitor::without_userfaultfd(directory.path(), "there", &["--incoming", "defer"]);
    let said = refused(&mut there.qmp, "migrate-set-capabilities", on("postcopy-ram"));
    assert!(said.starts_with("Postcopy is not supported: Userfaultfd not available: "), "{said}");
    assert!(!said.contains("os error"), "{said}");
    let mut here = Monitor::without_userfaultfd(directory.path(), "here", &[]);
    // Pages are missing at the destination.
    here.execute("migrate-set-capabilities", on("postcopy-ram"));
    let off = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": false }] });
    here.execute("migrate-set-capabilities", off);
    for monitor in [&mut here, &mut there] {
        let said = refused(&mut monitor.qmp, "migrate-set-capabilities", on("background-snapshot"));
        assert_eq!(said, "Background-snapshot is not supported by host kernel");
    }
}

fn backed(directory: &Path, name: &str, object: &str, incoming: bool) -> Monitor {
    let mut options = vec!["--object", object, "-M", "microvm,memory-backend=mem"];
    if incoming {
        options.extend(["--incoming", "defer"]);
    }
    Monitor::start(directory, name, "", &options)
}

/// Waits for progress from the guest, which has lost nothing.
fn runs(monitor: &Monitor) {
    monitor.wait_for("progress", |text| text.lines().filter_map(Progress::parse).count() >= 3);
    assert!(monitor.text().lines().filter_map(Progress::parse).all(|progress| progress.stale == 0));
}

fn hop(here: &mut Monitor, there: &mut Monitor, directory: &Path, n: usize) {
    let uri = json!({ "uri": format!("unix:{}", directory.join(format!("link{n}")).display()) });
    there.execute("migrate-incoming", uri.clone());
    here.execute("migrate", uri);
    assert_eq!(finished(&mut here.qmp)["status"], "completed", "{}", there.said());
    runs(there);
}

fn each_kind() {
    let directory = tempfile::tempdir().unwrap();
    // What is in the file before does not travel, and is not found by the guest either.
    let file = directory.path().join("ram");
    fs::write(&file, vec![0xa5; 32 << 20]).unwrap();
    let objects = [
        "memory-backend-ram,id=mem,size=32M".to_owned(),
        "memory-backend-memfd,id=mem,size=32M,prealloc=on".to_owned(),
        format!("memory-backend-file,id=mem,size=32M,share=on,mem-path={}", file.display()),
        "memory-backend-memfd,id=mem,size=32M,share=off,seal=off".to_owned(),
        "memory-backend-ram,id=mem,size=32M,share=on,reserve=off".to_owned(),
    ];
    let mut here = backed(directory.path(), "stop0", &objects[0], false);
    runs(&here);
    for (n, object) in objects.iter().enumerate().skip(1) {
        let mut there = backed(directory.path(), &format!("stop{n}"), object, true);
        hop(&mut here, &mut there, directory.path(), n);
        here = there;
    }
    let written = fs::read(&file).unwrap();
    assert!(written.iter().any(|byte| *byte != 0xa5), "the guest's memory was in the file");
}

fn another_name() {
    let directory = tempfile::tempdir().unwrap();
    let mut here = Monitor::start(directory.path(), "here", "", &[]);
    let mut there = backed(directory.path(), "there", "memory-backend-memfd,id=mem,size=32M", true);
    let uri = json!({ "uri": format!("unix:{}", directory.path().join("link").display()) });
    there.execute("migrate-incoming", uri.clone());
    here.execute("migrate", uri);
    let (_, status) = there.end();
    assert_eq!(status.code(), Some(1));
    // The first words are QEMU's.
    let why = "unknown ramblock \"microvm.ram\"; this machine has \"mem\"";
    assert!(there.said().contains(why), "{}", there.said());
    finished(&mut here.qmp);
    assert_eq!(here.status(), "running");
}

/// The texts are QEMU 11.1's.
fn refused_at_the_start() {
    let start = |options: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_reference-vmm")).arg("run").args(options).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let machine = ["-M", "microvm,memory-backend=mem", "--object"];
    let with = |object: &str, more: &[&str]| start(&[&machine[..], &[object], more].concat());
    for (said, why) in [
        (with("memory-backend-ram,id=other,size=64M", &[]), "Memory backend 'mem' not found"),
        (
            with("memory-backend-ram,id=mem,size=32M", &["-m", "64M"]),
            "Machine memory size does not match the size of the memory backend",
        ),
        (
            with("memory-backend-file,id=mem,size=64M,mem-path=/nonexistent/x", &[]),
            "can't open backing store /nonexistent/x for guest RAM: No such file or directory",
        ),
        (
            with("memory-backend-memfd,id=mem,size=64M,hugetlb=on,hugetlbsize=3M", &[]),
            "Hugepage size must be a power of 2",
        ),
        (with("memory-backend-memfd,id=mem", &[]), "Parameter 'size' is missing"),
    ] {
        assert!(said.contains(why), "{said} instead of {why}");
    }
}

/// Huge pages that are given back when this is dropped.
struct Reserved(u64);

impl Drop for Reserved {
    fn drop(&mut self) {
        reserve(self.0);
    }
}

fn huge_pages() {
    let _reserved = Reserved(huge("nr_hugepages"));
    reserve(huge("nr_hugepages") + NEEDED);
    let free = huge("free_hugepages");
    let directory = tempfile::tempdir().unwrap();
    let mut here = backed(directory.path(), "here", "memory-backend-ram,id=mem,size=32M", false);
    runs(&here);
    let object = "memory-backend-memfd,id=mem,size=32M,hugetlb=on,hugetlbsize=2M,prealloc=on";
    let mut there = backed(directory.path(), "there", object, true);
    assert_eq!(huge("free_hugepages"), free - NEEDED, "its memory is not in huge pages");
    hop(&mut here, &mut there, directory.path(), 0);
    let mut back = backed(directory.path(), "back", "memory-backend-memfd,id=mem,size=32M", true);
    hop(&mut there, &mut back, directory.path(), 1);
    drop(there);
    assert_eq!(huge("free_hugepages"), free, "they are not given back");
}
