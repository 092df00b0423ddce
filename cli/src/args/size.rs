//! Sizes in bytes.

/// Bytes, as QEMU's options take them: decimal or hexadecimal, with a binary suffix.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let expected = || format!("'{text}' is no size: expected bytes, or a number with K, M, G or T");
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number = match number.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => number.parse(),
    };
    number.ok().and_then(|number: u64| number.checked_mul(1 << shift)).ok_or_else(expected)
}
