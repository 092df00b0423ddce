//! Values of `migrate_set_parameter`. The texts are those of QEMU 11.1.

use super::words::{error, invalid};
use crate::qmp::parameters::{self, Kind};
use crate::qmp::protocol::Failure;
use crate::vmm::Vmm;
use qevm_migration::parse_size;
use serde_json::{Value, json};

/// The value of a parameter as QMP takes it.
pub(super) fn read(vmm: &Vmm, parameter: &str, text: &str) -> Result<Value, String> {
    let kind = parameters::kind(&vmm.outgoing().parameters(), parameter).ok_or_else(|| invalid(parameter))?;
    let expects = |what: &str| Err(error(Failure::generic(format!("Parameter '{parameter}' expects {what}"))));
    match (kind, parameter) {
        // Megabytes, where nothing else is said.
        (Kind::U64, "max-bandwidth" | "avail-switchover-bandwidth") => match parse_size(text, 1 << 20) {
            Ok(bytes) => Ok(bytes.into()),
            Err(_) => Err(error(Failure::generic(format!("Invalid size {text}")))),
        },
        (Kind::U8, _) | (Kind::U64, "x-checkpoint-delay") => match (number(text), kind) {
            (Some(number), Kind::U8) if number > u64::from(u8::MAX) => expects("uint8_t"),
            (Some(number), _) => Ok(number.into()),
            (None, _) => expects("uint64"),
        },
        (Kind::U64, _) => match parse_size(text, 1) {
            Ok(number) => Ok(number.into()),
            Err(_) => expects(
                "a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
            ),
        },
        (Kind::Flag, _) => match text {
            "on" | "yes" | "true" | "y" => Ok(true.into()),
            "off" | "no" | "false" | "n" => Ok(false.into()),
            _ => expects("'on' or 'off'"),
        },
        (Kind::Texts, _) => Ok(json!(text.split_whitespace().collect::<Vec<_>>())),
        (Kind::Text, _) => Ok(text.into()),
        (Kind::Unset, _) => {
            Err(error(Failure::generic(format!("The {parameter} parameter can only be set through QMP"))))
        }
    }
}

/// A number, decimal or with `0x` hexadecimal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
