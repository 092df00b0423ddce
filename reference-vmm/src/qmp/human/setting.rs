//! Values of `migrate_set_parameter`. The texts are those of QEMU 11.1.

use super::words::{error, invalid};
use crate::qmp::parameters::{self, Kind};
use crate::qmp::protocol::Failure;
use crate::vmm::Vmm;
use serde_json::{Value, json};

/// The value of a parameter as QMP takes it.
pub(super) fn read(vmm: &Vmm, parameter: &str, text: &str) -> Result<Value, String> {
    let kind = parameters::kind(&vmm.outgoing().parameters(), parameter).ok_or_else(|| invalid(parameter))?;
    let expects = |what: &str| Err(error(Failure::generic(format!("Parameter '{parameter}' expects {what}"))));
    match (kind, parameter) {
        // Megabytes, where nothing else is said.
        (Kind::U64, "max-bandwidth" | "avail-switchover-bandwidth") => match size(text, 20) {
            Some(bytes) => Ok(bytes.into()),
            None => Err(error(Failure::generic(format!("Invalid size {text}")))),
        },
        (Kind::U8, _) | (Kind::U64, "x-checkpoint-delay") => match (number(text), kind) {
            (Some(number), Kind::U8) if number > u64::from(u8::MAX) => expects("uint8_t"),
            (Some(number), _) => Ok(number.into()),
            (None, _) => expects("uint64"),
        },
        (Kind::U64, _) => match size(text, 0) {
            Some(number) => Ok(number.into()),
            None => expects(
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

/// A size: a number with a suffix or, without one, of units of `2^unit` bytes; with a suffix it may have a fraction.
fn size(text: &str, unit: u32) -> Option<u64> {
    if text.starts_with("0x") {
        return number(text)?.checked_mul(1 << unit);
    }
    let (digits, unit) = match text.chars().last()?.to_ascii_uppercase() {
        'B' => (&text[..text.len() - 1], 0),
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        'T' => (&text[..text.len() - 1], 40),
        'P' => (&text[..text.len() - 1], 50),
        'E' => (&text[..text.len() - 1], 60),
        _ => (text, unit),
    };
    if let Some(number) = number(digits) {
        return number.checked_mul(1 << unit);
    }
    let (whole, fraction) = digits.split_once('.').filter(|_| unit > 0)?;
    let whole: u64 = whole.parse().ok()?;
    let scale = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let fraction: u64 = fraction.parse().ok()?;
    let part = u128::from(fraction) * (1_u128 << unit) / u128::from(scale);
    whole.checked_mul(1 << unit)?.checked_add(u64::try_from(part).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_by_a_qemu() {
        let cases = [("1", Some(1 << 20)), ("1.5M", Some(3 << 19)), ("2g", Some(2 << 30)), ("-1", None), ("foo", None)];
        for (text, bytes) in cases {
            assert_eq!(size(text, 20), bytes, "{text}");
        }
        assert_eq!((size("1.5", 0), size("0x1E", 0), size("1k", 0)), (None, Some(30), Some(1024)));
        assert_eq!((size("", 0), size("M", 0), size("16E", 0)), (None, None, None));
    }
}
