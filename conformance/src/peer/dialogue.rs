//! The same QMP commands to a real QEMU 11.1 and to reference-vmm: the replies are compared.
//!
//! Of an error, class and text are to be equal; of a return value, the members and their types, for numbers differ from
//! machine to machine.

mod commands;
mod legality;
pub mod releases;

use self::commands::{BEFORE_THE_START, HUMAN, WITH_RINGS};
use super::endpoint::start_reference;
use super::monitor::Monitor;
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::qmp::QmpError;
use crate::roots::Root;
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// What a machine that waits for a guest is asked.
const WAITING: &[(&str, &str)] = &[
    ("query-status", ""),
    ("query-migrate", ""),
    ("cont", ""),
    ("query-status", ""),
    ("migrate", r#"{"uri":"tcp:127.0.0.1:1"}"#),
    ("migrate-incoming", ""),
    ("migrate-incoming", r#"{"uri":"foo"}"#),
    ("migrate-set-parameters", r#"{"multifd-channels":4}"#),
    ("migrate-incoming", r#"{"uri":"unix:SOCKET"}"#),
    ("query-migrate", ""),
    ("migrate-incoming", r#"{"uri":"unix:SOCKET.2"}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"multifd","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"events","state":true}]}"#),
    ("migrate-set-parameters", r#"{"multifd-channels":3}"#),
    ("migrate_cancel", ""),
    ("query-migrate", ""),
    ("stop", ""),
    ("query-status", ""),
];

/// What a machine is asked that waits for a guest, and whose RAM is in a file on a disk.
const ON_A_DISK: &[(&str, &str)] = &[
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"postcopy-ram","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"background-snapshot","state":true}]}"#),
    ("query-migrate-capabilities", ""),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"events","state":true}]}"#),
    ("migrate-incoming", r#"{"uri":"unix:SOCKET"}"#),
];

/// Of a guest whose pages, though they are zero, do not fit into the buffers of a socket.
const MEMORY: &str = "256M";

const POLL: Duration = Duration::from_millis(10);

/// The two who are asked.
struct Both {
    qemu: Qemu,
    ours: Qemu,
    differences: Vec<String>,
}

/// Asks both on, and tells how many replies were compared.
type Part = fn(&mut Both, &Path) -> Result<usize>;

/// Asks both, and gives what they answered differently, and how many replies were compared.
///
/// # Errors
/// One of them does not start, dies, or does not answer.
pub fn compare(root: &Root, program: &Monitor, scratch: &Path) -> Result<(Vec<String>, usize)> {
    let (mut differences, mut replies) = (Vec::new(), 0);
    const RINGS: [&str; 4] = ["-S", "-smp", "2", "--accel"];
    let tcg = ["-M", "microvm,accel=tcg"];
    const DISK: [&str; 6] = [
        "--incoming",
        "defer",
        "-M",
        "microvm,memory-backend=mem",
        "--object",
        "memory-backend-file,id=mem,size=256M,share=on,mem-path=SCRATCH",
    ];
    let parts: [(&str, &[&str], [&str; 2], Part); 5] = [
        ("disk", &DISK, tcg, |both, scratch| both.ask_all(ON_A_DISK, scratch)),
        ("start", &["-S"], tcg, |both, scratch| {
            let human = both.ask_all_by_line(HUMAN)?;
            Ok(human + both.ask_all(BEFORE_THE_START, scratch)?)
        }),
        ("waiting", &["--incoming", "defer"], tcg, |both, scratch| both.ask_all(WAITING, scratch)),
        ("migrating", &[], tcg, |both, scratch| both.migrate(scratch)),
        ("rings", &RINGS, ["-M", "microvm"], |both, scratch| {
            let replies = both.ask_all(WITH_RINGS, scratch)?;
            Ok(replies + both.tell(limited, scratch)?)
        }),
    ];
    for (name, more, machine, play) in parts {
        let mut arguments = vec!["-m".to_owned(), MEMORY.to_owned()];
        // What is made there has no name.
        arguments.extend(more.iter().map(|a| a.replace("SCRATCH", &scratch.display().to_string())));
        if more == RINGS {
            arguments.push("kvm,dirty-ring-size=1024".into());
        }
        // The one spelling that both take.
        let ours: Vec<_> = arguments.iter().map(|a| if a == "-smp" { "--smp".into() } else { a.clone() }).collect();
        let ours = start_reference(program, &format!("{name}-ours"), &ours, scratch)?;
        arguments.extend(machine.map(String::from));
        let qemu = Qemu::start(root, &format!("{name}-qemu"), &arguments, scratch)?;
        let mut both = Both { qemu, ours, differences: Vec::new() };
        replies += play(&mut both, scratch).with_context(|| format!("part '{name}'"))?;
        differences.append(&mut both.differences);
        both.qemu.quit();
        both.ours.quit();
    }
    replies += legality::compare(root, program, scratch, &mut differences)?;
    Ok((differences, replies))
}

impl Both {
    fn ask_all(&mut self, rows: &[(&str, &str)], scratch: &Path) -> Result<usize> {
        for (command, arguments) in rows {
            let mut replies = Vec::new();
            for (who, monitor) in [("qemu", &mut self.qemu), ("ours", &mut self.ours)] {
                let socket = scratch.join(format!("{who}.incoming")).display().to_string();
                let arguments = match arguments.replace("SOCKET", &socket) {
                    text if text.is_empty() => Value::Null,
                    text => serde_json::from_str(&text).with_context(|| format!("the arguments {text}"))?,
                };
                replies.push(reply(monitor, command, arguments)?);
            }
            self.compare(&format!("{command} {arguments}"), &replies[0], &replies[1]);
        }
        Ok(rows.len())
    }

    /// Asks the human monitor.
    fn ask_all_by_line(&mut self, lines: &[&str]) -> Result<usize> {
        for line in lines {
            let ask = |monitor: &mut Qemu| reply(monitor, "human-monitor-command", json!({ "command-line": line }));
            let (qemu, ours) = (ask(&mut self.qemu)?, ask(&mut self.ours)?);
            self.compare(line, &qemu, &ours);
        }
        Ok(lines.len())
    }

    fn compare(&mut self, what: &str, qemu: &Value, ours: &Value) {
        if qemu != ours {
            self.differences.push(format!("{what}\n    QEMU: {qemu}\n    here: {ours}"));
        }
    }

    /// What is told of migrations that are under way, cancelled, completed and failed, and the events on the way.
    fn migrate(&mut self, scratch: &Path) -> Result<usize> {
        self.tell(story, scratch)
    }

    fn tell(&mut self, story: fn(&mut Qemu, &Path) -> Result<Story>, scratch: &Path) -> Result<usize> {
        let told = [&mut self.qemu, &mut self.ours].map(|monitor| story(monitor, scratch));
        let [qemu, ours] = told;
        let (qemu, ours) = (qemu?, ours?);
        ensure!(qemu.len() == ours.len(), "{} and {} things were told", qemu.len(), ours.len());
        for ((what, qemu), (_, ours)) in qemu.iter().zip(&ours) {
            self.compare(what, qemu, ours);
        }
        Ok(qemu.len())
    }
}

/// A socket that takes connections and as much as fits into their buffers: a migration there is under way until it is
/// cancelled. A rate limit is no such thing, for a QEMU that gets no processor sends more than that.
struct NobodyReads {
    socket: UnixListener,
    uri: String,
}

impl NobodyReads {
    /// At this path, which is not in use.
    fn at(path: PathBuf) -> Result<NobodyReads> {
        if path.exists() {
            fs::remove_file(&path)?;
        }
        Ok(NobodyReads { socket: UnixListener::bind(&path)?, uri: format!("unix:{}", path.display()) })
    }
}

type Story = Vec<(&'static str, Value)>;

fn story(monitor: &mut Qemu, scratch: &Path) -> Result<Story> {
    let mut told = Story::new();
    let nobody_reads = NobodyReads::at(scratch.join("story"))?;
    let uri = json!({ "uri": nobody_reads.uri });
    monitor.set_capabilities(&["events"])?;
    monitor.set_parameters(&json!({ "max-bandwidth": 2_000, "downtime-limit": 1 }))?;

    monitor.execute("migrate", uri.clone())?;
    let active = wait(monitor, "query-migrate", "active")?;
    told.push(("query-migrate while it is active", shape(&active)));
    told.push(("migrate while one is active", reply(monitor, "migrate", uri.clone())?));
    let capabilities = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    told.push(("capabilities while it is active", reply(monitor, "migrate-set-capabilities", capabilities)?));
    told.push(("migrate-pause while it is active", reply(monitor, "migrate-pause", Value::Null)?));
    let state = json!({ "state": "pre-switchover" });
    told.push(("migrate-continue while it is active", reply(monitor, "migrate-continue", state)?));
    monitor.execute("migrate_cancel", Value::Null)?;
    told.push(("query-migrate when it is cancelled", shape(&wait(monitor, "query-migrate", "cancelled")?)));
    told.push(("query-status after it was cancelled", monitor.execute("query-status", Value::Null)?));
    told.push(("events up to cancelled", events(monitor, "cancelled")?));

    monitor.set_parameters(&json!({ "max-bandwidth": 0, "downtime-limit": 2000 }))?;
    // Nothing answers at the sink, which QEMU takes for a guest that has arrived.
    monitor.execute("migrate", json!({ "uri": "exec:cat > /dev/null" }))?;
    told.push(("query-migrate when it is completed", shape(&wait(monitor, "query-migrate", "completed")?)));
    told.push(("query-status after it was completed", wait(monitor, "query-status", "postmigrate")?));
    told.push(("events up to completed", events(monitor, "completed")?));
    let nobody = json!({ "uri": format!("unix:{}/nobody", scratch.display()) });
    monitor.execute("cont", Value::Null)?;
    monitor.execute("migrate", nobody)?;
    told.push(("query-migrate when it has failed", shape(&wait(monitor, "query-migrate", "failed")?)));
    told.push(("events up to failed", events(monitor, "failed")?));
    Ok(told)
}

/// What QMP reports of measured dirty rates, and of limits during a migration under capability `dirty-limit`,
/// which is on.
fn limited(monitor: &mut Qemu, scratch: &Path) -> Result<Story> {
    let mut told = Story::new();
    let measure = |seconds: u64| json!({ "calc-time": seconds, "mode": "dirty-ring" });
    told.push(("calc-dirty-rate", reply(monitor, "calc-dirty-rate", measure(1))?));
    let measured = wait(monitor, "query-dirty-rate", "measured")?;
    told.push(("query-dirty-rate when it was measured", shape(&measured)));
    let nobody_reads = NobodyReads::at(scratch.join("limited"))?;
    let uri = json!({ "uri": nobody_reads.uri });
    monitor.set_parameters(&json!({ "max-bandwidth": 1000, "downtime-limit": 1 }))?;
    for (set_first, name) in [(true, "a limit set before"), (false, "no limit set before")] {
        if set_first {
            monitor.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": 7 }))?;
        }
        monitor.execute("migrate", uri.clone())?;
        told.push((name, shape(&wait(monitor, "query-migrate", "active")?)));
        for (command, arguments) in [
            ("set-vcpu-dirty-limit", json!({ "dirty-rate": 9 })),
            ("set-vcpu-dirty-limit", json!({ "dirty-rate": 9, "cpu-index": 9 })),
            ("set-vcpu-dirty-limit", json!({ "dirty-rate": 0 })),
            ("cancel-vcpu-dirty-limit", json!({})),
            ("cancel-vcpu-dirty-limit", json!({ "cpu-index": 9 })),
            ("query-vcpu-dirty-limit", json!({})),
            ("query-migrate", json!({})),
        ] {
            told.push((name, reply(monitor, command, arguments)?));
        }
        monitor.execute("migrate_cancel", Value::Null)?;
        told.push((name, shape(&wait(monitor, "query-migrate", "cancelled")?)));
        told.push((name, reply(monitor, "query-vcpu-dirty-limit", Value::Null)?));
        monitor.execute("cancel-vcpu-dirty-limit", Value::Null)?;
    }
    // The longest that there is, so that it is still under way however long the questions take. It ends with the
    // monitor.
    told.push(("calc-dirty-rate for a minute", reply(monitor, "calc-dirty-rate", measure(60))?));
    let measuring = wait(monitor, "query-dirty-rate", "measuring")?;
    told.push(("query-dirty-rate while it is measured", shape(&measuring)));
    told.push(("calc-dirty-rate while one is measured", reply(monitor, "calc-dirty-rate", measure(1))?));
    Ok(told)
}

/// What `command` tells when its status is `wanted`. Statuses come late: a QEMU says that its migration has completed
/// before it leaves `finish-migrate`, and answers `calc-dirty-rate` before the rate is being measured.
fn wait(monitor: &mut Qemu, command: &str, wanted: &str) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let told = monitor.execute(command, Value::Null)?;
        if told["status"] == wanted {
            return Ok(told);
        }
        ensure!(Instant::now() < deadline, "{command} still says {told}, {wanted} wanted");
        thread::sleep(POLL);
    }
}

/// The events up to a change of status, but for the passes while the guest runs, whose number differs.
fn events(monitor: &mut Qemu, last: &str) -> Result<Value> {
    let mut seen = Vec::new();
    loop {
        let event = monitor.next_event(PATIENCE)?;
        match (event.name.as_str(), event.data["status"].as_str()) {
            ("MIGRATION_PASS", _) if !seen.contains(&json!("STOP")) => {}
            ("MIGRATION", Some(status)) => {
                seen.push(json!(status));
                if status == last {
                    return Ok(seen.into());
                }
            }
            (name, _) => seen.push(json!(name)),
        }
    }
}

/// An error with its class and text, or the shape of what is returned.
fn reply(monitor: &mut Qemu, command: &str, arguments: Value) -> Result<Value> {
    match monitor.execute(command, arguments) {
        // What is printed is compared as it is.
        Ok(text @ Value::String(_)) => Ok(json!({ "return": text })),
        Ok(value) => Ok(json!({ "return": shape(&value) })),
        Err(error) => match error.downcast_ref::<QmpError>() {
            Some(QmpError::Refused { class, description, .. }) => Ok(json!({ "class": class, "desc": description })),
            _ => Err(error),
        },
    }
}

/// Members that reference-vmm has besides QEMU's; docs/peer.md tells of them.
const EXTENSIONS: [&str; 8] = [
    "x-parts",
    "x-stalled",
    "x-connect-timeout",
    "x-handshake-timeout",
    "x-idle-timeout",
    "x-switchover-timeout",
    "x-handover-timeout",
    "x-tcp-user-timeout",
];

/// Members and types, but for those that QEMU does not have. Texts that are names from a list count as they are.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let members = members.iter().filter(|(name, _)| !EXTENSIONS.contains(&name.as_str()));
            let mut shapes: Vec<_> = members.map(|(name, value)| (name.clone(), member(name, value))).collect();
            shapes.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(Map::from_iter(shapes))
        }
        Value::Array(items) => items.iter().map(shape).collect(),
        Value::String(_) => "text".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "boolean".into(),
        Value::Null => Value::Null,
    }
}

fn member(name: &str, value: &Value) -> Value {
    match name {
        "status"
        | "mode"
        | "capability"
        | "state"
        | "running"
        | "calc-time-unit"
        | "type"
        | "multifd-compression"
        | "zero-page-detection"
        | "limit-rate"
        | "cpu-index" => value.clone(),
        _ => shape(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_tell_members_and_types_apart() {
        let shape_of = |text: &str| shape(&serde_json::from_str(text).unwrap());
        let same =
            [(r#"{"a":1,"b":[true]}"#, r#"{"b":[false],"a":2.5}"#), (r#"{"ram":{"x":"a"}}"#, r#"{"ram":{"x":"b"}}"#)];
        same.iter().for_each(|(a, b)| assert_eq!(shape_of(a), shape_of(b)));
        let differ = [
            (r#"{"a":1}"#, r#"{"a":"1"}"#),
            (r#"{"a":1}"#, r#"{"a":1,"b":1}"#),
            (r#"{"status":"active"}"#, r#"{"status":"failed"}"#),
            (r#"[1]"#, r#"[1,2]"#),
        ];
        differ.iter().for_each(|(a, b)| assert_ne!(shape_of(a), shape_of(b)));
    }
}
