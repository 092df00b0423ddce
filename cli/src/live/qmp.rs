//! What a running QEMU says of itself by QMP.

use super::facts::{Cpu, Device, Facts, Properties};
use crate::failure::Stop;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A QEMU that is in good health answers at once, but under load.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest answers, lists of properties, have some 50 KB.
const MAX_LINE: u64 = 8 << 20;
/// Events that come before an answer.
const MAX_EVENTS: usize = 10_000;

/// A QMP connection, which others cannot use as long as it is open.
struct Qmp {
    name: String,
    reader: BufReader<UnixStream>,
    release: String,
}

impl Qmp {
    fn connect(socket: &Path) -> Result<Self, Stop> {
        let name = format!("qmp:{}", socket.display());
        let cannot = |error: io::Error| Stop::Usage(format!("{name}: cannot connect: {error}"));
        let stream = UnixStream::connect(socket).map_err(cannot)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(cannot)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(cannot)?;
        let mut qmp = Qmp { name: name.clone(), reader: BufReader::new(stream), release: String::new() };
        let greeting = qmp.line()?;
        let version = &greeting["QMP"]["version"]["qemu"];
        let numbers: Vec<_> = ["major", "minor", "micro"].iter().filter_map(|part| version[part].as_u64()).collect();
        let [major, minor, micro] = numbers[..] else {
            return Err(Stop::Usage(format!("{name}: is no QMP socket of a QEMU: it does not greet as one")));
        };
        qmp.release = format!("{major}.{minor}.{micro}");
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, Stop> {
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
        let told = |what: String| Stop::Usage(format!("{}: {what}", self.name));
        match read {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                let seconds = PATIENCE.as_secs();
                Err(told(format!(
                    "says nothing for {seconds} s: another client may have the socket, which serves one at a time"
                )))
            }
            Err(error) => Err(told(format!("cannot be read: {error}"))),
            Ok(0) => Err(told("closed the connection".to_owned())),
            Ok(_) => serde_json::from_slice(&line).map_err(|error| told(format!("does not speak QMP: {error}"))),
        }
    }

    /// The answer to a command; the inner error is QEMU's own.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Result<Value, String>, Stop> {
        let text = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let sent = self.reader.get_mut().write_all(text.as_bytes());
        sent.map_err(|error| Stop::Usage(format!("{}: cannot be written: {error}", self.name)))?;
        for _ in 0..MAX_EVENTS {
            let mut answer = self.line()?;
            if answer.get("event").is_none() {
                return Ok(match answer.get("error") {
                    Some(error) => Err(error["desc"].as_str().unwrap_or_default().to_owned()),
                    None => Ok(answer["return"].take()),
                });
            }
        }
        Err(Stop::Usage(format!("{}: nothing but events comes", self.name)))
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value, Stop> {
        self.ask(command, arguments)?.map_err(|error| Stop::Usage(format!("{}: {command}: {error}", self.name)))
    }

    /// As [`call`](Self::call), for what not every QEMU has or tells.
    fn maybe(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, Stop> {
        self.ask(command, arguments).map(Result::ok)
    }

    /// Name and type of each property of an object.
    fn list(&mut self, path: &str) -> Result<Vec<(String, String)>, Stop> {
        let found = self.maybe("qom-list", json!({"path": path}))?.unwrap_or_default();
        let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        Ok(found.as_array().into_iter().flatten().map(|entry| (text(entry, "name"), text(entry, "type"))).collect())
    }

    fn get(&mut self, path: &str, property: &str) -> Result<Option<Value>, Stop> {
        self.maybe("qom-get", json!({"path": path, "property": property}))
    }

    /// The numbers, strings and booleans that an object has, but for `type`.
    fn properties(&mut self, path: &str) -> Result<Properties, Stop> {
        let mut properties = Properties::new();
        for (name, kind) in self.list(path)? {
            if !is_plain(&kind) || name == "type" || name.starts_with("legacy-") {
                continue;
            }
            if let Some(value) = self.get(path, &name)?.filter(|value| !value.is_object() && !value.is_array()) {
                properties.insert(name, value);
            }
        }
        Ok(properties)
    }
}

/// Types of properties that are configuration: no objects, links or structures.
fn is_plain(kind: &str) -> bool {
    const PLAIN: [&str; 8] = ["bool", "str", "string", "size", "int", "OnOffAuto", "busnr", "uint64_t"];
    PLAIN.contains(&kind)
        || ["uint", "int"].iter().any(|start| kind.strip_prefix(start).is_some_and(|bits| bits.parse::<u8>().is_ok()))
}

/// What the QEMU behind `socket` says of itself.
///
/// # Errors
/// [`Stop::Usage`] if there is none, or if it does not answer.
pub(super) fn facts(socket: &Path) -> Result<Facts, Stop> {
    let mut qmp = Qmp::connect(socket)?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let machine = qmp.get("/machine", "type")?.as_ref().and_then(text);
    let kvm = qmp.maybe("query-kvm", json!({}))?;
    let mut facts = Facts {
        release: Some(qmp.release.clone()),
        arch: text(&qmp.call("query-target", json!({}))?["arch"]),
        accelerator: kvm.map(|kvm| if kvm["enabled"] == true { "kvm" } else { "another than kvm" }.to_owned()),
        machine: machine.map(|name| name.strip_suffix("-machine").unwrap_or(&name).to_owned()),
        uuid: text(&qmp.call("query-uuid", json!({}))?["UUID"]),
        memory: qmp.maybe("query-memory-size-summary", json!({}))?.and_then(|memory| memory["base-memory"].as_u64()),
        machine_properties: qmp.properties("/machine")?,
        ..Facts::default()
    };
    if let Some(slots) = qmp.get("/machine", "memory")?.and_then(|memory| memory["slots"].as_u64()) {
        facts.machine_properties.insert("memory slots".to_owned(), slots.into());
    }
    facts.cpu = Some(processors(&mut qmp)?);
    facts.devices = Some(devices(&mut qmp)?);
    let blocks = qmp.maybe("human-monitor-command", json!({"command-line": "info ramblock"}))?;
    facts.ram = blocks.as_ref().and_then(Value::as_str).map(ram_blocks);
    let capabilities = qmp.call("query-migrate-capabilities", json!({}))?;
    let capability = |entry: &Value| Some((text(&entry["capability"])?, entry["state"].as_bool()?));
    facts.capabilities = Some(capabilities.as_array().into_iter().flatten().filter_map(capability).collect());
    let parameters = qmp.call("query-migrate-parameters", json!({}))?;
    facts.parameters = parameters.as_object().map(|all| all.clone().into_iter().collect());
    Ok(facts)
}

fn processors(qmp: &mut Qmp) -> Result<Cpu, Stop> {
    let all = qmp.call("query-cpus-fast", json!({}))?;
    let first = all[0]["qom-path"].as_str().unwrap_or_default().to_owned();
    let kind = qmp.get(&first, "type")?;
    let possible = qmp.maybe("query-hotpluggable-cpus", json!({}))?;
    let max = possible.and_then(|possible| {
        let counts = possible.as_array()?.iter().map(|entry| entry["vcpus-count"].as_u64().unwrap_or(1));
        Some(counts.sum())
    });
    Ok(Cpu {
        model: kind.as_ref().and_then(Value::as_str).unwrap_or_default().to_owned(),
        count: all.as_array().map_or(0, |all| all.len() as u64),
        max,
        properties: qmp.properties(&first)?,
    })
}

/// Devices, by the place that a stream names them by: bus and address on PCI, otherwise type and number among its like.
fn devices(qmp: &mut Qmp) -> Result<BTreeMap<String, Device>, Stop> {
    let mut devices = BTreeMap::new();
    let mut alike: BTreeMap<String, u64> = BTreeMap::new();
    for folder in ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"] {
        let mut children = qmp.list(folder)?;
        children.sort_by_key(|(name, _)| (name.len(), name.clone()));
        for (name, kind) in children {
            let Some(kind) = kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>')) else { continue };
            let built_in = folder == "/machine/unattached";
            if built_in && !name.starts_with("device[") || kind.ends_with("-cpu") {
                continue;
            }
            let path = format!("{folder}/{name}");
            let properties = qmp.properties(&path)?;
            let bus = qmp.get(&path, "parent_bus")?.and_then(|bus| bus.as_str().map(str::to_owned));
            let address = properties.get("addr").and_then(Value::as_u64).filter(|address| *address < 256);
            let (place, pci) = match (bus.filter(|bus| !bus.is_empty()), address) {
                (Some(bus), Some(address)) => {
                    let bus = bus.rsplit('/').next().unwrap_or(&bus);
                    (format!("{bus} {:02x}.{:x}", address >> 3, address & 7), true)
                }
                _ => {
                    let number = alike.entry(kind.to_owned()).or_default();
                    *number += 1;
                    (format!("{kind} {number}"), false)
                }
            };
            devices.insert(place, Device { kind: kind.to_owned(), pci, built_in, properties });
        }
    }
    Ok(devices)
}

/// Name and used length of each block, from the table of `info ramblock`.
fn ram_blocks(table: &str) -> BTreeMap<String, u64> {
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // A name, the page size with its unit, and then numbers: offset, used and total length.
        let numbers = words.iter().position(|word| word.starts_with("0x"))?;
        let name = words.get(..numbers.checked_sub(2)?)?.join(" ");
        let used = u64::from_str_radix(words.get(numbers + 1)?.strip_prefix("0x")?, 16).ok()?;
        (!name.is_empty()).then_some((name, used))
    };
    table.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines that QEMU 11.1.3 and 7.2.22 print.
    #[test]
    fn used_lengths_are_read_from_the_table_of_ram_blocks() {
        let table = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007ff2afe00000  rw\r
    /rom@etc/acpi/tables    4 KiB  0x0000000005140000 0x0000000000020000 0x0000000000200000 0x00007ff2b9200000  ro\r
              Block Name    PSize              Offset               Used              Total\r
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000\r
";
        let expected = [("pc.ram", 0x400_0000), ("/rom@etc/acpi/tables", 0x2_0000), ("pc.bios", 0x4_0000)];
        assert_eq!(ram_blocks(table), expected.map(|(name, used)| (name.to_owned(), used)).into());
    }
}
