//! The table of what reference-vmm has of QEMU's migration interface, against a real QEMU, reference-vmm, the tests
//! that it names and the page that it is. What this machine lacks is skipped by name; `QEVM_REQUIRE_QEMU=1` and
//! `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use anyhow::{Context, Result, ensure};
use qevm_conformance::interface::{
    CAPABILITIES, CHANNELS, COMMANDS, PARAMETERS, Row, Schema, Verdict, covers, page, types,
};
use qevm_conformance::launch::Qemu;
use qevm_conformance::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::peer::{self, Monitor};
use qevm_conformance::qmp::QmpError;
use qevm_conformance::roots::{Root, Suite};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Writes the page instead of comparing it.
const WRITE_PAGES: &str = "QEVM_WRITE_PAGES";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_owned()
}

fn program() -> Monitor {
    Monitor::new(PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance")))
}

fn skipped(name: &str, variable: &str, why: &str) {
    assert!(!required(variable), "{variable}=1, but {why}");
    list_skips("interface", [(name, why)]).unwrap();
}

fn rows() -> impl Iterator<Item = &'static Row> {
    [CAPABILITIES, PARAMETERS, CHANNELS, COMMANDS].into_iter().flatten()
}

/// QEMU 11.1 before its guest has run.
fn qemu(scratch: &Path) -> Result<Qemu> {
    let root = Root::install(Suite::Sid)?;
    let arguments = ["-m", "16M", "-S", "-M", "microvm,accel=tcg"].map(String::from);
    Qemu::start(&root, "qemu", &arguments, scratch)
}

#[test]
fn the_page_is_what_the_table_says() {
    let path = repository().join("docs/migration-interface.md");
    if std::env::var_os(WRITE_PAGES).is_some() {
        fs::write(&path, page()).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(written == page(), "{} is not what the table says: {WRITE_PAGES}=1 writes it", path.display());
}

#[test]
fn the_tests_that_the_table_names_exist() {
    let journeys: Vec<String> = peer::table::all().iter().map(|case| case.journey().name.clone()).collect();
    for (name, verdict) in rows() {
        let Verdict::Works(test) = verdict else { continue };
        if let Some(journey) = test.strip_prefix("peer ") {
            assert!(journeys.iter().any(|known| known == journey), "{name}: no journey is called {journey}");
            continue;
        }
        let (file, function) = test.split_once("::").unwrap_or_else(|| panic!("{name}: {test} is no FILE::FUNCTION"));
        let text =
            fs::read_to_string(repository().join(file)).unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
        assert!(text.contains(&format!("fn {function}()")), "{name}: {file} has no {function}");
    }
}

#[test]
fn the_table_has_all_of_qemus_schema() {
    let scratch = tempfile::tempdir().unwrap();
    if let Err(why) = Root::install(Suite::Sid) {
        return skipped("schema", REQUIRE_QEMU, &format!("{why:#}"));
    }
    let mut qemu = qemu(scratch.path()).unwrap();
    let schema = qemu.execute("query-qmp-schema", Value::Null).unwrap();
    qemu.quit();
    Schema::read(&schema).unwrap().compare().unwrap_or_else(|error| panic!("{error}"));
}

/// What a monitor refuses with, if it does.
fn refusal(monitor: &mut Qemu, command: &str, arguments: Value) -> Result<Option<String>> {
    match monitor.execute(command, arguments) {
        Ok(_) => Ok(None),
        Err(error) => match error.downcast_ref::<QmpError>() {
            Some(QmpError::Refused { description, .. }) => Ok(Some(description.clone())),
            _ => Err(error),
        },
    }
}

#[test]
fn reference_vmm_answers_as_the_table_says() {
    if let Err(why) = kvm() {
        return skipped("answers", REQUIRE_KVM, &why);
    }
    let scratch = tempfile::tempdir().unwrap();
    let mut ours = peer::reference(&program(), "ours", &["-S", "--memory", "16M"], scratch.path()).unwrap();
    let wrong: Vec<String> = answers(&mut ours).unwrap();
    ours.quit();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn answers(ours: &mut Qemu) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let mut judge = |name: &str, verdict: &Verdict, said: Option<String>| {
        let right = match (verdict, &said) {
            (Verdict::Works(_) | Verdict::Stored(_), None) => true,
            (Verdict::Refused { text, .. }, Some(said)) => text == said,
            _ => false,
        };
        if !right {
            wrong.push(format!("{name}: the table says {verdict:?}, and reference-vmm said {said:?}"));
        }
    };
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    for (name, verdict) in CAPABILITIES {
        let needed = match *name {
            "switchover-ack" | "x-colo" => vec!["return-path"],
            "zero-copy-send" => vec!["multifd"],
            "postcopy-preempt" => vec!["postcopy-ram"],
            _ => vec![],
        };
        let set = |state: bool| {
            let all = needed.iter().chain([name]).map(|name| capability(name, state));
            json!({ "capabilities": all.collect::<Value>() })
        };
        let said = match *name {
            // It needs dirty rings; the test that the row names has them.
            "dirty-limit" => None,
            _ => refusal(ours, "migrate-set-capabilities", set(true))?,
        };
        judge(name, verdict, said);
        ours.execute("migrate-set-capabilities", set(false))?;
    }

    let before = ours.execute("query-migrate-parameters", Value::Null)?;
    for (name, verdict) in PARAMETERS {
        let (parameter, value) = match name.split_once('=') {
            Some((parameter, value)) => (parameter, json!(value)),
            None if *name == "block-bitmap-mapping" => (*name, json!([])),
            None => (*name, before[name].clone()),
        };
        let said = refusal(ours, "migrate-set-parameters", json!({ parameter: value }))?;
        let kept = ours.execute("query-migrate-parameters", Value::Null)?;
        ensure!(said.is_some() || kept[parameter] == value, "{name} was set and is {}", kept[parameter]);
        judge(name, verdict, said);
        if let Some(value) = before.get(parameter) {
            ours.execute("migrate-set-parameters", json!({ parameter: value }))?;
        }
    }

    for (name, verdict) in CHANNELS {
        let inet = json!({ "transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1" });
        let addr = match *name {
            "cpr" | "main" | "socket inet" => inet,
            "socket unix" => json!({ "transport": "socket", "type": "unix", "path": "/nonexistent" }),
            "socket fd" => json!({ "transport": "socket", "type": "fd", "str": "none" }),
            "socket vsock" => json!({ "transport": "socket", "type": "vsock", "cid": "2", "port": "1" }),
            "exec" => json!({ "transport": "exec", "args": ["/bin/true"] }),
            "file" => json!({ "transport": "file", "filename": "/nonexistent/x", "offset": 0 }),
            "rdma" => json!({ "transport": "rdma", "host": "127.0.0.1", "port": "1" }),
            other => anyhow::bail!("how is a channel '{other}' written?"),
        };
        let mut list = vec![json!({ "channel-type": "main", "addr": addr })];
        if *name == "cpr" {
            let beside = json!({ "transport": "socket", "type": "unix", "path": "/nonexistent" });
            list.push(json!({ "channel-type": "cpr", "addr": beside }));
        }
        let channels = json!({ "channels": list, "resume": true });
        // There is nothing to resume: a monitor that knows the address says so.
        let said = refusal(ours, "migrate", channels)?.context("a migration was resumed")?;
        let known = said == "Cannot resume if there is no paused migration";
        judge(name, verdict, (!known).then_some(said));
    }

    let commands = ours.execute("query-commands", Value::Null)?;
    for command in commands.as_array().context("no list of commands")? {
        let name = command["name"].as_str().context("a command has no name")?;
        if name.starts_with("x-") {
            continue;
        }
        match COMMANDS.iter().find(|(row, _)| covers(row, name)) {
            Some((row, Verdict::Works(_))) if *row == name => {}
            row => wrong.push(format!("reference-vmm has the command {name}, and the table says {row:?}")),
        }
    }
    for (name, verdict) in COMMANDS {
        let there = commands.as_array().into_iter().flatten().any(|command| command["name"] == **name);
        if there != matches!(verdict, Verdict::Works(_)) {
            wrong.push(format!(
                "{name}: the table says {verdict:?}, and reference-vmm {}",
                if there { "has it" } else { "has it not" }
            ));
        }
    }
    Ok(wrong)
}

/// What it says of a command it has of QEMU's is a part of what QEMU says.
#[test]
fn reference_vmm_describes_its_commands_as_qemu_does() {
    let scratch = tempfile::tempdir().unwrap();
    if let Err(why) = Root::install(Suite::Sid) {
        return skipped("description", REQUIRE_QEMU, &format!("{why:#}"));
    }
    if let Err(why) = kvm() {
        return skipped("description", REQUIRE_KVM, &why);
    }
    let mut qemu = qemu(scratch.path()).unwrap();
    let mut ours = peer::reference(&program(), "ours", &["-S", "--memory", "16M"], scratch.path()).unwrap();
    let schemas = [&mut qemu, &mut ours].map(|monitor| monitor.execute("query-qmp-schema", Value::Null).unwrap());
    let commands = ours.execute("query-commands", Value::Null).unwrap();
    qemu.quit();
    ours.quit();
    let [theirs, schema] = &schemas;
    let described: Vec<&str> = schema
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["meta-type"] == "command")
        .map(|e| e["name"].as_str().unwrap())
        .collect();
    for command in commands.as_array().unwrap() {
        let name = command["name"].as_str().unwrap();
        assert!(described.contains(&name), "{name} is not described");
    }
    assert_eq!(described.len(), commands.as_array().unwrap().len());
    for name in described.into_iter().filter(|name| !name.starts_with("x-")) {
        if let Err(error) = types::is_part(name, schema, theirs) {
            panic!("{name}: {error:#}");
        }
    }
}
