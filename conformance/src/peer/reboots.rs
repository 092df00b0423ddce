//! Guests that are reset or switched off, and monitors that are ended: what QEMU 11.1 says and does, and what
//! reference-vmm does.

use super::{Endpoint, Env, Load, Monitor, Stop};
use crate::qmp::{Event, QmpError};
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::Progress;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
const PAYLOAD: &str = "dirty=1M rate=4M hold=1M zero=1M verify=16384 report=20";
const QEMU: Stop = Stop::Qemu(Suite::Sid, Accel::Kvm);

/// What happens in a scene.
enum Step {
    /// A command; its refusal is noted.
    Execute(&'static str, Value),
    /// Every event is noted up to this one.
    Until(&'static str),
    /// The guest has printed as many starts, and progress after the last of them.
    Starts(usize),
    /// SIGTERM.
    Terminate,
    /// Every event is noted up to the end of the monitor, and its exit code.
    End,
}
use Step::{End, Execute, Starts, Terminate, Until};

struct Scene {
    name: &'static str,
    payload: &'static str,
    options: &'static [&'static str],
    steps: Vec<Step>,
}

fn run(command: &'static str) -> Step {
    Execute(command, Value::Null)
}

fn scenes() -> Vec<Scene> {
    let scene = |name, payload, options, steps| Scene { name, payload, options, steps };
    let status = || run("query-status");
    vec![
        scene(
            "reset register",
            "reset=100 resets=2",
            &["-S"],
            vec![run("cont"), Until("RESET"), Until("RESET"), Starts(3), status()],
        ),
        scene(
            "triple fault",
            "reset=100 resets=1 way=2",
            &["-S"],
            vec![run("cont"), Until("RESET"), Starts(2), status()],
        ),
        scene("no reboot", "reset=100", &["-S", "-no-reboot"], vec![run("cont"), End]),
        scene(
            "reboot is shutdown is pause",
            "reset=100 resets=1",
            &["-S", "-action", "reboot=shutdown,shutdown=pause"],
            vec![
                run("cont"),
                Until("STOP"),
                status(),
                run("cont"),
                run("system_reset"),
                Until("SHUTDOWN"),
                status(),
                Execute("set-action", json!({ "reboot": "reset", "panic": "pause", "watchdog": "debug" })),
                run("system_reset"),
                Until("RESET"),
                status(),
                run("cont"),
                Starts(2),
                run("quit"),
                End,
            ],
        ),
        scene(
            "system_reset",
            "",
            &[],
            vec![
                Starts(1),
                run("system_reset"),
                Until("RESET"),
                Starts(2),
                status(),
                run("stop"),
                run("system_reset"),
                Until("RESET"),
                status(),
                run("cont"),
                Starts(3),
                status(),
                Execute("set-action", json!({ "reboot": "shutdown" })),
                run("system_reset"),
                End,
            ],
        ),
        scene("power button", "button=2", &[], vec![Starts(1), run("system_powerdown"), End]),
        scene(
            "power button and no shutdown",
            "button=2",
            &["-no-shutdown"],
            vec![
                Starts(1),
                run("system_powerdown"),
                Until("STOP"),
                status(),
                run("cont"),
                run("system_reset"),
                Until("RESET"),
                status(),
                run("cont"),
                Starts(2),
                Terminate,
                End,
            ],
        ),
        scene("signal", "", &[], vec![Starts(1), Terminate, End]),
        scene(
            "before a guest comes",
            "",
            &["-incoming", "defer"],
            vec![
                run("system_reset"),
                Until("RESET"),
                run("system_powerdown"),
                Until("POWERDOWN"),
                status(),
                Execute("set-action", json!({ "reboot": "pause" })),
                Execute("set-action", json!({ "shutdown": "off" })),
                Execute("set-action", json!({ "panic": "reset" })),
                Execute("set-action", json!({ "watchdog": 1 })),
                Execute("set-action", json!({ "crash": "none" })),
                Terminate,
                End,
            ],
        ),
    ]
}

/// Plays every scene at both, and says where they differ.
///
/// # Errors
/// A scene does not come to its end.
pub fn compare(root: &Root, program: &Monitor, scratch: &Path) -> Result<Vec<String>> {
    let roots = BTreeMap::from([(Suite::Sid, root.clone())]);
    let mut differences = Vec::new();
    for scene in scenes() {
        let play = |stop| {
            let (roots, options) = (&roots, scene.options);
            // reference-vmm's name of the option has two dashes.
            let options = match (options, stop) {
                (["-incoming", "defer"], Stop::Reference) => &["--incoming", "defer"],
                _ => options,
            };
            let env = Env { roots, program, scratch, more: options };
            scene.play(stop, Some(root), &env).with_context(|| format!("{} at {stop}", scene.name))
        };
        let (theirs, ours) = (play(QEMU)?, play(Stop::Reference)?);
        if theirs != ours {
            differences.push(format!("{}:\n  QEMU {theirs:?}\n  ours {ours:?}", scene.name));
        }
    }
    Ok(differences)
}

impl Scene {
    fn play(&self, stop: Stop, root: Option<&Root>, env: &Env<'_>) -> Result<Vec<String>> {
        let mut endpoint = start(stop, root, env, self.payload, "scene", false)?;
        let mut noted = Vec::new();
        for step in &self.steps {
            match step {
                Execute(command, arguments) => match endpoint.monitor().execute(command, arguments.clone()) {
                    Ok(value) => noted.push(format!("{command}: {value}")),
                    Err(error) => match error.downcast_ref() {
                        Some(QmpError::Refused { description, .. }) => noted.push(format!("{command}: {description}")),
                        _ => return Err(error),
                    },
                },
                Until(name) => loop {
                    let event = endpoint.monitor().next_event(PATIENCE)?;
                    noted.push(shown(&event));
                    if event.name == *name {
                        break;
                    }
                },
                Starts(number) => wait_for_starts(&endpoint, *number)?,
                Terminate => endpoint.monitor().terminate()?,
                End => {
                    let (events, code) = endpoint.monitor().wait_for_end(PATIENCE)?;
                    noted.extend(events.iter().map(shown));
                    noted.push(format!("code {code:?}"));
                }
            }
        }
        Ok(noted)
    }
}

fn shown(event: &Event) -> String {
    format!("{} {}", event.name, event.data)
}

fn start(
    stop: Stop,
    root: Option<&Root>,
    env: &Env<'_>,
    payload: &str,
    name: &str,
    incoming: bool,
) -> Result<Endpoint> {
    let load = Load { memory: 32, payload: format!("{PAYLOAD} {payload}"), ..Load::default() };
    let root = root.filter(|_| stop != Stop::Reference);
    Endpoint::start(stop, root, env, &load, name, incoming, false)
}

/// What the guest has printed since each of its starts.
fn runs(endpoint: &Endpoint) -> Result<Vec<String>> {
    let text = endpoint.text()?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.split("qevm-payload start cpus=").map(str::to_owned).collect())
}

fn wait_for_starts(endpoint: &Endpoint, number: usize) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let runs = runs(endpoint)?;
        let reports = runs.last().map_or(0, |run| run.lines().filter_map(Progress::parse).count());
        if let Some(bad) = ["stale-page", "trap", "error"].iter().find(|bad| runs.concat().contains(**bad)) {
            bail!("{bad} in what the guest printed: {}", runs.concat());
        }
        if runs.len() > number && reports > 2 {
            ensure!(runs.len() == number + 1, "{} starts, not {number}", runs.len() - 1);
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "start {number} does not come: {}", runs.concat());
        thread::sleep(POLL);
    }
}

/// Resets a guest before, during and after a migration from one monitor to the other.
///
/// # Errors
/// What went wrong: another event than was to come, or the guest did not start anew.
pub fn play(from: Stop, to: Stop, root: &Root, program: &Monitor, scratch: &Path) -> Result<()> {
    let roots = BTreeMap::from([(Suite::Sid, root.clone())]);
    let env = Env { roots: &roots, program, scratch, more: &[] };
    let mut source = start(from, Some(root), &env, "reset=1000 resets=1", "source", false)?;
    let mut destination = start(to, Some(root), &env, "reset=1000 resets=1", "destination", true)?;
    source.meets(to)?;
    let uri = format!("unix:{}", scratch.join("reboots.sock").display());
    for endpoint in [&mut source, &mut destination] {
        endpoint.monitor().set_capabilities(&["pause-before-switchover"])?;
    }
    destination.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
    wait_for_starts(&source, 1)?;
    source.monitor().set_parameters(&json!({ "max-bandwidth": 400_000, "downtime-limit": 1 }))?;
    source.monitor().execute("migrate", json!({ "uri": uri }))?;
    source.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "active")?;
    let expect = |endpoint: &mut Endpoint, wanted: &str| -> Result<()> {
        let event = shown(&endpoint.monitor().next_event(PATIENCE)?);
        ensure!(event == wanted, "the next event is {event}, not {wanted}");
        Ok(())
    };
    let (by_guest, by_qmp) = (
        "RESET {\"guest\":true,\"reason\":\"guest-reset\"}",
        "RESET {\"guest\":false,\"reason\":\"host-qmp-system-reset\"}",
    );
    expect(&mut source, by_guest)?;
    wait_for_starts(&source, 2)?;
    source.monitor().execute("system_reset", Value::Null)?;
    expect(&mut source, by_qmp)?;
    wait_for_starts(&source, 3)?;
    destination.monitor().execute("system_reset", Value::Null)?;
    expect(&mut destination, by_qmp)?;
    source.monitor().set_parameters(&json!({ "max-bandwidth": 1 << 30, "downtime-limit": 1000 }))?;
    source.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "pre-switchover")?;
    expect(&mut source, "STOP null")?;
    source.monitor().execute("system_reset", Value::Null)?;
    expect(&mut source, by_qmp)?;
    source.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    source.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
    expect(&mut destination, "RESUME null")?;
    // It starts there, for its last reset was after it had been stopped.
    wait_for_starts(&destination, 1)?;
    destination.monitor().execute("system_reset", Value::Null)?;
    expect(&mut destination, by_qmp)?;
    wait_for_starts(&destination, 2)?;
    source.monitor().execute("system_reset", Value::Null)?;
    expect(&mut source, by_qmp)?;
    let status = source.monitor().execute("query-status", Value::Null)?;
    ensure!(status["status"] == "prelaunch", "the source is {status}");
    Ok(())
}
