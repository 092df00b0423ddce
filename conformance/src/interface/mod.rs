//! What reference-vmm has of the migration interface of QEMU 11.1: every capability, parameter and command of its QMP
//! schema, with what becomes of it and who shows that. [`page`] is `docs/migration-interface.md`.

mod commands;
mod settings;
pub mod types;
mod verdict;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

pub use self::commands::COMMANDS;
pub use self::settings::{CAPABILITIES, CHANNELS, PARAMETERS};
pub use self::verdict::{Row, Verdict};

/// The names in a schema that the tables have to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema {
    /// Values of `MigrationCapability`.
    pub capabilities: BTreeSet<String>,
    /// Members of what `migrate-set-parameters` takes, and `PARAMETER=VALUE` for those of an enumeration.
    pub parameters: BTreeSet<String>,
    /// Kinds of channels and of their addresses that `migrate` takes.
    pub channels: BTreeSet<String>,
    /// Every command.
    pub commands: BTreeSet<String>,
}

impl Schema {
    /// Finds them in what `query-qmp-schema` returns. Types have numbers for names there; commands lead to them.
    ///
    /// # Errors
    /// The schema has not the shape of QEMU's.
    pub fn read(schema: &Value) -> Result<Schema> {
        let entities = schema.as_array().context("the schema is no list")?;
        let types: BTreeMap<&str, &Value> = entities.iter().filter_map(|e| Some((e["name"].as_str()?, e))).collect();
        let find = |name: &Value| {
            let name = name.as_str().context("a type has no name")?;
            types.get(name).copied().with_context(|| format!("the schema has no '{name}'"))
        };
        // What a command takes, or member `name` of an object, or the items of a list.
        let argument = |command: &str| find(&find(&json!(command))?["arg-type"]);
        let member = |object: &Value, name: &str| {
            let members = object["members"].as_array().context("an object has no members")?;
            let member = members.iter().find(|member| member["name"] == name);
            find(&member.with_context(|| format!("no member '{name}'"))?["type"])
        };
        let items = |list: &Value| find(&list["element-type"]);
        let names = |list: &Value, name: &str| -> Result<BTreeSet<String>> {
            let list = list.as_array().context("no list of names")?;
            let names = list.iter().map(|item| item[name].as_str().map(str::to_owned).context("a name is missing"));
            names.collect()
        };

        let setting = items(member(argument("migrate-set-capabilities")?, "capabilities")?)?;
        let capabilities = names(&member(setting, "capability")?["members"], "name")?;

        let settings = argument("migrate-set-parameters")?;
        let mut parameters = names(&settings["members"], "name")?;
        for name in parameters.clone() {
            let kind = member(settings, &name)?;
            if kind["meta-type"] == "enum" {
                parameters.extend(names(&kind["members"], "name")?.iter().map(|value| format!("{name}={value}")));
            }
        }

        let channel = items(member(argument("migrate")?, "channels")?)?;
        let mut channels = names(&member(channel, "channel-type")?["members"], "name")?;
        let address = member(channel, "addr")?;
        for transport in names(&address["variants"], "case")? {
            match transport.as_str() {
                "socket" => {
                    let variants = address["variants"].as_array().into_iter().flatten();
                    let socket = variants.clone().find(|variant| variant["case"] == "socket").map(|v| &v["type"]);
                    let socket = find(socket.context("no sockets")?)?;
                    channels.extend(names(&socket["variants"], "case")?.iter().map(|kind| format!("socket {kind}")));
                }
                _ => drop(channels.insert(transport)),
            }
        }

        let commands = entities.iter().filter(|entity| entity["meta-type"] == "command");
        let commands = commands.filter_map(|entity| entity["name"].as_str().map(str::to_owned)).collect();
        Ok(Schema { capabilities, parameters, channels, commands })
    }

    /// Refuses a schema that has what the tables have not, or has not what they have.
    ///
    /// # Errors
    /// Every such name.
    pub fn compare(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let kinds = [
            ("capability", &self.capabilities, CAPABILITIES),
            ("parameter", &self.parameters, PARAMETERS),
            ("channel", &self.channels, CHANNELS),
            ("command", &self.commands, COMMANDS),
        ];
        for (kind, names, rows) in kinds {
            for name in names {
                match rows.iter().filter(|(row, _)| covers(row, name)).count() {
                    1 => {}
                    0 => wrong.push(format!("the table does not have the {kind} '{name}'")),
                    many => wrong.push(format!("the table has the {kind} '{name}' {many} times")),
                }
            }
            let idle = rows.iter().filter(|(row, _)| !names.iter().any(|name| covers(row, name)));
            wrong.extend(idle.map(|(row, _)| format!("QEMU does not have the {kind} '{row}'")));
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }
}

/// Whether a row is about `name`.
pub fn covers(row: &str, name: &str) -> bool {
    match row.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => row == name,
    }
}

/// The page of the documentation.
pub fn page() -> String {
    let mut page = String::from(
        "# The migration interface of QEMU 11.1, and what reference-vmm has of it\n\n\
         Made by `conformance/tests/interface.rs`, which fails when the schema of a real QEMU 11.1 (`query-qmp-schema`) has a capability,\n\
         parameter, channel or command that is not here, when reference-vmm answers otherwise, or when a test named here does not exist.\n\
         `QEVM_WRITE_PAGES=1 cargo test -p qevm-conformance --test interface` writes the page.\n\n\
         **works**: does what it does in QEMU; the test that shows it is named, or the journey (`peer NAME`: `qevm-conformance peer --only\n\
         NAME`). **stored**: can be set and read back, without effect. **refused**: with the text. **not applicable**: there is nothing it\n\
         could do in this machine; such a command is answered with `CommandNotFound`.\n",
    );
    let parts = [
        ("Capabilities", CAPABILITIES),
        ("Parameters", PARAMETERS),
        ("Channels of `migrate` and `migrate-incoming`", CHANNELS),
        ("Commands", COMMANDS),
    ];
    for (title, rows) in parts {
        let count = |wanted: fn(&Verdict) -> bool| rows.iter().filter(|(_, verdict)| wanted(verdict)).count();
        let works = count(|verdict| matches!(verdict, Verdict::Works(_)));
        let _ = write!(page, "\n## {title}\n\n{} rows, {works} work.\n\n| name | | |\n|---|---|---|\n", rows.len());
        for (name, verdict) in rows {
            let name = name.replace('*', "\\*");
            let _ = match verdict {
                Verdict::Works(test) => writeln!(page, "| `{name}` | works | `{test}` |"),
                Verdict::Stored(why) => writeln!(page, "| `{name}` | stored | {why} |"),
                Verdict::Refused { why, text } => writeln!(page, "| `{name}` | refused | {why}: `{text}` |"),
                Verdict::NotApplicable(why) => writeln!(page, "| `{name}` | not applicable | {why} |"),
            };
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A schema of one of each, in the shape of QEMU's.
    fn small() -> Value {
        json!([
            { "name": "migrate-set-capabilities", "meta-type": "command", "arg-type": "1" },
            { "name": "1", "meta-type": "object", "members": [{ "name": "capabilities", "type": "[2]" }] },
            { "name": "[2]", "meta-type": "array", "element-type": "2" },
            { "name": "2", "meta-type": "object", "members": [{ "name": "capability", "type": "3" }] },
            { "name": "3", "meta-type": "enum", "members": [{ "name": "x-new" }] },
            { "name": "migrate-set-parameters", "meta-type": "command", "arg-type": "4" },
            { "name": "4", "meta-type": "object", "members": [{ "name": "mode", "type": "5" }] },
            { "name": "5", "meta-type": "enum", "members": [{ "name": "normal" }] },
            { "name": "migrate", "meta-type": "command", "arg-type": "6" },
            { "name": "6", "meta-type": "object", "members": [{ "name": "channels", "type": "[7]" }] },
            { "name": "[7]", "meta-type": "array", "element-type": "7" },
            {
                "name": "7",
                "meta-type": "object",
                "members": [{ "name": "channel-type", "type": "8" }, { "name": "addr", "type": "9" }],
            },
            { "name": "8", "meta-type": "enum", "members": [{ "name": "main" }] },
            { "name": "9", "meta-type": "object", "variants": [{ "case": "socket", "type": "10" }, { "case": "file", "type": "1" }] },
            { "name": "10", "meta-type": "object", "variants": [{ "case": "unix", "type": "1" }] },
        ])
    }

    #[test]
    fn names_are_found_in_a_schema() {
        let schema = Schema::read(&small()).unwrap();
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(schema.capabilities, set(&["x-new"]));
        assert_eq!(schema.parameters, set(&["mode", "mode=normal"]));
        assert_eq!(schema.channels, set(&["main", "file", "socket unix"]));
        assert_eq!(schema.commands, set(&["migrate", "migrate-set-capabilities", "migrate-set-parameters"]));
    }

    #[test]
    fn what_the_table_has_not_is_named_and_so_is_what_the_schema_has_not() {
        let error = Schema::read(&small()).unwrap().compare().unwrap_err().to_string();
        assert!(error.contains("the table does not have the capability 'x-new'"), "{error}");
        assert!(error.contains("QEMU does not have the capability 'multifd'"), "{error}");
        let error = Schema::read(&json!([])).unwrap_err().to_string();
        assert_eq!(error, "the schema has no 'migrate-set-capabilities'");
    }
}
