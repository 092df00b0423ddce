//! The commands of QEMU's human monitor that concern migrations (`human-monitor-command`), with the texts of QEMU 11.1.

mod info;
mod setting;

use super::{arguments::Arguments, commands, protocol::Failure};
use crate::vmm::Vmm;
use qevm_migration::Announcement;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// `human-monitor-command`.
pub(super) fn command(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let line = arguments.text("command-line")?;
    let cpu = arguments.optional_integer("cpu-index")?;
    commands::only(arguments)?;
    let cpus = vmm.machine().cpus();
    if cpu.is_some_and(|cpu| usize::try_from(cpu).map_or(true, |cpu| cpu >= cpus)) {
        return Err(Failure::generic("Parameter 'cpu-index' expects a CPU number"));
    }
    Ok(run(vmm, &line).into())
}

/// What a command prints: its lines end as those of QEMU's monitor do.
fn run(vmm: &Arc<Vmm>, line: &str) -> String {
    let said = match Words::of(line) {
        Ok(words) => execute(vmm, words),
        Err(unfinished) => Err(unfinished),
    };
    said.unwrap_or_else(|refused| refused).replace('\n', "\r\n")
}

/// What the human monitor does with a line: prints something, or says why not.
type Said = Result<String, String>;

fn execute(vmm: &Arc<Vmm>, mut words: Words) -> Said {
    let Some(name) = words.next() else { return Ok(String::new()) };
    words.name.clone_from(&name);
    words.help.clone_from(&name);
    let qmp = |name: &str, arguments: Value| {
        let arguments = if let Value::Object(arguments) = arguments { arguments } else { Map::new() };
        commands::execute(vmm, name, arguments).map(|_| String::new()).map_err(error)
    };
    // A command of QMP's without arguments.
    let plain = |words: Words, name: &str| words.end().and_then(|()| qmp(name, Value::Null));
    match name.as_str() {
        "info" => info::print(vmm, words),
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
            if !commands::STATUSES.contains(&state.as_str()) {
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

fn error(failure: Failure) -> String {
    format!("Error: {}\n", failure.desc)
}

fn invalid(value: &str) -> String {
    format!("Error: invalid parameter value: {value}\n")
}

/// The words of a line.
struct Words {
    words: std::vec::IntoIter<String>,
    line: String,
    /// Where each word begins in the line.
    starts: Vec<usize>,
    /// Of the command that takes them, as errors tell it.
    name: String,
    /// As `help` is asked about it.
    help: String,
}

impl Words {
    /// Words stand apart by blanks; one in quotes may have blanks.
    fn of(line: &str) -> Result<Words, String> {
        let (mut words, mut starts) = (Vec::new(), Vec::new());
        let mut chars = line.char_indices().peekable();
        while let Some((start, first)) = chars.next() {
            if first.is_whitespace() {
                continue;
            }
            starts.push(start);
            let mut word = String::new();
            if first == '"' {
                loop {
                    match chars.next() {
                        None => return Err("unterminated string\n".into()),
                        Some((_, '"')) => break,
                        Some((_, '\\')) => word.extend(chars.next().map(|(_, escaped)| escaped)),
                        Some((_, other)) => word.push(other),
                    }
                }
            } else {
                word.push(first);
                while let Some((_, next)) = chars.next_if(|(_, next)| !next.is_whitespace()) {
                    word.push(next);
                }
            }
            words.push(word);
        }
        Ok(Words { words: words.into_iter(), line: line.into(), starts, name: String::new(), help: String::new() })
    }

    fn named(mut self, name: &str) -> Words {
        name.clone_into(&mut self.name);
        self
    }

    fn next(&mut self) -> Option<String> {
        self.words.next()
    }

    /// Something wrong with what the command was given.
    fn wrong(&self, what: &str) -> String {
        format!("{}{what}\nTry \"help {}\" for more information\n", self.name, self.help)
    }

    fn need(&mut self) -> Result<String, String> {
        self.next().ok_or_else(|| self.wrong(": string expected"))
    }

    /// All that is left of the line, as it is: quotes have no meaning there.
    fn rest(&mut self) -> Result<String, String> {
        let next = self.starts.len() - self.words.len();
        let start = self.starts.get(next).ok_or_else(|| self.wrong(": string expected"))?;
        Ok(self.line[*start..].to_owned())
    }

    fn switch(&mut self) -> Result<bool, String> {
        match self.next().as_deref() {
            Some("on") => Ok(true),
            Some("off") => Ok(false),
            _ => Err(format!("Expected 'on' or 'off'\nTry \"help {}\" for more information\n", self.help)),
        }
    }

    /// The options in front of the words, of those that are known.
    fn options(&mut self, known: &str) -> Result<String, String> {
        let mut found = String::new();
        while let Some(option) = self.words.as_slice().first().and_then(|word| word.strip_prefix('-')) {
            if let Some(unknown) = option.chars().find(|option| !known.contains(*option)) {
                return Err(self.wrong(&format!(": unsupported option -{unknown}")));
            }
            found.push_str(option);
            self.words.next();
        }
        Ok(found)
    }

    fn end(&self) -> Result<(), String> {
        match self.words.as_slice() {
            [] => Ok(()),
            _ => Err(self.wrong(": extraneous characters at the end of line")),
        }
    }
}
