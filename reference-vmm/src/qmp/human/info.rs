//! `info`.

use super::words::{Said, Words, error};
use crate::qmp::protocol::Failure;
use crate::qmp::{parameters, queries};
use crate::vmm::{RunState, Vmm};
use serde_json::Value;
use std::fmt::Write as _;
use std::sync::Arc;

/// Prints what `info` is asked about; `query` runs a command of QMP's without arguments.
pub(super) fn print(vmm: &Arc<Vmm>, mut words: Words, query: impl Fn(&str) -> Result<Value, Failure>) -> Said {
    let Some(what) = words.next() else { return Err("unknown command: 'info'\n".into()) };
    words.taken_by(&what, &format!("info {what}"));
    let all = match what.as_str() {
        "migrate" => words.options("a")?.contains('a'),
        _ => false,
    };
    let query = |name: &str| query(name).map_err(error);
    let text: Box<dyn Fn() -> Said + '_> = match what.as_str() {
        "migrate" => Box::new(move || {
            let told = query("query-migrate")?;
            Ok(migration(&told) + &if all { details(&told) } else { String::new() })
        }),
        "migrate_capabilities" => Box::new(|| Ok(capabilities(vmm))),
        "migrate_parameters" => Box::new(|| Ok(settings(vmm))),
        "status" => Box::new(|| Ok(status(vmm))),
        "uuid" => Box::new(|| Ok(format!("{}\n", vmm.machine().uuid().unwrap_or_default()))),
        "name" => Box::new(|| Ok(String::new())),
        "kvm" => Box::new(|| Ok("kvm support: enabled\n".into())),
        "version" => Box::new(|| Ok(version(&queries::version(vmm)))),
        "memory_size_summary" => {
            Box::new(|| Ok(format!("base memory: {}\nplugged memory: 0\n", vmm.machine().memory().ram().used_length())))
        }
        _ => return Err(format!("unknown command: 'info {what}'\n")),
    };
    words.end()?;
    text()
}

/// What `info migrate -a` prints besides.
fn details(told: &Value) -> String {
    let mut text = String::from(GLOBALS);
    if let Some(cache) = told.get("xbzrle-cache") {
        let rate = |name: &str| cache[name].as_f64().unwrap_or_default();
        let _ = write!(
            text,
            "XBZRLE: size={}, transferred={}, pages={}, miss={}\n  miss_rate={:.2}, encode_rate={:.2}, overflow={}\n",
            cache["cache-size"],
            cache["bytes"],
            cache["pages"],
            cache["cache-miss"],
            rate("cache-miss-rate"),
            rate("encoding-rate"),
            cache["overflow"],
        );
    }
    text
}

/// They cannot be changed here.
const GLOBALS: &str = "Globals:\n  store-global-state: on\n  only-migratable: off\n  send-configuration: on\n  send-section-footer: on\n  send-switchover-start: on\n  clear-bitmap-shift: 18\n";

fn status(vmm: &Vmm) -> String {
    match vmm.run_state() {
        RunState::Running => "VM status: running\n".into(),
        RunState::Paused => "VM status: paused\n".into(),
        other => format!("VM status: paused ({})\n", other.as_str()),
    }
}

fn version(version: &Value) -> String {
    let qemu = &version["qemu"];
    let package = version["package"].as_str().unwrap_or_default();
    format!("{}.{}.{}{package}\n", qemu["major"], qemu["minor"], qemu["micro"])
}

fn capabilities(vmm: &Vmm) -> String {
    let on = |state: bool| if state { "on" } else { "off" };
    let list = vmm.outgoing().capabilities().list();
    list.into_iter().map(|(name, state)| format!("{name}: {}\n", on(state))).collect()
}

/// The parameters in QEMU's order, with the units of their values. Levels of compression are not among them.
const SETTINGS: [(&str, &str); 27] = [
    ("announce-initial", " ms"),
    ("announce-max", " ms"),
    ("announce-rounds", ""),
    ("announce-step", " ms"),
    ("throttle-trigger-threshold", ""),
    ("cpu-throttle-initial", ""),
    ("cpu-throttle-increment", ""),
    ("cpu-throttle-tailslow", ""),
    ("max-cpu-throttle", ""),
    ("tls-creds", ""),
    ("tls-hostname", ""),
    ("tls-authz", ""),
    ("max-bandwidth", " bytes/second"),
    ("avail-switchover-bandwidth", " bytes/second"),
    ("max-postcopy-bandwidth", " bytes/second"),
    ("downtime-limit", " ms"),
    ("x-checkpoint-delay", " ms"),
    ("multifd-channels", ""),
    ("multifd-compression", ""),
    ("zero-page-detection", ""),
    ("xbzrle-cache-size", " bytes"),
    ("x-vcpu-dirty-limit-period", " ms"),
    ("vcpu-dirty-limit", " MB/s"),
    ("mode", ""),
    ("direct-io", ""),
    ("x-rdma-chunk-size", " bytes"),
    ("cpr-exec-command", ""),
];

fn settings(vmm: &Vmm) -> String {
    let values = parameters::list(&vmm.outgoing().parameters());
    let mut text = String::new();
    for (name, unit) in SETTINGS {
        let value = match (&values[name], name) {
            (Value::String(value), "tls-creds" | "tls-hostname" | "tls-authz") => format!(" '{value}'"),
            (Value::String(value), _) => format!(" {value}"),
            (Value::Bool(value), _) => format!(" {}", if *value { "on" } else { "off" }),
            (Value::Array(words), _) => {
                words.iter().map(|word| format!(" {}", word.as_str().unwrap_or_default())).collect()
            }
            (value, _) => format!(" {value}"),
        };
        let _ = writeln!(text, "{name}:{value}{unit}");
    }
    text
}

/// What is printed of what `query-migrate` returned.
fn migration(told: &Value) -> String {
    let mut text = String::new();
    let Some(status) = told["status"].as_str() else { return text };
    let _ = match told["error-desc"].as_str() {
        Some(error) => writeln!(text, "Status: \t\t{status} ({error})"),
        None => writeln!(text, "Status: \t\t{status}"),
    };
    if let Some(total) = told.get("total-time") {
        let _ = write!(text, "Time (ms): \t\ttotal={total}");
        for (name, member) in [("setup", "setup-time"), ("exp_down", "expected-downtime"), ("down", "downtime")] {
            let _ = told.get(member).map(|time| write!(text, ", {name}={time}"));
        }
        text.push('\n');
    }
    if let Some(remaining) = told["remaining"].as_u64() {
        let _ = writeln!(text, "Remaining: \t\t{}", size(remaining));
    }
    if let Some(addresses) = told["socket-address"].as_array() {
        text.push_str("Sockets: [\n");
        for address in addresses {
            let part = |name: &str| address[name].as_str().unwrap_or_default();
            let _ = match part("type") {
                "inet" => writeln!(text, "\ttcp:{}:{}", part("host"), part("port")),
                kind => writeln!(text, "\t{kind}:{}", part("path")),
            };
        }
        text.push_str("]\n");
    }
    if told["ram"].get("total").is_some() {
        memory(&told["ram"], &mut text);
    }
    if let Some(bytes) = told["vfio"]["transferred"].as_u64() {
        let _ = writeln!(text, "vfio device transferred: {} kbytes", bytes >> 10);
    }
    text
}

fn memory(ram: &Value, text: &mut String) {
    let bytes = |name: &str| size(ram[name].as_u64().unwrap_or_default());
    let mbps = ram["mbps"].as_f64().unwrap_or_default();
    let _ = write!(
        text,
        "RAM info:\n  Throughput (Mbps): \t{mbps:.2}\n  Sizes: \t\tpagesize={}, total={}\n  \
         Transfers: \t\ttransferred={}, remain={}\n    Channels: \t\tprecopy={}, multifd={}, postcopy={}\n    \
         Page Types: \tnormal={}, zero={}\n  Page Rates (pps): \ttransfer={}\n  Others: \t\tdirty_syncs={}",
        bytes("page-size"),
        bytes("total"),
        bytes("transferred"),
        bytes("remaining"),
        bytes("precopy-bytes"),
        bytes("multifd-bytes"),
        bytes("postcopy-bytes"),
        ram["normal"],
        ram["duplicate"],
        ram["pages-per-second"],
        ram["dirty-sync-count"],
    );
    if let Some(bytes) = ram["downtime-bytes"].as_u64().filter(|bytes| *bytes > 0) {
        let _ = write!(text, ", downtime_bytes={bytes}");
    }
    text.push('\n');
}

/// A size with three digits and the unit in which they are fewer than a thousand, as QEMU prints it.
fn size(bytes: u64) -> String {
    let (mut value, mut units) = (bytes as f64, ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].into_iter());
    let mut unit = units.next().unwrap_or_default();
    while value >= 1000.0 {
        value /= 1024.0;
        unit = units.next().unwrap_or_default();
    }
    // Three digits that count.
    let places = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    let mut digits = format!("{value:.places$}");
    if digits.contains('.') {
        digits.truncate(digits.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{digits} {unit}B")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// As printed by QEMU 11.1.3, for what its `query-migrate` returned.
    #[test]
    fn migrations_are_printed_as_by_a_qemu() {
        let ram = json!({
            "total": 134361088, "postcopy-requests": 0, "dirty-sync-count": 2, "multifd-bytes": 0, "pages-per-second": 309462,
            "downtime-bytes": 12332, "page-size": 4096, "remaining": 0, "postcopy-bytes": 0, "mbps": 30.792866666666665,
            "transferred": 461893, "dirty-sync-missed-zero-copy": 0, "precopy-bytes": 430452, "duplicate": 32770,
            "dirty-pages-rate": 0, "normal-bytes": 147456, "normal": 36
        });
        let told = json!({ "status": "completed", "setup-time": 51, "downtime": 0, "total-time": 171, "ram": ram });
        assert_eq!(
            migration(&told),
            "Status: \t\tcompleted\nTime (ms): \t\ttotal=171, setup=51, down=0\nRAM info:\n  Throughput (Mbps): \t30.79\n  \
             Sizes: \t\tpagesize=4 KiB, total=128 MiB\n  Transfers: \t\ttransferred=451 KiB, remain=0 B\n    \
             Channels: \t\tprecopy=420 KiB, multifd=0 B, postcopy=0 B\n    Page Types: \tnormal=36, zero=32770\n  \
             Page Rates (pps): \ttransfer=309462\n  Others: \t\tdirty_syncs=2, downtime_bytes=12332\n"
        );
        let cache = json!({
            "cache-size": 67108864, "bytes": 0, "pages": 0, "cache-miss": 1, "cache-miss-rate": 0, "encoding-rate": 0,
            "overflow": 0
        });
        assert_eq!(
            details(&json!({ "xbzrle-cache": cache })).strip_prefix(GLOBALS),
            Some(
                "XBZRLE: size=67108864, transferred=0, pages=0, miss=1\n  miss_rate=0.00, encode_rate=0.00, overflow=0\n"
            )
        );
        assert_eq!(details(&told), GLOBALS);
        let listening = json!({ "status": "setup", "socket-address": [{ "path": "/a", "type": "unix" }] });
        assert_eq!(migration(&listening), "Status: \t\tsetup\nSockets: [\n\tunix:/a\n]\n");
        assert_eq!(migration(&json!({})), "");
        assert_eq!((size(15_065_088), size(102_318_080)), ("14.4 MiB".into(), "97.6 MiB".into()));
    }
}
