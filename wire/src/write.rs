//! The writer that mirrors [`Reader`](crate::Reader).

use crate::CountedString;
use alloc::vec::Vec;

/// Appends big-endian values to a growing buffer.
///
/// ```
/// use qevm_wire::{CountedString, Writer};
///
/// let mut writer = Writer::new();
/// writer.u8(0x01).be32(2).counted_string(&CountedString::new(b"ram").unwrap()).be32(0).be32(4);
/// assert_eq!(writer.as_bytes(), b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Writer {
    bytes: Vec<u8>,
}

macro_rules! big_endian {
    ($($name:ident: $type:ty;)*) => {$(
        #[doc = concat!("Appends a big-endian `", stringify!($type), "`.")]
        pub fn $name(&mut self, value: $type) -> &mut Self {
            self.bytes(&value.to_be_bytes())
        }
    )*};
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    big_endian! {
        u8: u8;
        i8: i8;
        be16: u16;
        be32: u32;
        be64: u64;
        be_i16: i16;
        be_i32: i32;
        be_i64: i64;
    }

    /// Appends bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends `count` zero bytes.
    pub fn zeroes(&mut self, count: usize) -> &mut Self {
        self.bytes.resize(self.bytes.len() + count, 0);
        self
    }

    /// Appends a length byte and the string's bytes.
    pub fn counted_string(&mut self, string: &CountedString) -> &mut Self {
        self.u8(string.length_byte()).bytes(string.as_bytes())
    }

    /// How many bytes were written.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What was written.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes what was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Forgets what was written after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    /// Forgets what was written and keeps the allocation.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }
}
