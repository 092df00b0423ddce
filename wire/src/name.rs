//! Counted strings: section names (`idstr`), RAM block names, capability names.

use alloc::boxed::Box;
use core::fmt;

/// A name of 1 to 255 bytes, as the wire carries it after a length byte.
///
/// QEMU writes ASCII, but nothing in the format forces a peer to. The bytes are kept as they came, so that they are
/// re-encoded as they came; [`Display`](fmt::Display) escapes everything but printable ASCII, so a name is safe to
/// print on a terminal. A name from a stream is never a file name.
///
/// ```
/// use qevm_wire::CountedString;
///
/// let name = CountedString::new(b"pc.ram").unwrap();
/// assert_eq!(name.as_str(), Some("pc.ram"));
/// assert_eq!(CountedString::new(b"a\x1b[2J").unwrap().to_string(), r"a\x1b[2J");
/// assert!(CountedString::new(b"").is_none());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CountedString(Box<[u8]>);

impl CountedString {
    /// The longest a counted string can be, in bytes.
    pub const MAX_LEN: usize = 255;

    /// A name of these bytes; `None` if there are none of them, or more than 255.
    pub fn new(bytes: impl AsRef<[u8]>) -> Option<Self> {
        let bytes = bytes.as_ref();
        (1..=Self::MAX_LEN).contains(&bytes.len()).then(|| CountedString(bytes.into()))
    }

    /// The bytes, without the length.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as text; `None` if it is not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        core::str::from_utf8(&self.0).ok()
    }

    /// The length as the wire carries it.
    pub fn length_byte(&self) -> u8 {
        // Every constructor has checked that the length fits.
        self.0.len() as u8
    }

    /// How many bytes the name takes on the wire, with its length byte.
    pub fn wire_len(&self) -> usize {
        1 + self.0.len()
    }
}

/// A name whose length no counted string can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a name of {found} bytes, expected 1 to {}", CountedString::MAX_LEN)]
pub struct NameLength {
    /// Its length in bytes.
    pub found: usize,
}

impl TryFrom<&str> for CountedString {
    type Error = NameLength;

    /// As [`CountedString::new`].
    fn try_from(name: &str) -> Result<Self, NameLength> {
        CountedString::new(name).ok_or(NameLength { found: name.len() })
    }
}

impl PartialEq<str> for CountedString {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl PartialEq<&str> for CountedString {
    fn eq(&self, other: &&str) -> bool {
        *self == **other
    }
}

impl fmt::Display for CountedString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.escape_ascii(), f)
    }
}

impl fmt::Debug for CountedString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{format, vec};

    #[test]
    fn only_lengths_that_fit_the_length_byte_exist() {
        assert!(CountedString::new([]).is_none());
        assert!(CountedString::new(vec![b'x'; 256]).is_none());
        let longest = CountedString::new(vec![b'x'; 255]).unwrap();
        assert_eq!((longest.length_byte(), longest.wire_len()), (255, 256));
        assert_eq!(CountedString::try_from(""), Err(NameLength { found: 0 }));
    }

    #[test]
    fn bytes_that_are_no_text_survive_and_print_escaped() {
        let name = CountedString::new([0xff, b'a', b'\n']).unwrap();
        assert_eq!(name.as_bytes(), [0xff, b'a', b'\n']);
        assert_eq!(name.as_str(), None);
        assert_eq!(format!("{name} {name:?}"), r#"\xffa\n "\xffa\n""#);
    }
}
