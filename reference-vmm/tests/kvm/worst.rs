//! A guest that does its worst on every queue and port (`payload/worst.S`), in a monitor whose outputs are not read:
//! QMP answers all the same.
//!
//! `QEVM_WORST=full` is for a machine that does nothing else: a minute for each number of vCPUs, and every `stop` is
//! answered below a second.

use crate::Test;
use crate::qmp::finished;
use reference_vmm::qmp::Client;
use serde_json::json;
use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] =
    &[("worst_guest_on_one_vcpu_is_stopped", || run(1)), ("worst_guest_on_two_vcpus_is_stopped", || run(2))];

/// Longer than anything takes that ends.
const PATIENCE: Duration = Duration::from_secs(60);
const SECTORS: u64 = 1 << 16;

struct Plan {
    stops: u32,
    /// From one to the next.
    pace: Duration,
    /// How long an answer may take.
    bound: Duration,
}

fn plan() -> Plan {
    match std::env::var("QEVM_WORST").as_deref() {
        Ok("full") => Plan { stops: 100, pace: Duration::from_millis(600), bound: Duration::from_secs(1) },
        // A busy machine is slow; a guest that holds the monitor does so for ever.
        _ => Plan { stops: 10, pace: Duration::from_millis(100), bound: Duration::from_secs(30) },
    }
}

/// A disk of which sector n holds, for the available index, n + 2, and a request for sector n + 1.
fn disk_that_feeds_its_queue(path: &Path) {
    let file = fs::File::create(path).unwrap();
    let sectors = (0..SECTORS).flat_map(|n| {
        let mut sector = [0; 512];
        sector[..2].copy_from_slice(&(n as u16).wrapping_add(2).to_le_bytes());
        sector[10..18].copy_from_slice(&((n + 1) % SECTORS).to_le_bytes());
        sector
    });
    file.write_all_at(&sectors.collect::<Vec<u8>>(), 0).unwrap();
}

struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Monitor {
    /// Bytes that it has read, its disk's above all.
    fn bytes_read(&self) -> u64 {
        let io = fs::read_to_string(format!("/proc/{}/io", self.0.id())).unwrap();
        io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
    }
}

fn run(cpus: usize) {
    let Plan { stops, pace, bound } = plan();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    disk_that_feeds_its_queue(&directory.path().join("disk"));
    // A network whose other end takes nothing.
    let _deaf = UnixDatagram::bind(path("deaf")).unwrap();
    let devices = [
        ("--drive", format!("id=d,format=raw,file={}", path("disk"))),
        ("--device", "virtio-blk-device,drive=d".into()),
        ("--device", "virtio-rng-device".into()),
        ("--chardev", format!("socket,id=c,path={},server=on,wait=off", path("nobody"))),
        ("--chardev", "stdio,id=p".into()),
        ("--device", "virtio-serial-device".into()),
        ("--device", "virtconsole,chardev=c".into()),
        ("--device", "virtserialport,chardev=p".into()),
        (
            "--netdev",
            format!(
                "dgram,id=n,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                path("local"),
                path("deaf")
            ),
        ),
        ("--device", "virtio-net-device,netdev=n".into()),
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_reference-vmm"));
    command.args(["run", "--memory", "32M", "--smp", &cpus.to_string(), "--qmp", &format!("unix:{}", path("q"))]);
    if cpus > 1 {
        // Interrupt controllers, PIT and clock are the monitor's as well.
        command.args(["--machine", "microvm,kernel-irqchip=split,rtc=on"]);
    }
    command.args(["--fw-cfg", "name=opt/qevm/payload,string=dirty=1M hold=1M zero=1M worst=1"]);
    command.args(devices.iter().flat_map(|(option, value)| [*option, value.as_str()]));
    // Pipes that are not read as long as it runs.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut monitor = Monitor(command.spawn().unwrap());
    let mut client = Client::connect(Path::new(&path("q")), PATIENCE).unwrap();

    let mut slowest = Duration::ZERO;
    let mut answer = |client: &mut Client, command: &str| {
        let start = Instant::now();
        let reply = client.execute(command, json!({})).unwrap();
        let took = start.elapsed();
        slowest = slowest.max(took);
        assert!(took <= bound, "{command} was answered after {took:?}");
        reply
    };
    // It has begun when its disk is read.
    let deadline = Instant::now() + PATIENCE;
    let before = monitor.bytes_read();
    while monitor.bytes_read() < before + (16 << 10) {
        assert!(Instant::now() < deadline, "the guest does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut read = monitor.bytes_read();
    for stop in 0..stops {
        std::thread::sleep(pace);
        let status = answer(&mut client, "query-status");
        assert_eq!(status["status"], "running", "{status}");
        answer(&mut client, "query-migrate");
        answer(&mut client, "stop");
        assert_eq!(answer(&mut client, "query-status")["status"], "paused");
        answer(&mut client, "cont");
        client.events.clear();
        // It goes on, and so does its disk.
        let deadline = Instant::now() + PATIENCE;
        while monitor.bytes_read() < read + 512 {
            assert!(Instant::now() < deadline, "after stop {stop} the guest does nothing any more");
            std::thread::sleep(Duration::from_millis(1));
        }
        read = monitor.bytes_read();
    }
    // It can leave, too.
    answer(&mut client, "stop");
    client.execute("migrate", json!({ "uri": format!("file:{}", path("guest")) })).unwrap();
    let migration = finished(&mut client);
    assert_eq!(migration["status"], "completed", "{migration}");
    answer(&mut client, "quit");
    let mut log = Vec::new();
    let mut stderr = monitor.0.stderr.take().unwrap();
    let reading = std::thread::spawn(move || stderr.read_to_end(&mut log).map(|_| log));
    let start = Instant::now();
    while monitor.0.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < PATIENCE, "the monitor does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("{cpus} vCPUs: the slowest of {stops} rounds took {slowest:?}");
    let log = String::from_utf8(reading.join().unwrap().unwrap()).unwrap();
    assert!(log.contains("were suppressed") && !log.contains('\x1b'), "{log}");
}
