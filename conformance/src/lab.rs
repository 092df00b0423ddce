//! A machine with a KVM as on hardware, where the host's own is paravirtual: QEMU's TCG emulates AMD's SVM with nested paging, and
//! Linux in it loads `kvm_amd` (`conformance/lab/README.md`).
//!
//! reference-vmm runs in there, with its dirty log and with dirty rings, and every stale page that a guest finds counts.

mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::apt::{Apt, Kind};
use crate::cpio::Archive;
use crate::linux::{Modules, unpack_packages};
use crate::process::run_any;
use crate::roots::{Root, Suite, cache_dir, lock};

/// Raised whenever the initial RAM disk changes.
const REVISION: u32 = 1;
const SUITE: Suite = Suite::Trixie;
const INIT: &str = include_str!("../lab/init");
/// `ccp` and `irqbypass` come along.
const MODULES: &[&str] = &["kvm_amd"];
const APPLETS: [&str; 9] = ["sh", "mount", "insmod", "ip", "mkdir", "poweroff", "echo", "cat", "true"];
/// Ends a hang. All jobs take about ten minutes on two processors that do nothing else.
const TIMEOUT: Duration = Duration::from_secs(7200);
/// The file in the scratch folder with what the machine prints.
pub const SERIAL: &str = "serial.txt";
/// What `init` prints last.
const DONE: &str = "\nlab: done\n";
const MEMORY_MIB: u32 = 2560;
/// `no_timer_check`: on a busy host the emulated timer may be late, which the kernel would take for a broken machine.
const COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable random.trust_cpu=on";

/// What is run in the lab.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub name: String,
    command: String,
    judge: fn(&str) -> Result<Value>,
}

/// What became of a job.
#[derive(Debug)]
pub struct Outcome {
    /// The job's name.
    pub name: String,
    /// Numbers, if it holds; otherwise why it does not.
    pub result: Result<Value>,
    /// What it printed.
    pub said: String,
}

/// The jobs with these accelerators: the demo with each, and the tests with the smallest ring.
pub fn jobs() -> Vec<Job> {
    let demo = |name: &str, accel: &str, more: &str| Job {
        name: format!("demo-{name}"),
        command: format!(
            "/reference-vmm demo --json --unix --memory 64M --dirty 8M --rate 8M --max-bandwidth 24M --timeout 1200 --accel {accel} {more}"
        ),
        judge: judge_demo,
    };
    let linux = |name: &str, tests: &str, judge: fn(&str) -> Result<Value>| Job {
        name: name.into(),
        command: format!("{} QEVM_REQUIRE_KVM=1 /kvm-tests --color never --test-threads 1 {tests}", guest::ENVIRONMENT),
        judge,
    };
    vec![
        demo("log", "kvm", ""),
        demo("ring-4096", "kvm,dirty-ring-size=4096", ""),
        demo("ring-1024", "kvm,dirty-ring-size=1024", ""),
        demo("ring-1024-two-vcpus", "kvm,dirty-ring-size=1024", "--smp 2"),
        Job {
            name: "tests-ring-1024".into(),
            command: "QEVM_REQUIRE_KVM=1 QEVM_DIRTY_RING_SIZE=1024 /kvm-tests --color never --test-threads 1 dirty_"
                .into(),
            judge: judge_tests::<6>,
        },
        Job {
            name: "tests-tsc".into(),
            command: "QEVM_REQUIRE_KVM=1 /kvm-tests --color never --exact state_sets_the_tsc_exactly".into(),
            judge: judge_tests::<1>,
        },
        linux("linux", "--skip virtio_devices linux_", judge_tests::<6>),
        linux("linux-virtio", "virtio_devices", judge_tests::<2>),
    ]
}

fn judge_demo(said: &str) -> Result<Value> {
    let line =
        said.lines().rev().find(|line| line.trim_start().starts_with('{')).context("the demo printed no result")?;
    let result: Value = serde_json::from_str(line.trim()).with_context(|| format!("the result {line}"))?;
    ensure!(result["result"] == "ok", "{result}");
    ensure!(result["stale_pages"] == 0, "{} stale pages", result["stale_pages"]);
    ensure!(result["rounds"].as_u64() > Some(1), "the guest was not dirtying: {result}");
    Ok(json!({ "stale_pages": 0, "rounds": result["rounds"], "bytes": result["bytes"] }))
}

/// So many tests, at least, have passed, and none has failed.
fn judge_tests<const LEAST: u64>(said: &str) -> Result<Value> {
    let summary = said.lines().find_map(|line| line.trim().strip_prefix("test result: ok. "));
    let passed = summary.context("the tests did not pass")?.split_once(" passed").context("no number of tests")?.0;
    let passed: u64 = passed.parse()?;
    ensure!(passed >= LEAST, "only {passed} tests ran");
    Ok(json!({ "passed": passed }))
}

/// Builds reference-vmm and its tests without dynamic libraries, with the cargo that is on the path.
///
/// # Errors
/// Cargo's, or a static C library is missing.
pub fn build(workspace: &Path) -> Result<Programs> {
    Ok(Programs {
        monitor: artifact(workspace, &["build", "--bin"], "reference-vmm")?,
        tests: artifact(workspace, &["test", "--no-run", "--test"], "kvm")?,
    })
}

/// The programs that go into the lab.
#[derive(Debug)]
pub struct Programs {
    /// `reference-vmm`.
    pub monitor: PathBuf,
    /// Its tests on KVM.
    pub tests: PathBuf,
}

fn artifact(workspace: &Path, how: &[&str], name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).args(how).args([
        name,
        "--package",
        "reference-vmm",
        "--release",
        "--message-format",
        "json",
    ]);
    // A target of its own keeps the flag away from build scripts and procedural macros.
    cargo.args(["--target", "x86_64-unknown-linux-gnu", "--target-dir", "target/lab"]);
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    let built = run_any(&mut cargo, TIMEOUT)?;
    ensure!(built.success, "building {name}: {}", built.stderr);
    let messages = built.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut executables =
        messages.filter(|m| m["target"]["name"] == name).filter_map(|m| Some(m["executable"].as_str()?.into()));
    executables.next_back().with_context(|| format!("cargo built no program {name}"))
}

/// Runs jobs in the lab, one after the other, and tells what became of each.
///
/// # Errors
/// The packages cannot be fetched, or the machine does not start or does not come to its end.
pub fn run(programs: &Programs, jobs: &[Job], scratch: &Path) -> Result<Vec<Outcome>> {
    let machine = Machine::install()?;
    let initramfs = scratch.join("initramfs.cpio");
    let root = Root::install(Suite::Sid)?;
    fs::write(&initramfs, machine.initramfs(programs, jobs, &root)?)?;
    let serial = scratch.join(SERIAL);
    let mut qemu = root.qemu();
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "q35", "-smp", "2"]);
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-m", &MEMORY_MIB.to_string()]);
    qemu.arg("-kernel").arg(&machine.kernel).arg("-initrd").arg(&initramfs);
    qemu.args(["-append", COMMAND_LINE]);
    qemu.arg("-serial").arg(format!("file:{}", serial.display()));
    let ended = run_any(&mut qemu, TIMEOUT);
    let said = String::from_utf8_lossy(&fs::read(&serial).unwrap_or_default()).replace('\r', "");
    let ended = ended.with_context(|| format!("the lab's machine printed: {}", tail(&said)))?;
    ensure!(
        ended.success && said.contains(DONE),
        "the lab's machine ended early: {} {}",
        ended.stderr.trim(),
        tail(&said)
    );
    Ok(jobs.iter().map(|job| outcome(job, &said)).collect())
}

fn outcome(job: &Job, said: &str) -> Outcome {
    let (begin, end) = (format!("lab: begin {}\n", job.name), format!("lab: end {} ", job.name));
    let part = said.split_once(&begin).map_or("", |(_, rest)| rest);
    let (part, status) = part.split_once(&end).unwrap_or((part, "none"));
    let status = status.lines().next().unwrap_or_default();
    let judged = (job.judge)(part).and_then(|numbers| {
        ensure!(status == "0", "it ended with status {status}");
        Ok(numbers)
    });
    Outcome { name: job.name.clone(), result: judged, said: part.to_owned() }
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// What is the same for all runs, in the cache.
struct Machine {
    kernel: PathBuf,
    modules: Vec<(String, Vec<u8>)>,
    busybox: Vec<u8>,
}

impl Machine {
    fn install() -> Result<Machine> {
        let dir = cache_dir()?.join("lab").join(format!("revision-{REVISION}"));
        let lock = lock(&dir.with_extension("lock"))?;
        if !dir.exists() {
            let fresh = dir.with_extension("new");
            if fresh.exists() {
                fs::remove_dir_all(&fresh)?;
            }
            fs::create_dir_all(fresh.join("modules"))?;
            make(&fresh).context("fetching the lab's kernel")?;
            fs::rename(&fresh, &dir)?;
        }
        drop(lock);
        let order = fs::read_to_string(dir.join("order"))?;
        let module = |name: &str| Ok((name.to_owned(), fs::read(dir.join("modules").join(name))?));
        let modules = order.lines().map(module).collect::<Result<_>>()?;
        Ok(Machine { kernel: dir.join("vmlinuz"), modules, busybox: fs::read(dir.join("busybox"))? })
    }

    fn initramfs(&self, programs: &Programs, jobs: &[Job], qemu: &Root) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        for folder in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
            archive.folder(folder);
        }
        archive.program("bin/busybox", &self.busybox);
        for applet in APPLETS {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
        archive.program("init", INIT.as_bytes());
        let mut order = String::new();
        for (name, bytes) in &self.modules {
            archive.file(&format!("modules/{name}.ko"), bytes);
            order.push_str(&format!("{name}\n"));
        }
        archive.file("modules/order", order.as_bytes());
        let commands: String = jobs.iter().map(|job| format!("{} {}\n", job.name, job.command)).collect();
        archive.file("jobs", commands.as_bytes());
        for (name, program) in [("reference-vmm", &programs.monitor), ("kvm-tests", &programs.tests)] {
            archive.program(name, &fs::read(program).with_context(|| format!("reading {}", program.display()))?);
        }
        guest::add(&mut archive, &self.kernel, &self.busybox, qemu)?;
        Ok(archive.finish())
    }
}

fn make(dir: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("lab-").tempdir_in(dir)?;
    let apt = Apt::new(&scratch.path().join("apt"), SUITE, Kind::Binary)?;
    let packages = unpack_packages(&apt, &scratch.path().join("root"))?;
    let modules = Modules::unpack(packages.root(), MODULES)?;
    let mut order = String::new();
    for (name, bytes) in modules.ordered() {
        fs::write(dir.join("modules").join(name), bytes)?;
        order.push_str(&format!("{name}\n"));
    }
    ensure!(order.contains("kvm_amd"), "the kernel's package has no kvm_amd");
    fs::write(dir.join("order"), order)?;
    fs::write(dir.join("busybox"), packages.busybox()?)?;
    fs::rename(packages.kernel()?, dir.join("vmlinuz"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"result":"ok","rounds":4,"bytes":10,"stale_pages":0}"#;

    fn judged(said: &str) -> Result<Value> {
        let job = jobs().into_iter().find(|job| job.name == "demo-log").unwrap();
        outcome(&job, said).result
    }

    #[test]
    fn a_job_holds_if_it_says_so_and_ends_well() {
        let log = |result: &str, status: &str| {
            format!("x\nlab: begin demo-log\n{result}\nlab: end demo-log {status}\nlab: done\n")
        };
        assert!(judged(&log(GOOD, "0")).is_ok());
        assert!(judged(&log(GOOD, "1")).is_err());
        assert!(judged(&log("", "0")).is_err());
        assert!(judged(&log(&GOOD.replace("pages\":0", "pages\":3"), "0")).is_err());
        assert!(judged(&log(&GOOD.replace("ok", "failed"), "0")).is_err());
        assert!(judged(&log(&GOOD.replace(":4", ":1"), "0")).is_err());
        assert!(judged(&format!("lab: begin demo-log\n{GOOD}\n")).is_err());
        assert!(judged("").is_err());
    }

    #[test]
    fn tests_hold_if_all_pass_and_there_are_some() {
        let said = |n: u32, what: &str| format!("\ntest result: {what}. {n} passed; 0 failed; 0 ignored\n");
        assert!(judge_tests::<6>(&said(6, "ok")).is_ok());
        assert!(judge_tests::<6>(&said(0, "ok")).is_err());
        assert!(judge_tests::<6>(&said(6, "FAILED")).is_err());
    }
}
