//! A bounded big-endian reader over bytes that are already in memory.

use crate::{CountedString, Located, WireError};
use core::marker::PhantomData;

/// Reads big-endian values from a slice and never past its end.
///
/// `K` is the error kind of the crate that reads; every error carries the offset of the item that could not be read.
/// Offsets count from the start of the *stream*: give the slice's place with [`Reader::at`]. A length that comes from
/// the peer yields a bounded sub-reader ([`Reader::sub`]), never a bare slice with a length to remember.
///
/// Running out of input is [`WireError::Truncated`], which an incremental decoder takes as the request for more bytes;
/// the reader itself is then left where it was before the failing call.
///
/// ```
/// use qevm_wire::{Reader, WireError};
///
/// // A counted string as section headers carry it: length byte, then that many bytes.
/// let mut reader: Reader<'_, WireError> = Reader::at(b"\x03ramXYZ", 100);
/// assert_eq!(reader.counted_string("idstr")?.as_bytes(), b"ram");
/// assert_eq!(reader.offset(), 104);
/// let error = reader.be32().unwrap_err();
/// assert_eq!(error.offset, 104);
/// assert_eq!(error.kind, WireError::Truncated { needed: 4, available: 3 });
/// # Ok::<(), qevm_wire::Located<WireError>>(())
/// ```
#[derive(Debug)]
pub struct Reader<'a, K = WireError> {
    bytes: &'a [u8],
    position: usize,
    base: u64,
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Reader<'_, K> {
    fn clone(&self) -> Self {
        Reader { kind: PhantomData, ..*self }
    }
}

macro_rules! big_endian {
    ($($name:ident: $type:ty;)*) => {$(
        #[doc = concat!("Reads a big-endian `", stringify!($type), "`.")]
        ///
        /// # Errors
        /// [`WireError::Truncated`] if the input is too short.
        pub fn $name(&mut self) -> Result<$type, Located<K>> {
            Ok(<$type>::from_be_bytes(self.array()?))
        }
    )*};
}

impl<'a, K: From<WireError>> Reader<'a, K> {
    /// A reader over `bytes`, which start at stream offset 0.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::at(bytes, 0)
    }

    /// A reader over `bytes`, the first of which is at stream offset `base`.
    pub fn at(bytes: &'a [u8], base: u64) -> Self {
        Reader { bytes, position: 0, base, kind: PhantomData }
    }

    /// Stream offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.base.saturating_add(self.position as u64)
    }

    /// How many bytes were read so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// True if no byte is left.
    pub fn is_empty(&self) -> bool {
        self.remaining() == 0
    }

    /// The bytes that are left, without reading them.
    pub fn rest(&self) -> &'a [u8] {
        &self.bytes[self.position..]
    }

    /// The next byte without reading it; `None` at the end.
    pub fn peek(&self) -> Option<u8> {
        self.bytes.get(self.position).copied()
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

    /// Reads exactly `N` bytes.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Located<K>> {
        match self.rest().first_chunk() {
            Some(chunk) => {
                self.position += N;
                Ok(*chunk)
            }
            None => Err(self.truncated(N as u64)),
        }
    }

    /// Reads exactly `count` bytes, without copying them.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if fewer are left.
    pub fn take(&mut self, count: u64) -> Result<&'a [u8], Located<K>> {
        let taken = usize::try_from(count).ok().and_then(|n| self.rest().get(..n));
        match taken {
            Some(taken) => {
                self.position += taken.len();
                Ok(taken)
            }
            None => Err(self.truncated(count)),
        }
    }

    /// A reader over the next `count` bytes only; this one goes on after them.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if fewer are left.
    pub fn sub(&mut self, count: u64) -> Result<Reader<'a, K>, Located<K>> {
        let base = self.offset();
        Ok(Reader::at(self.take(count)?, base))
    }

    /// Reads a length byte and as many bytes (1 to 255) as it says. `what` names the string in errors.
    ///
    /// # Errors
    /// [`WireError::Empty`] if the length is 0, [`WireError::Truncated`] if the input is too short.
    pub fn counted_string(&mut self, what: &'static str) -> Result<CountedString, Located<K>> {
        let bytes = self.counted_bytes()?;
        CountedString::new(bytes)
            .ok_or_else(|| Located::new(WireError::Empty { what }.into(), self.offset() - bytes.len() as u64 - 1))
    }

    /// Reads a length byte and as many bytes (0 to 255) as it says, without copying them.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if the input is too short.
    pub fn counted_bytes(&mut self) -> Result<&'a [u8], Located<K>> {
        let start = self.position;
        let length = self.u8()?;
        self.take(length.into()).inspect_err(|_| self.position = start)
    }

    /// Reads a big-endian `u32` that can only be `expected`.
    ///
    /// # Errors
    /// [`WireError::Unexpected`] for another value, [`WireError::Truncated`] if the input is too short.
    pub fn expect_be32(&mut self, what: &'static str, expected: u32) -> Result<(), Located<K>> {
        let offset = self.offset();
        match self.be32()? {
            found if found == expected => Ok(()),
            found => Err(Located::new(
                WireError::Unexpected { what, found: found.into(), expected: expected.into() }.into(),
                offset,
            )),
        }
    }

    /// Checks that `what`, which this reader was bounded to, is used up.
    ///
    /// # Errors
    /// [`WireError::TrailingBytes`] if bytes are left.
    pub fn expect_end(&self, what: &'static str) -> Result<(), Located<K>> {
        match self.remaining() as u64 {
            0 => Ok(()),
            left => Err(self.fail(WireError::TrailingBytes { what, left })),
        }
    }

    /// Checks a count from the peer against its limit.
    ///
    /// # Errors
    /// [`WireError::LimitExceeded`] if `found` is above `limit`.
    pub fn within_limit(&self, what: &'static str, found: u64, limit: u64) -> Result<(), Located<K>> {
        if found > limit {
            return Err(self.fail(WireError::LimitExceeded { what, found, limit }));
        }
        Ok(())
    }

    /// An error of `kind` at the current offset.
    pub fn fail(&self, kind: impl Into<K>) -> Located<K> {
        Located::new(kind.into(), self.offset())
    }

    fn truncated(&self, needed: u64) -> Located<K> {
        self.fail(WireError::Truncated { needed, available: self.remaining() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Writer;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    type Plain<'a> = Reader<'a, WireError>;

    #[test]
    fn a_failing_read_leaves_the_reader_where_it_was() {
        let mut reader = Plain::at(&[5, b'a', b'b'], 7);
        assert!(matches!(reader.counted_bytes().unwrap_err().kind, WireError::Truncated { needed: 5, available: 2 }));
        assert_eq!(reader.offset(), 7);
        assert!(matches!(reader.take(u64::MAX).unwrap_err().kind, WireError::Truncated { .. }));
        assert_eq!(reader.take(3).unwrap(), &[5, b'a', b'b']);
    }

    #[test]
    fn an_empty_name_is_refused_at_its_length_byte() {
        let error = Plain::at(&[0, 1], 40).counted_string("idstr").unwrap_err();
        assert_eq!(error, Located::new(WireError::Empty { what: "idstr" }, 40));
    }

    #[test]
    fn a_sub_reader_cannot_leave_its_bounds() {
        let mut reader = Plain::at(&[1, 2, 3, 4, 5], 10);
        let mut sub = reader.sub(2).unwrap();
        assert_eq!(sub.be16().unwrap(), 0x0102);
        assert_eq!(sub.u8().unwrap_err().offset, 12);
        sub.expect_end("pair").unwrap();
        assert_eq!(reader.u8().unwrap(), 3);
        let left = reader.expect_end("all").unwrap_err();
        assert_eq!(left, Located::new(WireError::TrailingBytes { what: "all", left: 2 }, 13));
    }

    #[test]
    fn expectations_and_limits_name_both_values() {
        let mut reader = Plain::new(&[0, 0, 0, 9]);
        let error = reader.expect_be32("version", 3).unwrap_err();
        assert_eq!(error, Located::new(WireError::Unexpected { what: "version", found: 9, expected: 3 }, 0));
        let error = reader.within_limit("count", 9, 8).unwrap_err();
        assert_eq!(error, Located::new(WireError::LimitExceeded { what: "count", found: 9, limit: 8 }, 4));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn what_is_written_is_read(a: u8, b: u16, c: u32, d: u64, e: i32, f: i64, name in prop::collection::vec(any::<u8>(), 1..=255)) {
            let mut writer = Writer::new();
            writer.u8(a).be16(b).be32(c).be64(d).be_i32(e).be_i64(f);
            writer.counted_string(&CountedString::new(&name).unwrap());
            let bytes = writer.into_bytes();
            let mut reader = Plain::new(&bytes);
            prop_assert_eq!((reader.u8()?, reader.be16()?, reader.be32()?, reader.be64()?), (a, b, c, d));
            prop_assert_eq!((reader.be_i32()?, reader.be_i64()?), (e, f));
            let read = reader.counted_string("name")?;
            prop_assert_eq!(read.as_bytes(), &name[..]);
            prop_assert!(reader.is_empty());
            for end in 0..bytes.len() {
                let mut short = Plain::new(&bytes[..end]);
                let all: Result<Vec<()>, _> = (0..6).map(|_| short.array::<4>().map(drop)).collect();
                prop_assert!(all.is_ok() == (end >= 24));
            }
        }
    }
}
