//! Sizes, as QEMU's options, URIs and commands write them.

use crate::grammar::{Misfit, Parsed, whole};
use nom::Parser;
use nom::branch::alt;
use nom::bytes::complete::tag_no_case;
use nom::character::complete::{anychar, char, digit0, hex_digit1};
use nom::combinator::{cut, eof, map_opt, opt, value, verify};
use nom::error::context;
use nom::sequence::preceded;
use qevm_wire::{Blame, Fault, Located};

/// A text that is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}")]
#[non_exhaustive]
pub struct BadSize {
    /// What should be at this place.
    pub expected: &'static str,
}

impl Blame for BadSize {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}

/// Reads a number of bytes: decimal or, with `0x`, hexadecimal in units of `unit` bytes, or decimal with a suffix from
/// `B` and `K` to `E`. With `K` and above, and where units have more than a byte, it may have a fraction, which is
/// rounded down.
///
/// ```
/// use qevm_migration::parse_size;
///
/// assert_eq!(parse_size("0x1000", 1), Ok(4096));
/// assert_eq!(parse_size("1.5G", 1), Ok(3 << 29));
/// assert_eq!(parse_size("128", 1 << 20), Ok(128 << 20));
/// let error = parse_size("128Q", 1).unwrap_err();
/// assert_eq!((error.offset, error.kind.expected), (3, "one of B, K, M, G, T, P and E, or the end"));
/// ```
///
/// # Errors
/// The byte at fault, and what should be there.
pub fn parse_size(text: &str, unit: u64) -> Result<u64, Located<BadSize>> {
    let size = preceded(opt(char('+')), alt((|text| hexadecimal(text, unit), |text| decimal(text, unit))));
    whole(text, context("a number", size))
        .map_err(|misfit| Located::new(BadSize { expected: misfit.expected }, misfit.offset(text)))
}

const TOO_LARGE: &str = "less than 2^64 bytes";

fn hexadecimal(text: &str, unit: u64) -> Parsed<'_, u64> {
    let bytes = |digits: &str| u64::from_str_radix(digits, 16).ok()?.checked_mul(unit);
    let digits = context("hexadecimal digits", hex_digit1);
    preceded(tag_no_case("0x"), cut(context(TOO_LARGE, map_opt(digits, bytes)))).parse(text)
}

fn decimal(text: &str, unit: u64) -> Parsed<'_, u64> {
    // One of both may have no digits.
    let number = (digit0, opt(preceded(char('.'), digit0)));
    let digits = |(number, fraction): &(&str, Option<&str>)| number.len() + fraction.map_or(0, str::len) > 0;
    let (rest, (number, fraction)) = verify(number, digits).parse(text)?;
    let suffix = map_opt(anychar, |suffix| Some(1 << (10 * "BKMGTPE".find(suffix.to_ascii_uppercase())?)));
    let suffix = alt((value(unit, eof), suffix));
    let (end, unit) = cut(context("one of B, K, M, G, T, P and E, or the end", suffix)).parse(rest)?;
    let part = match fraction.map_or("", |digits| digits.trim_end_matches('0')) {
        "" => 0,
        _ if unit == 1 => return Err(Misfit::failure(&text[number.len()..], "a whole number of bytes")),
        digits => part(digits, unit),
    };
    let number = if number.is_empty() { "0" } else { number };
    let bytes = number.parse().ok().and_then(|number: u64| number.checked_mul(unit)?.checked_add(part));
    bytes.map(|bytes| (end, bytes)).ok_or(Misfit::failure(text, TOO_LARGE))
}

/// The bytes of a fraction with these digits, of which 18 say more than 64 bits of a unit can.
fn part(digits: &str, unit: u64) -> u64 {
    let (part, scale) = digits
        .bytes()
        .take(18)
        .fold((0_u128, 1_u128), |(part, scale), digit| (10 * part + u128::from(digit - b'0'), 10 * scale));
    // Less than a unit.
    (part * u128::from(unit) / scale) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_by_a_qemu() {
        const MIB: u64 = 1 << 20;
        for (text, unit, bytes) in [
            ("1", MIB, MIB),
            ("0", 1, 0),
            ("64B", MIB, 64),
            ("1k", 1, 1024),
            ("3M", 1, 3 * MIB),
            ("2g", MIB, 2048 * MIB),
            ("1T", MIB, MIB * MIB),
            ("1.5M", MIB, 3 << 19),
            ("0.5", MIB, 512 << 10),
            ("0x1E", 1, 30),
            ("0X1000", 1, 4096),
            ("+64M", 1, 64 * MIB),
            ("+0x1000", 1, 4096),
            ("1.M", 1, MIB),
            (".5G", 1, 512 * MIB),
            ("1.", 1, 1),
            ("1.00000000000000000001G", 1, 1024 * MIB),
            ("15E", 1, 15 << 60),
            ("18446744073709551615", 1, u64::MAX),
        ] {
            assert_eq!(parse_size(text, unit), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_where_and_what_was_expected() {
        for (text, offset, expected) in [
            ("", 0, "a number"),
            ("M", 0, "a number"),
            ("-1", 0, "a number"),
            ("++1", 1, "a number"),
            (".", 0, "a number"),
            ("\u{e9}", 0, "a number"),
            ("0x", 2, "hexadecimal digits"),
            ("0x+1", 2, "hexadecimal digits"),
            ("0x1M", 3, "the end"),
            ("0x10000000000000000", 2, TOO_LARGE),
            ("12Q", 2, "one of B, K, M, G, T, P and E, or the end"),
            ("12\u{212a}", 2, "one of B, K, M, G, T, P and E, or the end"),
            ("1KB", 2, "the end"),
            ("12.5", 2, "a whole number of bytes"),
            ("1.5B", 1, "a whole number of bytes"),
            ("16E", 0, TOO_LARGE),
            ("18446744073709551616", 0, TOO_LARGE),
        ] {
            let error = parse_size(text, 1).unwrap_err();
            assert_eq!((error.offset, error.kind.expected), (offset, expected), "{text}");
        }
        assert_eq!(parse_size("x", 1).unwrap_err().to_string(), "malformed at byte 0: expected a number");
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_a_size_or_has_a_place(text in "\\PC{0,8}|[0-9.xX]{0,24}[bkmgtpeBKMGTPE]?", unit in 1..=u64::MAX) {
            if let Err(error) = parse_size(&text, unit) {
                prop_assert!(error.offset <= text.len() as u64 && !error.kind.expected.is_empty(), "{error}");
            }
        }
    }
}
