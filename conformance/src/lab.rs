//! A machine with a KVM as on hardware, where the host's own is paravirtual: QEMU's TCG emulates AMD's SVM with nested
//! paging, and Linux in it loads `kvm_amd` (`conformance/lab/README.md`).
//!
//! reference-vmm runs in there, with its dirty log and with dirty rings, and every stale page that a guest finds
//! counts. With a kernel of its own it has VFIO devices too, and guests that have one go from one monitor to another.

mod boot;
mod guest;
mod job;
mod kernel;
mod machine;
mod peer;
mod vfio;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use self::boot::Boot;
use self::job::Judge;
pub use self::job::{Job, Outcome, Programs};
pub use self::vfio::RECORDING;
use crate::process::run_any;

/// Ends a hang. A build without dynamic libraries takes some minutes.
const TIMEOUT: Duration = Duration::from_secs(7200);
/// At once. Each holds 2.5 GiB.
const MOST_MACHINES: usize = 4;
/// The file in the scratch folder with what the machines print.
pub const SERIAL: &str = "serial.txt";

/// The jobs for right and wrong: with these accelerators the demo with each and the tests with the smallest ring, Linux
/// as a guest, guests that go before their memory, and migrations with VFIO devices.
pub fn jobs() -> Vec<Job> {
    let demo = |name: &str, accel: &str, more: &str| Job {
        name: format!("demo-{name}"),
        command: format!(
            "/reference-vmm demo --json --unix --memory 64M --dirty 8M --rate 8M --max-bandwidth 24M --timeout 1200 --accel {accel} {more}"
        ),
        plan: None,
        boot: Boot::Debian,
        judge: Judge::Printed(judge_demo),
    };
    let tests = |name: &str, environment: &str, tests: &str, judge: fn(&str) -> Result<Value>| Job {
        name: name.into(),
        command: format!("{environment} QEVM_REQUIRE_KVM=1 /kvm-tests --color never --test-threads 1 {tests}"),
        plan: None,
        boot: Boot::Debian,
        judge: Judge::Printed(judge),
    };
    let mut jobs = vec![
        demo("log", "kvm", ""),
        demo("ring-4096", "kvm,dirty-ring-size=4096", ""),
        demo("ring-1024", "kvm,dirty-ring-size=1024", ""),
        demo("ring-1024-two-vcpus", "kvm,dirty-ring-size=1024", "--smp 2"),
        tests("tests-ring-1024", "QEVM_DIRTY_RING_SIZE=1024", "dirty_", judge_tests::<6>),
        tests("tests-tsc", "", "--exact state_sets_the_tsc_exactly", judge_tests::<1>),
        tests("linux", guest::ENVIRONMENT, "--skip virtio_devices linux_", judge_tests::<6>),
        tests("linux-virtio", guest::ENVIRONMENT, "virtio_devices", judge_tests::<2>),
    ];
    jobs.extend(peer::commands().map(|(name, command)| Job {
        name: name.into(),
        command,
        plan: None,
        boot: Boot::Debian,
        judge: Judge::Printed(peer::judge),
    }));
    jobs.extend(vfio::cases().into_iter().map(Job::from));
    jobs
}

/// The jobs whose numbers count, by a clock that follows the machine's instructions and not the host.
pub fn figures() -> Vec<Job> {
    vfio::figures().into_iter().map(Job::from).collect()
}

/// The jobs that leave a migration in the folder `share` of the scratch folder, byte by byte.
pub fn recordings() -> Vec<Job> {
    vfio::recordings().into_iter().map(Job::from).collect()
}

/// The tables of what was measured, and which goals it misses.
pub fn tables(outcomes: &[Outcome]) -> (String, Vec<String>) {
    vfio::tables(outcomes)
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

/// This many tests, at least, have passed, and none has failed.
fn judge_tests<const LEAST: u64>(said: &str) -> Result<Value> {
    let summary = said.lines().find_map(|line| line.trim().strip_prefix("test result: ok. "));
    let passed = summary.context("the tests did not pass")?.split_once(" passed").context("no number of tests")?.0;
    let passed: u64 = passed.parse()?;
    ensure!(passed >= LEAST, "only {passed} tests ran");
    Ok(json!({ "passed": passed }))
}

/// Builds what the jobs run, without dynamic libraries, with the cargo that is on the path.
///
/// # Errors
/// Cargo's, or a static C library is missing.
pub fn build(workspace: &Path, jobs: &[Job]) -> Result<Programs> {
    let uses = |program: &str| {
        let program = format!("/{program}");
        jobs.iter().any(|job| job.command.contains(&program) || job.plan.iter().any(|plan| plan.contains(&program)))
    };
    let build = |package: &str, how: &[&str], name: &str, program: &str| {
        // The tests start the monitor as well.
        let wanted = uses(program) || program == "reference-vmm" && uses("kvm-tests");
        wanted.then(|| artifact(workspace, package, how, name)).transpose()
    };
    Ok(Programs {
        workspace: workspace.to_path_buf(),
        monitor: build("reference-vmm", &["build", "--bin"], "reference-vmm", "reference-vmm")?,
        tests: build("reference-vmm", &["test", "--no-run", "--test"], "kvm", "kvm-tests")?,
        driver: build("qevm-lab", &["build", "--bin"], "qevm-lab", "driver")?,
        conformance: build("qevm-conformance", &["build", "--bin"], peer::PROGRAM, peer::PROGRAM)?,
        linux_guest: build("qevm-lab", &["build", "--bin"], guest::USER, guest::USER)?,
    })
}

fn artifact(workspace: &Path, package: &str, how: &[&str], name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).args(how).args([name, "--package", package, "--release", "--message-format", "json"]);
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

/// Runs jobs in the lab, those with the same kernel and clock in one boot, and tells what became of each. A clock that
/// counts instructions runs on one processor and does not mind its neighbours: such jobs are dealt out to as many
/// machines as this one has processors.
///
/// # Errors
/// The packages cannot be fetched, or a machine does not start or does not come to its end.
pub fn run(programs: &Programs, jobs: &[Job], scratch: &Path) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for boot in Boot::ALL {
        let jobs: Vec<_> = jobs.iter().filter(|job| job.boot == boot).collect();
        if jobs.is_empty() {
            continue;
        }
        let hands = deal(&jobs, if boot == Boot::Counted { processors() } else { 1 });
        let machines: Vec<_> = (0..hands.len()).map(|number| scratch.join(format!("machine-{number}"))).collect();
        let said: Vec<Result<String>> = thread::scope(|scope| {
            let pairs = hands.iter().zip(&machines);
            let running: Vec<_> = pairs
                .map(|(hand, machine)| scope.spawn(move || machine::boot(boot, programs, hand, machine, scratch)))
                .collect();
            running.into_iter().map(|machine| machine.join().unwrap_or_else(|_| Err(anyhow!("it panicked")))).collect()
        });
        for machine in &machines {
            keep(machine, scratch)?;
        }
        for (hand, said) in hands.iter().zip(said) {
            let said = said?;
            outcomes.extend(hand.iter().map(|job| outcome(job, &said)));
        }
    }
    Ok(outcomes)
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MOST_MACHINES)
}

/// Neighbours are alike, and cost alike.
fn deal<'j>(jobs: &[&'j Job], hands: usize) -> Vec<Vec<&'j Job>> {
    let hand = |number| jobs.iter().skip(number).step_by(hands).copied().collect();
    (0..hands).map(hand).filter(|hand: &Vec<_>| !hand.is_empty()).collect()
}

/// Appends what a machine printed to what others did.
fn keep(machine: &Path, scratch: &Path) -> Result<()> {
    let mut all = fs::OpenOptions::new().create(true).append(true).open(scratch.join(SERIAL))?;
    std::io::Write::write_all(&mut all, &fs::read(machine.join(machine::CONSOLE)).unwrap_or_default())?;
    Ok(())
}

fn outcome(job: &Job, said: &str) -> Outcome {
    let (begin, end) = (format!("lab: begin {}\n", job.name), format!("lab: end {} ", job.name));
    let part = said.split_once(&begin).map_or("", |(_, rest)| rest);
    let (part, status) = part.split_once(&end).unwrap_or((part, "none"));
    let status = status.lines().next().unwrap_or_default();
    let judged = match &job.judge {
        Judge::Printed(judge) => judge(part),
        Judge::Case(case) => vfio::judge(case, part),
    };
    let judged = judged.and_then(|numbers| {
        ensure!(status == "0", "it ended with status {status}");
        Ok(numbers)
    });
    Outcome { name: job.name.clone(), result: judged, said: part.to_owned() }
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
    fn every_job_is_dealt_to_one_machine() {
        let jobs = jobs();
        let jobs: Vec<_> = jobs.iter().collect();
        for hands in [1, 2, 3, jobs.len() + 1] {
            let dealt = deal(&jobs, hands);
            assert_eq!(dealt.len(), hands.min(jobs.len()));
            let mut names: Vec<_> = dealt.iter().flatten().map(|job| job.name.as_str()).collect();
            let mut all: Vec<_> = jobs.iter().map(|job| job.name.as_str()).collect();
            names.sort_unstable();
            all.sort_unstable();
            assert_eq!(names, all);
        }
        assert!(deal(&[], 2).is_empty());
    }

    #[test]
    fn tests_hold_if_all_pass_and_there_are_some() {
        let said = |n: u32, what: &str| format!("\ntest result: {what}. {n} passed; 0 failed; 0 ignored\n");
        assert!(judge_tests::<6>(&said(6, "ok")).is_ok());
        assert!(judge_tests::<6>(&said(0, "ok")).is_err());
        assert!(judge_tests::<6>(&said(6, "FAILED")).is_err());
    }
}
