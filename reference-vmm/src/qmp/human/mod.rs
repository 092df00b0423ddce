//! The commands of QEMU's human monitor that concern migrations (`human-monitor-command`), with the texts of QEMU 11.1.

mod info;
mod setting;
mod words;

use self::words::{Said, Words, error, invalid};
use super::arguments::{Arguments, finish};
use super::protocol::Failure;
use super::statistics::STATUSES;
use crate::vmm::Vmm;
use qevm_migration::Announcement;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Runs a command of QMP's, by name and with these arguments.
pub(super) type Execute = fn(&Arc<Vmm>, &str, Map<String, Value>) -> Result<Value, Failure>;

/// `human-monitor-command`. It does what it does by commands of QMP's.
pub(super) fn command(vmm: &Arc<Vmm>, arguments: &mut Arguments, by: Execute) -> Result<Value, Failure> {
    let line = arguments.text("command-line")?;
    let cpu = arguments.optional_integer("cpu-index")?;
    finish(arguments)?;
    let cpus = vmm.machine().cpus();
    if cpu.is_some_and(|cpu| usize::try_from(cpu).map_or(true, |cpu| cpu >= cpus)) {
        return Err(Failure::generic("Parameter 'cpu-index' expects a CPU number"));
    }
    Ok(run(vmm, &line, by).into())
}

/// What a command prints: its lines end as those of QEMU's monitor do.
fn run(vmm: &Arc<Vmm>, line: &str, by: Execute) -> String {
    let said = match Words::of(line) {
        Ok(words) => execute(vmm, words, by),
        Err(unfinished) => Err(unfinished),
    };
    said.unwrap_or_else(|refused| refused).replace('\n', "\r\n")
}

fn execute(vmm: &Arc<Vmm>, mut words: Words, by: Execute) -> Said {
    let Some(name) = words.next() else { return Ok(String::new()) };
    words.taken_by(&name, &name);
    let qmp = |name: &str, arguments: Value| {
        let arguments = if let Value::Object(arguments) = arguments { arguments } else { Map::new() };
        by(vmm, name, arguments).map(|_| String::new()).map_err(error)
    };
    // A command of QMP's without arguments.
    let plain = |words: Words, name: &str| words.end().and_then(|()| qmp(name, Value::Null));
    match name.as_str() {
        "info" => info::print(vmm, words, |name| by(vmm, name, Map::new())),
        "cont" | "c" => plain(words.named("cont|c"), "cont"),
        "stop" | "s" => plain(words.named("stop|s"), "stop"),
        "system_reset" => plain(words, "system_reset"),
        "system_powerdown" => plain(words, "system_powerdown"),
        "announce_self" => {
            let named = words.next().is_some_and(|interfaces| !interfaces.is_empty());
            let id = words.next().unwrap_or_default();
            words.end()?;
            if !named {
                vmm.announce(Announcement::of(&vmm.outgoing().parameters()), &id);
            }
            Ok(String::new())
        }
        "migrate_cancel" => plain(words, "migrate_cancel"),
        "migrate_pause" => plain(words, "migrate-pause"),
        "migrate_start_postcopy" => plain(words, "migrate-start-postcopy"),
        "migrate" => {
            let options = words.options("dr")?;
            let uri = words.need()?;
            words.end()?;
            // It goes on in the background in any case, as with a QEMU that is asked by QMP.
            qmp("migrate", json!({ "uri": uri, "resume": options.contains('r') }))
        }
        "migrate_incoming" => {
            let uri = words.need()?;
            words.end()?;
            qmp("migrate-incoming", json!({ "uri": uri }))
        }
        "migrate_recover" => {
            let uri = words.need()?;
            words.end()?;
            qmp("migrate-recover", json!({ "uri": uri }))
        }
        "migrate_continue" => {
            let state = words.need()?;
            words.end()?;
            if !STATUSES.contains(&state.as_str()) {
                return Err(invalid(&state));
            }
            qmp("migrate-continue", json!({ "state": state }))
        }
        "migrate_set_capability" => {
            let capability = words.need()?;
            let state = words.switch()?;
            words.end()?;
            if !qevm_migration::KNOWN_CAPABILITIES.iter().any(|(known, _)| *known == capability) {
                return Err(invalid(&capability));
            }
            qmp("migrate-set-capabilities", json!({ "capabilities": [{ "capability": capability, "state": state }] }))
        }
        "migrate_set_parameter" => {
            let (parameter, value) = (words.need()?, words.rest()?);
            let value = setting::read(vmm, &parameter, &value)?;
            qmp("migrate-set-parameters", json!({ parameter: value }))
        }
        _ => Err(format!("unknown command: '{name}'\n")),
    }
}
