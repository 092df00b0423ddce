//! Migration parameters by QEMU's names (QMP reference and answers of QEMU 11.1).
//!
//! [`ROWS`] has a row for each parameter: its name, its type and the value's place in [`Parameters`]. A parameter whose
//! feature is not built in can be set and read back, as in a QEMU that does not use it; where doing nothing would
//! mislead (other modes), it is refused.

#[cfg(test)]
mod tests;

use qevm_migration::{Mode, Parameters};
use qevm_multifd::compression::Compression;
use qevm_multifd::zero_page::ZeroPageDetection;
use serde_json::{Map, Value};

/// A parameter that cannot be set so. The texts are those of QEMU 11.1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// The value is outside the parameter's range.
    #[error(transparent)]
    Range(#[from] qevm_migration::BadParameter),
    /// The value is not of the parameter's type.
    #[error("Invalid parameter type for '{name}', expected: {expected}")]
    Type {
        /// The parameter.
        name: &'static str,
        /// Its type.
        expected: &'static str,
    },
    /// The value is no number that fits the parameter's type.
    #[error("Parameter '{name}' expects {expected}")]
    Integer {
        /// The parameter.
        name: &'static str,
        /// Its type.
        expected: &'static str,
    },
    /// The parameter has no such value.
    #[error("Parameter '{name}' does not accept value '{value}'")]
    Choice {
        /// The parameter.
        name: &'static str,
        /// As given.
        value: String,
    },
    /// QEMU has that value, and this monitor does not.
    #[error("Parameter '{name}': '{value}' is not supported here")]
    Unsupported {
        /// The parameter.
        name: &'static str,
        /// As given.
        value: String,
    },
    /// No parameter has that name.
    #[error("Parameter '{0}' is unexpected")]
    Unknown(String),
}

/// Every parameter by its QMP name, as `query-migrate-parameters` returns them.
pub(super) fn list(parameters: &Parameters) -> Map<String, Value> {
    let mut copy = parameters.clone();
    let values = ROWS.iter().map(|row| (row.name.to_owned(), row.value(&mut copy)));
    values.filter(|(_, value)| !value.is_null()).collect()
}

/// These parameters with changes, which are applied as a whole or not at all.
///
/// # Errors
/// [`Refusal`]: the first value that is of a wrong type, otherwise the first out of range.
pub(super) fn with(parameters: &Parameters, changes: &Map<String, Value>) -> Result<Parameters, Refusal> {
    let mut changed = parameters.clone();
    for row in &ROWS {
        if let Some(value) = changes.get(row.name) {
            row.set(&mut changed, value)?;
        }
    }
    if let Some(name) = changes.keys().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        return Err(Refusal::Unknown(name.clone()));
    }
    changed.check()?;
    Ok(changed)
}

/// Of what type a parameter is, as far as that is told by a text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    U64,
    Flag,
    Texts,
    /// A text or one of a few names.
    Text,
    /// It cannot be set by a text.
    Unset,
}

/// The type of a parameter, `None` if there is no such.
pub(super) fn kind(parameters: &Parameters, name: &str) -> Option<Kind> {
    let row = ROWS.iter().find(|row| row.name == name)?;
    Some(match (row.slot)(&mut parameters.clone()) {
        Slot::U8(_) => Kind::U8,
        Slot::U64(_) => Kind::U64,
        Slot::Flag(_) => Kind::Flag,
        Slot::Texts(_) => Kind::Texts,
        Slot::Compression(_) | Slot::ZeroPages(_) | Slot::Mode(_) | Slot::Text(_) => Kind::Text,
        Slot::Unset => Kind::Unset,
    })
}

/// A parameter.
struct Row {
    name: &'static str,
    slot: fn(&mut Parameters) -> Slot<'_>,
}

/// Where a parameter's value is kept, and of what type it is in QMP.
enum Slot<'p> {
    U8(&'p mut u8),
    U64(&'p mut u64),
    Flag(&'p mut bool),
    Texts(&'p mut Vec<String>),
    Compression(&'p mut Compression),
    ZeroPages(&'p mut ZeroPageDetection),
    Mode(&'p mut Mode),
    /// A text, or null, which is the empty one.
    Text(&'p mut String),
    /// Not listed while it is not set, and it cannot be set here.
    Unset,
}

const fn row(name: &'static str, slot: fn(&mut Parameters) -> Slot<'_>) -> Row {
    Row { name, slot }
}

/// Every parameter of QEMU 11.1, in the order of its QMP reference, and the deadlines, which a QEMU does not have.
const ROWS: [Row; 37] = [
    row("announce-initial", |p| Slot::U64(&mut p.announce_initial_ms)),
    row("announce-max", |p| Slot::U64(&mut p.announce_max_ms)),
    row("announce-rounds", |p| Slot::U64(&mut p.announce_rounds)),
    row("announce-step", |p| Slot::U64(&mut p.announce_step_ms)),
    row("throttle-trigger-threshold", |p| Slot::U8(&mut p.throttle_trigger_threshold)),
    row("cpu-throttle-initial", |p| Slot::U8(&mut p.cpu_throttle_initial)),
    row("cpu-throttle-increment", |p| Slot::U8(&mut p.cpu_throttle_increment)),
    row("cpu-throttle-tailslow", |p| Slot::Flag(&mut p.cpu_throttle_tailslow)),
    row("tls-creds", |p| Slot::Text(&mut p.tls_creds)),
    row("tls-hostname", |p| Slot::Text(&mut p.tls_hostname)),
    row("tls-authz", |p| Slot::Text(&mut p.tls_authz)),
    row("max-bandwidth", |p| Slot::U64(&mut p.max_bandwidth)),
    row("avail-switchover-bandwidth", |p| Slot::U64(&mut p.avail_switchover_bandwidth)),
    row("downtime-limit", |p| Slot::U64(&mut p.downtime_limit_ms)),
    row("x-checkpoint-delay", |p| Slot::U64(&mut p.checkpoint_delay_ms)),
    row("multifd-channels", |p| Slot::U8(&mut p.multifd_channels)),
    row("xbzrle-cache-size", |p| Slot::U64(&mut p.xbzrle_cache_size)),
    row("max-postcopy-bandwidth", |p| Slot::U64(&mut p.max_postcopy_bandwidth)),
    row("max-cpu-throttle", |p| Slot::U8(&mut p.max_cpu_throttle)),
    row("multifd-compression", |p| Slot::Compression(&mut p.multifd_compression)),
    row("multifd-zlib-level", |p| Slot::U8(&mut p.multifd_zlib_level)),
    row("multifd-qatzip-level", |p| Slot::U8(&mut p.multifd_qatzip_level)),
    row("multifd-zstd-level", |p| Slot::U8(&mut p.multifd_zstd_level)),
    row("block-bitmap-mapping", |_| Slot::Unset),
    row("x-vcpu-dirty-limit-period", |p| Slot::U64(&mut p.vcpu_dirty_limit_period_ms)),
    row("vcpu-dirty-limit", |p| Slot::U64(&mut p.vcpu_dirty_limit)),
    row("mode", |p| Slot::Mode(&mut p.mode)),
    row("zero-page-detection", |p| Slot::ZeroPages(&mut p.zero_page_detection)),
    row("direct-io", |p| Slot::Flag(&mut p.direct_io)),
    row("cpr-exec-command", |p| Slot::Texts(&mut p.cpr_exec_command)),
    row("x-rdma-chunk-size", |p| Slot::U64(&mut p.rdma_chunk_size)),
    // These are not QEMU's.
    row("x-connect-timeout", |p| Slot::U64(&mut p.timeouts.connect_ms)),
    row("x-handshake-timeout", |p| Slot::U64(&mut p.timeouts.handshake_ms)),
    row("x-idle-timeout", |p| Slot::U64(&mut p.timeouts.idle_ms)),
    row("x-switchover-timeout", |p| Slot::U64(&mut p.timeouts.switchover_ms)),
    row("x-handover-timeout", |p| Slot::U64(&mut p.timeouts.handover_ms)),
    row("x-tcp-user-timeout", |p| Slot::U64(&mut p.timeouts.tcp_user_ms)),
];

const COMPRESSIONS: [(&str, Compression); 3] =
    [("none", Compression::None), ("zlib", Compression::Zlib), ("zstd", Compression::Zstd)];
const ZERO_PAGES: [(&str, ZeroPageDetection); 3] =
    [("none", ZeroPageDetection::None), ("legacy", ZeroPageDetection::Legacy), ("multifd", ZeroPageDetection::Multifd)];
const MODES: [(&str, Mode); 3] =
    [("normal", Mode::Normal), ("cpr-reboot", Mode::CprReboot), ("cpr-transfer", Mode::CprTransfer)];
/// Values of `mode` that QEMU 11.1 has besides.
const OTHER_MODES: [&str; 1] = ["cpr-exec"];

impl Row {
    /// Its value, as QMP tells it. Null where there is none.
    fn value(&self, parameters: &mut Parameters) -> Value {
        match (self.slot)(parameters) {
            Slot::U8(value) => (*value).into(),
            Slot::U64(value) => (*value).into(),
            Slot::Flag(value) => (*value).into(),
            Slot::Texts(value) => value.clone().into(),
            Slot::Compression(value) => name_of(*value, &COMPRESSIONS).into(),
            Slot::ZeroPages(value) => name_of(*value, &ZERO_PAGES).into(),
            Slot::Mode(value) => value.as_str().into(),
            Slot::Text(value) => value.clone().into(),
            Slot::Unset => Value::Null,
        }
    }

    /// Sets it, if the value is of its type.
    fn set(&self, parameters: &mut Parameters, value: &Value) -> Result<(), Refusal> {
        let name = self.name;
        let wrong_type = |expected| Refusal::Type { name, expected };
        match (self.slot)(parameters) {
            Slot::U8(slot) => {
                let number = value.as_u64().and_then(|number| number.try_into().ok());
                *slot = number.ok_or(Refusal::Integer { name, expected: "uint8_t" })?;
            }
            Slot::U64(slot) => {
                // QEMU takes negative numbers for large ones.
                let number = value.as_u64().or_else(|| value.as_i64().map(|number| number as u64));
                *slot = number.ok_or(Refusal::Integer { name, expected: "uint64" })?;
            }
            Slot::Flag(slot) => *slot = value.as_bool().ok_or(wrong_type("boolean"))?,
            Slot::Texts(slot) => {
                let list = value.as_array().ok_or(wrong_type("array"))?;
                let texts = list.iter().map(|text| text.as_str().map(str::to_owned));
                *slot = texts.collect::<Option<_>>().ok_or(wrong_type("array of strings"))?;
            }
            Slot::Compression(slot) => *slot = choose(name, value, &COMPRESSIONS, &[])?,
            Slot::ZeroPages(slot) => *slot = choose(name, value, &ZERO_PAGES, &[])?,
            Slot::Mode(slot) => *slot = choose(name, value, &MODES, &OTHER_MODES)?,
            Slot::Text(slot) => match value {
                Value::Null => slot.clear(),
                Value::String(text) => slot.clone_from(text),
                _ => return Err(wrong_type("StrOrNull")),
            },
            Slot::Unset => match value {
                Value::Array(_) => return Err(Refusal::Unsupported { name, value: value.to_string() }),
                _ => return Err(wrong_type("array")),
            },
        }
        Ok(())
    }
}

fn name_of<T: Copy + PartialEq>(value: T, choices: &[(&'static str, T)]) -> &'static str {
    choices.iter().find(|(_, choice)| *choice == value).map_or("", |(name, _)| name)
}

fn choose<T: Copy>(
    name: &'static str,
    value: &Value,
    choices: &[(&'static str, T)],
    unsupported: &[&str],
) -> Result<T, Refusal> {
    let text = value.as_str().ok_or(Refusal::Type { name, expected: "string" })?;
    if unsupported.contains(&text) {
        return Err(Refusal::Unsupported { name, value: text.to_owned() });
    }
    let choice = choices.iter().find(|(choice, _)| *choice == text);
    choice.map(|(_, choice)| *choice).ok_or_else(|| Refusal::Choice { name, value: text.to_owned() })
}
