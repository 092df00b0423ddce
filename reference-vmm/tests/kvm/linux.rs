//! A stock Linux guest that counts on its serial port, moved between monitors while it runs.
//!
//! It needs a KVM that runs stock kernels, which a paravirtual one may not do, and these in the environment (`make lab`
//! has all of them):
//!
//! | variable | what |
//! |---|---|
//! | `QEVM_MONITOR` | the program `reference-vmm` |
//! | `QEVM_LINUX_ELF`, `QEVM_LINUX_BZIMAGE` | a kernel in both formats |
//! | `QEVM_LINUX_INITRD` | an initial RAM disk that prints lines as [`Line`] has them |
//! | `QEVM_LINUX_VIRTIO_INITRD` | one that uses virtio devices as well, as `conformance/lab/guest-init-virtio` says |
//! | `QEVM_QEMU` | a QEMU with its firmware; without it the tests with a QEMU are skipped |

use crate::Test;
use reference_vmm::qmp::Client;
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("linux_entered_by_pvh_migrates", || journey(&[REFERENCE, REFERENCE], "QEVM_LINUX_ELF", 1, "")),
    ("linux_entered_in_long_mode_migrates", || journey(&[REFERENCE, REFERENCE], "QEVM_LINUX_BZIMAGE", 2, "")),
    ("linux_migrates_with_a_split_irqchip", || {
        journey(&[REFERENCE, REFERENCE], "QEVM_LINUX_ELF", 2, ",kernel-irqchip=split");
    }),
    ("linux_takes_its_virtio_devices_along", || virtio_journey(&[REFERENCE, REFERENCE], ",kernel-irqchip=split")),
];

/// These need a QEMU as well.
pub(crate) const QEMU_TESTS: &[Test] = &[
    ("linux_visits_qemu", || journey(&[REFERENCE, QEMU, REFERENCE], "QEVM_LINUX_ELF", 2, "")),
    ("linux_comes_from_qemu_and_goes_back", || journey(&[QEMU, REFERENCE, QEMU], "QEVM_LINUX_BZIMAGE", 1, "")),
    ("linux_visits_qemu_with_its_virtio_devices", || virtio_journey(&[REFERENCE, QEMU, REFERENCE], "")),
    ("linux_visits_qemu_with_a_split_irqchip", || {
        journey(&[REFERENCE, QEMU, REFERENCE], "QEVM_LINUX_ELF", 1, ",kernel-irqchip=split");
    }),
];

/// Why the tests, and those with a QEMU, cannot run.
pub(crate) fn missing() -> [Option<&'static str>; 2] {
    let lacks = |names: &[&str]| names.iter().any(|name| std::env::var_os(name).is_none());
    let kernel = lacks(&[
        "QEVM_MONITOR",
        "QEVM_LINUX_ELF",
        "QEVM_LINUX_BZIMAGE",
        "QEVM_LINUX_INITRD",
        "QEVM_LINUX_VIRTIO_INITRD",
    ])
    .then_some("no Linux guest is there: make lab");
    let qemu = lacks(&["QEVM_QEMU"]).then_some("no QEMU is there: make lab");
    [kernel, kernel.or(qemu)]
}

/// Generous: in an emulated machine a guest boots for half a minute.
const PATIENCE: Duration = Duration::from_secs(1200);
/// Lines that are waited for at each stop.
const LINES: u64 = 25;
/// The firmware that QEMU's microvm has without ACPI; of the length of no firmware in reference-vmm.
const FIRMWARE: &str = "qboot.rom";
/// More than any hop takes: the guest's clock goes on at the source until it stops, and may go on then.
const LONGEST_JUMP: f64 = 20.0;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Reference,
    Qemu,
}

const REFERENCE: Kind = Kind::Reference;
const QEMU: Kind = Kind::Qemu;

/// Boots Linux at the first stop, and takes it from each to the next while it counts.
fn journey(stops: &[Kind], kernel: &str, cpus: u32, machine: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let given = Setup { kernel: variable(kernel).into(), cpus, machine, virtio: false, scratch: scratch.path() };
    travel(stops, &given);
}

/// The same with virtio devices: the guest writes its count to the disk, to sector `count`, and to the console.
fn virtio_journey(stops: &[Kind], machine: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = variable("QEVM_LINUX_ELF").into();
    File::create(scratch.path().join("disk")).unwrap().set_len(4 << 20).unwrap();
    let counted = travel(stops, &Setup { kernel, cpus: 1, machine, virtio: true, scratch: scratch.path() });
    let disk = std::fs::read(scratch.path().join("disk")).unwrap();
    let console = |stop: usize| std::fs::read_to_string(scratch.path().join(format!("{stop}.console"))).unwrap();
    let console = (0..stops.len()).map(console).collect::<String>().replace('\r', "");
    for count in 1..counted {
        let sector = &disk[512 * count as usize..][..512];
        let found = String::from_utf8_lossy(sector);
        assert_eq!(found.trim_end(), format!("sector {count}"), "of {counted}");
    }
    let lines: Vec<_> = console.lines().collect();
    assert!(lines.len() as u64 + 1 >= counted, "{counted} {console}");
    let expected = (1..).map(|count| format!("console {count}"));
    lines.iter().zip(expected).for_each(|(line, expected)| assert_eq!(*line, expected));
}

/// Says how far it counted.
fn travel(stops: &[Kind], given: &Setup<'_>) -> u64 {
    let scratch = given.scratch;
    let mut here = Monitor::start(stops[0], given, 0, false);
    let mut text = here.wait_for_count(LINES);
    let mut parts = Vec::new();
    for (number, stop) in stops.iter().enumerate().skip(1) {
        let mut there = Monitor::start(*stop, given, number, true);
        let address = format!("unix:{}", scratch.join(format!("{number}.migration")).display());
        let start = Instant::now();
        // Its socket is there a moment before it listens, and then it says where.
        while there.qmp.execute("query-migrate", json!({})).unwrap()["socket-address"][0].is_null() {
            assert!(start.elapsed() < PATIENCE, "{}", there.said());
            std::thread::sleep(Duration::from_millis(20));
        }
        here.qmp
            .execute("migrate-set-parameters", json!({ "max-bandwidth": 400_000_000, "downtime-limit": 1000 }))
            .unwrap();
        here.qmp.execute("migrate", json!({ "uri": address })).unwrap();
        loop {
            let report = here.qmp.execute("query-migrate", json!({})).unwrap();
            match report["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => panic!("{report} {} {}", here.said(), there.said()),
                _ => assert!(start.elapsed() < PATIENCE, "{report}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        parts.push(here.end());
        let before: Vec<_> = lines(&parts.concat());
        let last = before.last().expect("it has counted").count;
        text = there.wait_for_count(last + LINES);
        here = there;
    }
    assert!(!text.is_empty());
    parts.push(here.end());
    let text = parts.concat();
    judge(&text);
    lines(&text).last().map_or(0, |line| line.count)
}

/// All output together is that of one guest.
fn judge(text: &str) {
    let all = lines(text);
    for pair in all.windows(2) {
        let [before, after] = pair else { continue };
        assert_eq!(after.count, before.count + 1, "the output has a gap or repeats itself: {before:?} {after:?}");
        assert!(after.up >= before.up && after.now >= before.now, "a clock ran back: {before:?} {after:?}");
        assert!(after.up - before.up < LONGEST_JUMP, "the clock jumped: {before:?} {after:?}");
    }
    let damaged = all.iter().find(|line| !line.good);
    assert!(damaged.is_none(), "memory changed by itself: {damaged:?}");
    let from = text.find("linux count=").expect("it has counted");
    let strange = text[from..].split_inclusive('\n').find(|line| line.ends_with('\n') && Line::parse(line).is_none());
    assert!(strange.is_none(), "the guest complains: {strange:?}");
}

/// `linux count=12 up=3.45 now=1795253390 memory=good`: a number that goes up by one, seconds since the boot and since
/// 1970, and whether a file in memory is as it was.
#[derive(Debug)]
struct Line {
    count: u64,
    up: f64,
    now: u64,
    good: bool,
}

impl Line {
    fn parse(line: &str) -> Option<Line> {
        let mut words = line.trim_end().strip_prefix("linux ")?.split(' ');
        let mut word = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
        Some(Line {
            count: word("count")?.parse().ok()?,
            up: word("up")?.parse().ok()?,
            now: word("now")?.parse().ok()?,
            good: match word("memory")? {
                "good" => true,
                "bad" => false,
                _ => return None,
            },
        })
    }
}

fn lines(text: &str) -> Vec<Line> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter_map(Line::parse).collect()
}

struct Setup<'a> {
    kernel: PathBuf,
    cpus: u32,
    /// Options of the machine.
    machine: &'a str,
    /// It has a disk, a network card, random numbers and a console.
    virtio: bool,
    scratch: &'a Path,
}

/// A monitor in a process of its own.
struct Monitor {
    process: Child,
    qmp: Client,
    serial: PathBuf,
    errors: PathBuf,
}

impl Monitor {
    fn start(kind: Kind, setup: &Setup<'_>, number: usize, incoming: bool) -> Monitor {
        let Setup { kernel, cpus, machine, virtio, scratch } = setup;
        let file = |name: &str| scratch.join(format!("{number}.{name}"));
        let (serial, errors, socket) = (file("serial"), file("errors"), file("qmp"));
        let qemu = kind == Kind::Qemu;
        let mut command = Command::new(variable(if qemu { "QEVM_QEMU" } else { "QEVM_MONITOR" }));
        let mut arguments: Vec<(&str, String)> = Vec::new();
        let initrd = if *virtio { "QEVM_LINUX_VIRTIO_INITRD" } else { "QEVM_LINUX_INITRD" };
        if *virtio {
            let (card, wire) = (file("card"), file("wire"));
            let unix = |end: &str, path: &Path| format!("{end}.type=unix,{end}.path={}", path.display());
            arguments.extend([
                ("drive", format!("if=none,id=d,format=raw,file={}", scratch.join("disk").display())),
                ("netdev", format!("dgram,id=n,{},{}", unix("local", &card), unix("remote", &wire))),
                ("chardev", format!("file,id=c,path={}", file("console").display())),
            ]);
            let devices = ["blk-device,drive=d", "net-device,netdev=n", "rng-device", "serial-device"];
            arguments.extend(devices.map(|device| ("device", format!("virtio-{device}"))));
            arguments.push(("device", "virtconsole,chardev=c".into()));
        }
        if incoming {
            arguments.push(("incoming", format!("unix:{}", file("migration").display())));
        } else {
            arguments.push(("kernel", kernel.display().to_string()));
            arguments.push(("initrd", Path::new(&variable(initrd)).display().to_string()));
            arguments.push(("append", "console=ttyS0 quiet loglevel=0 reboot=t panic=-1 no_timer_check".into()));
        }
        arguments.extend([("smp", cpus.to_string()), ("serial", format!("file:{}", serial.display()))]);
        if qemu {
            command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-bios", FIRMWARE]);
            arguments.push(("M", format!("microvm,accel=kvm{machine}")));
            // A guest's own virtualisation cannot migrate to reference-vmm.
            arguments.extend([("cpu", "host,-svm,-vmx".into()), ("m", "192M".into())]);
            arguments.push(("qmp", format!("unix:{},server=on,wait=off", socket.display())));
        } else {
            command.arg("run");
            arguments.extend([("machine", format!("microvm{machine}")), ("memory", "192M".into())]);
            arguments.push(("qmp", format!("unix:{}", socket.display())));
        }
        let dash = if qemu { "-" } else { "--" };
        for (name, value) in arguments {
            command.args([format!("{dash}{name}"), value]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&errors).unwrap());
        let process = command.spawn().unwrap();
        let qmp = Client::connect(&socket, PATIENCE).unwrap();
        Monitor { process, qmp, serial, errors }
    }

    /// What the guest has printed when it has counted up to here.
    fn wait_for_count(&mut self, count: u64) -> String {
        let start = Instant::now();
        loop {
            let text = self.text();
            if lines(&text).last().is_some_and(|line| line.count >= count) {
                return text;
            }
            let waits = start.elapsed() < PATIENCE && self.process.try_wait().unwrap().is_none();
            assert!(waits, "the guest did not count to {count}: {} {text}", self.said());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.serial).unwrap_or_default()).replace('\r', "")
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Ends it, and gives everything that the guest printed here.
    fn end(mut self) -> String {
        // It may close the socket before it answers.
        let _ = self.qmp.execute("quit", json!({}));
        self.process.wait().unwrap();
        self.text()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Of a test that failed; it may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn variable(name: &str) -> std::ffi::OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is set where these tests run"))
}
