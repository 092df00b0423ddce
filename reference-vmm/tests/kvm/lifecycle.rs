//! The monitor as a process: resets, switching off and signals, with the events and exit codes of QEMU 11.1.

use crate::Test;
use crate::qmp::{PATIENCE, finished, refused};
use reference_vmm::payload::Progress;
use reference_vmm::qmp::Client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("lifecycle_a_guest_that_resets_itself_starts_anew", a_guest_resets_itself),
    ("lifecycle_qmp_resets_a_guest_that_runs_or_not", qmp_resets_a_guest),
    ("lifecycle_the_power_button_switches_a_guest_off", the_power_button),
    ("lifecycle_actions_decide_about_resets", actions_decide),
    ("lifecycle_signals_end_the_monitor_in_order", signals_end_in_order),
    ("lifecycle_resets_travel", resets_travel),
    ("lifecycle_a_migration_ends_with_its_monitor", a_migration_ends_with_its_monitor),
];

const PAYLOAD: &str = "dirty=1M rate=4M hold=1M zero=1M verify=16384 report=20";
const POLL: Duration = Duration::from_millis(5);

/// A monitor that is killed when this is dropped.
pub(crate) struct Monitor {
    pub(crate) child: Child,
    pub(crate) qmp: Client,
    serial: PathBuf,
    stderr: PathBuf,
    socket: PathBuf,
}

/// Starts a program to which the kernel gives no userfaultfd. Only root can.
pub(crate) fn without_userfaultfd(program: &str) -> Command {
    let hide = "[ ! -e /dev/userfaultfd ] || mount --bind /dev/null /dev/userfaultfd";
    let drop = "exec setpriv --bounding-set -sys_ptrace --inh-caps -sys_ptrace";
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "sh", "-c", &format!("{hide} && {drop} {program} \"$@\""), "sh"]);
    shell
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    pub(crate) fn start(directory: &Path, name: &str, payload: &str, options: &[&str]) -> Monitor {
        Monitor::run(Command::new(env!("CARGO_BIN_EXE_reference-vmm")), directory, name, payload, options)
    }

    /// A monitor that may have this many descriptors.
    pub(crate) fn with_descriptors(limit: u32, directory: &Path, name: &str, options: &[&str]) -> Monitor {
        let mut shell = Command::new("sh");
        let program = env!("CARGO_BIN_EXE_reference-vmm");
        shell.args(["-c", &format!("ulimit -n {limit}; exec {program} \"$@\""), "sh"]);
        Monitor::run(shell, directory, name, "", options)
    }

    /// A monitor to which the kernel gives no userfaultfd.
    pub(crate) fn without_userfaultfd(directory: &Path, name: &str, options: &[&str]) -> Monitor {
        Monitor::run(without_userfaultfd(env!("CARGO_BIN_EXE_reference-vmm")), directory, name, "", options)
    }

    fn run(mut command: Command, directory: &Path, name: &str, payload: &str, options: &[&str]) -> Monitor {
        let file = |kind: &str| directory.join(format!("{name}.{kind}"));
        let (serial, stderr, socket) = (file("serial"), file("stderr"), file("qmp"));
        let child = command
            .args(["run", "--memory", "32M", "--qmp", &format!("unix:{}", socket.display())])
            .args(["--serial", &format!("file:{}", serial.display())])
            .args(["--fw-cfg", &format!("name=opt/qevm/payload,string={PAYLOAD} {payload}")])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        let qmp = Client::connect(&socket, PATIENCE);
        let qmp = qmp.unwrap_or_else(|error| panic!("{error}: {}", fs::read_to_string(&stderr).unwrap_or_default()));
        Monitor { child, qmp, serial, stderr, socket }
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).unwrap_or_else(|error| panic!("{error}: {}", self.said()))
    }

    pub(crate) fn status(&mut self) -> String {
        self.execute("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// The events so far: names, and of those that have a reason that and whether it was the guest's.
    fn events(&mut self) -> Vec<String> {
        self.qmp.events.iter().map(name_of).collect()
    }

    /// Waits until as many events have come, and gives all.
    pub(crate) fn wait_for_events(&mut self, wanted: &[&str]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.execute("query-status", json!({}));
            let events = self.events();
            if events.len() >= wanted.len() {
                assert_eq!(events, wanted, "{}", self.text());
                self.qmp.events.clear();
                return;
            }
            assert!(Instant::now() < deadline, "{events:?}, wanted {wanted:?}: {}", self.text());
            std::thread::sleep(POLL);
        }
    }

    /// What comes until the monitor closes its socket, and how it ends.
    pub(crate) fn end(&mut self) -> (Vec<String>, ExitStatus) {
        self.qmp.wait_for_end().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the monitor does not end");
            std::thread::sleep(POLL);
        };
        (self.events(), status)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.serial).unwrap_or_default()).into_owned()
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    fn starts(&self) -> usize {
        self.text().lines().filter(|line| line.contains("qevm-payload start cpus=")).count()
    }

    pub(crate) fn wait_for(&self, what: &str, satisfied: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !satisfied(&self.text()) {
            assert!(Instant::now() < deadline, "no {what}: {}\n{}", self.text(), self.said());
            std::thread::sleep(POLL);
        }
    }

    /// Waits for this many starts, and for progress and no fault after the last of them.
    fn wait_for_start(&self, number: usize) {
        const START: &str = "qevm-payload start cpus=";
        self.wait_for(&format!("start {number}"), |text| {
            text.split(START).skip(1).count() >= number
                && text.rsplit(START).next().is_some_and(|last| last.lines().filter_map(Progress::parse).count() >= 3)
        });
        let text = self.text();
        for bad in ["stale-page", "trap", "error"] {
            assert!(!text.contains(bad), "{text}");
        }
        assert_eq!(self.starts(), number, "{text}");
    }

    fn signal(&self, signal: Signal) {
        // A child that was not waited for.
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

fn name_of(event: &Value) -> String {
    let name = event["event"].as_str().unwrap();
    match (&event["data"]["guest"], &event["data"]["status"]) {
        (Value::Bool(guest), _) => {
            format!("{name} {} {}", event["data"]["reason"].as_str().unwrap(), if *guest { "guest" } else { "host" })
        }
        (_, Value::String(status)) => format!("{name} {status}"),
        _ => name.to_owned(),
    }
}

const GUEST_RESET: &str = "RESET guest-reset guest";
const QMP_RESET: &str = "RESET host-qmp-system-reset host";

fn a_guest_resets_itself() {
    let directory = tempfile::tempdir().unwrap();
    for (name, way, options) in
        [("a", 1, &["--smp", "2"][..]), ("b", 2, &["--machine", "microvm,kernel-irqchip=split"])]
    {
        let payload = format!("reset=60 resets=2 way={way}");
        let mut monitor = Monitor::start(directory.path(), name, &payload, &[&["-S"], options].concat());
        monitor.execute("cont", json!({}));
        monitor.wait_for_events(&["RESUME", GUEST_RESET, GUEST_RESET]);
        monitor.wait_for_start(3);
        assert!(monitor.text().contains("reset boots=2\n"), "RAM is kept: {}", monitor.text());
        assert_eq!((monitor.status().as_str(), monitor.events().len()), ("running", 0));
    }
}

fn qmp_resets_a_guest() {
    let directory = tempfile::tempdir().unwrap();
    let mut monitor = Monitor::start(directory.path(), "a", "", &[]);
    monitor.wait_for_start(1);
    monitor.execute("system_reset", json!({}));
    monitor.wait_for_events(&[QMP_RESET]);
    monitor.wait_for_start(2);
    assert_eq!(monitor.status(), "running");
    monitor.execute("stop", json!({}));
    monitor.execute("system_reset", json!({}));
    monitor.wait_for_events(&["STOP", QMP_RESET]);
    assert_eq!((monitor.status().as_str(), monitor.starts()), ("prelaunch", 2));
    monitor.execute("cont", json!({}));
    monitor.wait_for_events(&["RESUME"]);
    monitor.wait_for_start(3);
    assert_eq!(refused(&mut monitor.qmp, "system_reset", json!({ "x": 1 })), "Parameter 'x' is unexpected");

    let mut waiting = Monitor::start(directory.path(), "b", "", &["--incoming", "defer"]);
    waiting.execute("system_reset", json!({}));
    waiting.wait_for_events(&[QMP_RESET]);
    assert_eq!(waiting.status(), "inmigrate");
}

fn the_power_button() {
    let directory = tempfile::tempdir().unwrap();
    let mut monitor = Monitor::start(directory.path(), "a", "button=1", &[]);
    monitor.wait_for_start(1);
    monitor.execute("system_powerdown", json!({}));
    monitor.wait_for_events(&["POWERDOWN"]);
    monitor.wait_for("word of the button", |text| text.contains("qevm-payload power button\n"));
    assert_eq!(monitor.status(), "running");

    let mut monitor = Monitor::start(directory.path(), "b", "button=2", &[]);
    monitor.wait_for_start(1);
    monitor.execute("system_powerdown", json!({}));
    let (events, status) = monitor.end();
    assert_eq!(events, ["POWERDOWN", "SHUTDOWN guest-shutdown guest"]);
    assert_eq!(status.code(), Some(0), "{}", monitor.said());

    // It is kept until it is reset.
    let mut monitor = Monitor::start(directory.path(), "c", "button=2", &["--no-shutdown"]);
    monitor.wait_for_start(1);
    monitor.execute("system_powerdown", json!({}));
    monitor.wait_for_events(&["POWERDOWN", "SHUTDOWN guest-shutdown guest", "STOP"]);
    assert_eq!(monitor.status(), "shutdown");
    assert_eq!(refused(&mut monitor.qmp, "cont", json!({})), "Resetting the Virtual Machine is required");
    monitor.execute("system_reset", json!({}));
    monitor.wait_for_events(&[QMP_RESET]);
    assert_eq!(monitor.status(), "prelaunch");
    monitor.execute("cont", json!({}));
    monitor.wait_for_start(2);
}

fn actions_decide() {
    let directory = tempfile::tempdir().unwrap();
    for (name, option) in [("a", &["-no-reboot"][..]), ("b", &["--no-reboot"]), ("c", &["-action", "reboot=shutdown"])]
    {
        let options = [&["-S"], option].concat();
        let mut monitor = Monitor::start(directory.path(), name, "reset=60 way=2", &options);
        monitor.execute("cont", json!({}));
        let (events, status) = monitor.end();
        assert_eq!(events, ["RESUME", "SHUTDOWN guest-reset guest"]);
        assert_eq!((status.code(), monitor.starts()), (Some(0), 1), "{}", monitor.said());
    }
    let options = ["-S", "--action", "reboot=shutdown,shutdown=pause"];
    let mut monitor = Monitor::start(directory.path(), "d", "reset=60 resets=1", &options);
    monitor.execute("cont", json!({}));
    monitor.wait_for_events(&["RESUME", "SHUTDOWN guest-reset guest", "STOP"]);
    assert_eq!(monitor.status(), "shutdown");
    monitor.execute("system_reset", json!({}));
    monitor.wait_for_events(&["SHUTDOWN host-qmp-system-reset host"]);
    assert_eq!(monitor.status(), "shutdown");
    let wrong = refused(&mut monitor.qmp, "set-action", json!({ "reboot": "pause" }));
    assert_eq!(wrong, "Parameter 'reboot' does not accept value 'pause'");
    monitor.execute("set-action", json!({ "reboot": "reset", "panic": "none", "watchdog": "inject-nmi" }));
    monitor.execute("system_reset", json!({}));
    monitor.wait_for_events(&[QMP_RESET]);
    monitor.execute("cont", json!({}));
    monitor.wait_for_start(2);
    monitor.execute("quit", json!({}));
    let (events, status) = monitor.end();
    assert_eq!(
        (events.as_slice(), status.code()),
        (&["RESUME", "SHUTDOWN host-qmp-quit host"].map(str::to_owned)[..], Some(0))
    );
}

fn signals_end_in_order() {
    let directory = tempfile::tempdir().unwrap();
    for (name, signal) in [("a", Signal::TERM), ("b", Signal::INT), ("c", Signal::HUP)] {
        let mut monitor = Monitor::start(directory.path(), name, "", &["--no-shutdown"]);
        monitor.wait_for_start(1);
        monitor.signal(signal);
        let (events, status) = monitor.end();
        assert_eq!(events, ["SHUTDOWN host-signal host"]);
        let (said, pid) = (monitor.said(), std::process::id());
        assert_eq!(status.code(), Some(0), "{said}");
        assert!(
            said.contains(&format!("reference-vmm: terminating on signal {} from pid {pid} (", signal.as_raw())),
            "{said}"
        );
        assert!(!monitor.socket.exists(), "the socket is left");
    }
    let [incoming, console] = ["incoming", "console"].map(|name| directory.path().join(name));
    let from = format!("unix:{}", incoming.display());
    let chardev = format!("socket,id=c,path={},server=on,wait=off", console.display());
    let options = ["--incoming", &from, "--chardev", &chardev];
    let options = [&options[..], &["--device", "virtio-serial-device", "--device", "virtconsole,chardev=c"]];
    let mut monitor = Monitor::start(directory.path(), "d", "", &options.concat());
    let sockets = [incoming, console, monitor.socket.clone()];
    assert_eq!(sockets.each_ref().map(|socket| socket.exists()), [true; 3]);
    monitor.signal(Signal::TERM);
    let (events, status) = monitor.end();
    assert_eq!((events.as_slice(), status.code()), (&["SHUTDOWN host-signal host".to_owned()][..], Some(0)));
    assert_eq!(sockets.map(|socket| socket.exists()), [false; 3], "a socket is left");
}

/// Two monitors between which a migration has begun, so slowly that it does not end by itself.
fn migrating(directory: &Path, payload: &str) -> (Monitor, Monitor) {
    let uri = format!("unix:{}", directory.join("migration").display());
    let mut source = Monitor::start(directory, "source", payload, &[]);
    let mut destination = Monitor::start(directory, "destination", payload, &["--incoming", &uri]);
    // It may have reset itself already.
    source.wait_for("start", |text| text.lines().filter_map(Progress::parse).count() >= 1);
    for monitor in [&mut source, &mut destination] {
        let capabilities = ["pause-before-switchover", "return-path"];
        let on = capabilities.map(|name| json!({ "capability": name, "state": true }));
        monitor.execute("migrate-set-capabilities", json!({ "capabilities": on }));
    }
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 400_000 }));
    source.execute("migrate", json!({ "uri": uri }));
    wait_for_migration(&mut source, "active");
    (source, destination)
}

fn wait_for_migration(monitor: &mut Monitor, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let migration = monitor.execute("query-migrate", json!({}));
        if migration["status"] == wanted {
            return;
        }
        assert!(Instant::now() < deadline && migration["status"] != "failed", "{migration}");
        std::thread::sleep(POLL);
    }
}

fn resets_travel() {
    // While it is active, by the guest and by QMP; and when it has stopped already.
    for stopped in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let (mut source, mut destination) = migrating(directory.path(), "reset=300 resets=1");
        source.wait_for_events(&[GUEST_RESET]);
        source.wait_for_start(2);
        source.execute("system_reset", json!({}));
        source.wait_for_events(&[QMP_RESET]);
        source.wait_for_start(3);
        source.execute("migrate-set-parameters", json!({ "max-bandwidth": 1 << 30 }));
        wait_for_migration(&mut source, "pre-switchover");
        source.wait_for_events(&["STOP"]);
        if stopped {
            source.execute("system_reset", json!({}));
            source.wait_for_events(&[QMP_RESET]);
        }
        source.execute("migrate-continue", json!({ "state": "pre-switchover" }));
        assert_eq!(finished(&mut source.qmp)["status"], "completed");
        assert_eq!((source.status().as_str(), source.events().len()), ("postmigrate", 0));
        destination.wait_for_events(&["RESUME"]);
        destination.wait_for("progress", |text| text.lines().filter_map(Progress::parse).count() >= 3);
        assert_eq!(destination.starts(), usize::from(stopped), "{}", destination.text());
        // And it can be reset where it has come to.
        destination.execute("system_reset", json!({}));
        destination.wait_for_events(&[QMP_RESET]);
        destination.wait_for_start(usize::from(stopped) + 1);
        // What is left at the source is no guest any more, until an operator says so.
        source.execute("system_reset", json!({}));
        source.wait_for_events(&[QMP_RESET]);
        assert_eq!((source.status().as_str(), source.starts()), ("prelaunch", 3));
    }
}

fn a_migration_ends_with_its_monitor() {
    let directory = tempfile::tempdir().unwrap();
    // The source is ended, while the guest runs and after it was stopped: it is not started once more.
    for stopped in [false, true] {
        let (mut source, mut destination) = migrating(directory.path(), "");
        if stopped {
            source.execute("migrate-set-parameters", json!({ "max-bandwidth": 1 << 30 }));
            wait_for_migration(&mut source, "pre-switchover");
            source.wait_for_events(&["STOP"]);
        }
        source.signal(Signal::TERM);
        let (events, status) = source.end();
        assert_eq!((events.as_slice(), status.code()), (&["SHUTDOWN host-signal host".to_owned()][..], Some(0)));
        let (events, status) = destination.end();
        assert!(!events.contains(&"RESUME".to_owned()) && status.code() == Some(1), "{events:?} {status}");
        assert_eq!(destination.starts(), 0);
    }
    // The destination is ended: the guest goes on.
    let (mut source, mut destination) = migrating(directory.path(), "");
    destination.signal(Signal::TERM);
    let (events, status) = destination.end();
    assert_eq!((events.as_slice(), status.code()), (&["SHUTDOWN host-signal host".to_owned()][..], Some(0)));
    assert_eq!(finished(&mut source.qmp)["status"], "failed");
    assert_eq!(source.status(), "running");
    let before = source.text().len();
    source.wait_for("progress", |text| text[before..].lines().filter_map(Progress::parse).count() >= 2);
}
