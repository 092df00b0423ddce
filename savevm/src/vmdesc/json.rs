//! A pull reader for JSON that keeps nothing: objects are walked pair by pair, so duplicate keys are seen in order.

use super::VmdescError;
use crate::{Error, ErrorKind};
use qevm_wire::{Located, WireError};

/// JSON levels that one level of nested structures takes: the structure, its list, and the object in it.
const LEVELS_PER_STRUCTURE: u32 = 4;

/// Whatever a caller's limits say, the stack holds this many nested structures. QEMU 5.2 to 11.1 nest seven.
const MAX_STRUCTURE_DEPTH: u32 = 64;

/// Names are C identifiers and paths of them, or section names, which have at most 255 bytes. The limit keeps an array
/// of many elements, each of which carries the name, small.
const MAX_STRING: usize = 255;

/// Walks JSON text; offsets of errors count from `base`.
pub(super) struct Json<'a> {
    text: &'a [u8],
    position: usize,
    base: u64,
    depth: u32,
    max_depth: u32,
}

impl<'a> Json<'a> {
    pub(super) fn new(text: &'a [u8], base: u64, structure_depth: u32) -> Self {
        let max_depth = structure_depth.min(MAX_STRUCTURE_DEPTH) * LEVELS_PER_STRUCTURE;
        Json { text, position: 0, base, depth: 0, max_depth }
    }

    /// Byte offset of what comes next.
    pub(super) fn offset(&self) -> u64 {
        self.base + self.position as u64
    }

    /// Calls `pair` with each key of an object; it must consume the value.
    pub(super) fn object(&mut self, mut pair: impl FnMut(&mut Self, &str) -> Result<(), Error>) -> Result<(), Error> {
        self.nested(b'{', b'}', "an object", |json| {
            let key = json.string()?;
            json.expect(b':', "':'")?;
            pair(json, &key)
        })
    }

    /// Calls `element` for each element of an array; it must consume it.
    pub(super) fn array(&mut self, element: impl FnMut(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        self.nested(b'[', b']', "an array", element)
    }

    /// Reads a string.
    pub(super) fn string(&mut self) -> Result<String, Error> {
        self.expect(b'"', "a string")?;
        let mut out = Vec::new();
        loop {
            let run = self.text[self.position..].iter().take_while(|b| !matches!(b, b'"' | b'\\' | 0..=0x1f)).count();
            let start = self.position;
            out.extend_from_slice(&self.text[start..start + run]);
            self.position += run;
            if out.len() > MAX_STRING {
                let (found, limit) = (out.len() as u64, MAX_STRING as u64);
                return Err(self.fail(WireError::LimitExceeded { what: "length of a name", found, limit }));
            }
            match self.peek() {
                Some(b'"') => {
                    self.position += 1;
                    return String::from_utf8(out).map_err(|_| {
                        Located::new(
                            VmdescError::Json { expected: "UTF-8 text", found: Some(b'"') }.into(),
                            self.base + start as u64,
                        )
                    });
                }
                Some(b'\\') => {
                    self.position += 1;
                    let character = self.escape()?;
                    out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                _ => return Err(self.unexpected("the end of a string")),
            }
        }
    }

    /// Reads an integer that is not negative.
    pub(super) fn unsigned(&mut self) -> Result<u64, Error> {
        self.space();
        let offset = self.offset();
        let digits = self.text[self.position..].iter().take_while(|b| b.is_ascii_digit()).count();
        let text = &self.text[self.position..self.position + digits];
        let value = core::str::from_utf8(text).ok().and_then(|t| t.parse().ok());
        let Some(value) = value else {
            return Err(self.unexpected("an integer from 0 to 2^64 - 1"));
        };
        self.position += digits;
        if matches!(self.peek(), Some(b'.' | b'e' | b'E')) {
            return Err(Located { offset, ..self.unexpected("an integer") });
        }
        Ok(value)
    }

    /// Reads an integer that fits 32 bits; `what` names it should it not.
    pub(super) fn unsigned32(&mut self, what: &'static str) -> Result<u32, Error> {
        self.space();
        let offset = self.offset();
        let found = self.unsigned()?;
        found
            .try_into()
            .map_err(|_| Located::new(WireError::LimitExceeded { what, found, limit: u32::MAX.into() }.into(), offset))
    }

    /// Skips a value of any kind.
    pub(super) fn skip(&mut self) -> Result<(), Error> {
        self.space();
        match self.peek() {
            Some(b'{') => self.object(|json, _| json.skip()),
            Some(b'[') => self.array(Self::skip),
            Some(b'"') => self.string().map(drop),
            Some(b'a'..=b'z' | b'0'..=b'9' | b'-') => {
                let word = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.');
                self.position += self.text[self.position..].iter().take_while(|b| word(b)).count();
                Ok(())
            }
            _ => Err(self.unexpected("a value")),
        }
    }

    /// Reads `true` or `false`.
    pub(super) fn boolean(&mut self) -> Result<bool, Error> {
        self.space();
        for (word, value) in [(&b"true"[..], true), (b"false", false)] {
            if self.text[self.position..].starts_with(word) {
                self.position += word.len();
                return Ok(value);
            }
        }
        Err(self.unexpected("true or false"))
    }

    /// Checks that only white space is left.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        self.space();
        if self.position < self.text.len() {
            return Err(self.unexpected("the end"));
        }
        Ok(())
    }

    fn nested(
        &mut self,
        open: u8,
        close: u8,
        what: &'static str,
        mut item: impl FnMut(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.expect(open, what)?;
        self.depth += 1;
        if self.depth > self.max_depth {
            let (found, limit) = (self.depth.into(), self.max_depth.into());
            return Err(self.fail(WireError::LimitExceeded { what: "JSON nesting depth", found, limit }));
        }
        self.space();
        if self.peek() == Some(close) {
            self.position += 1;
        } else {
            loop {
                item(self)?;
                self.space();
                match self.peek() {
                    Some(b',') => self.position += 1,
                    Some(found) if found == close => {
                        self.position += 1;
                        break;
                    }
                    _ => return Err(self.unexpected("',' or the end of a list")),
                }
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn escape(&mut self) -> Result<char, Error> {
        let plain = match self.peek() {
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b @ (b'"' | b'\\' | b'/')) => b.into(),
            Some(b'u') => {
                self.position += 1;
                let hex = self.text.get(self.position..self.position + 4).unwrap_or_default();
                let code = core::str::from_utf8(hex).ok().and_then(|h| u32::from_str_radix(h, 16).ok());
                let Some(code) = code.filter(|_| hex.len() == 4) else {
                    return Err(self.unexpected("four hexadecimal digits"));
                };
                self.position += 4;
                // QEMU escapes no character outside the basic plane, so a surrogate stands for itself only in damage.
                return Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            _ => return Err(self.unexpected("an escape sequence")),
        };
        self.position += 1;
        Ok(plain)
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), Error> {
        self.space();
        if self.peek() != Some(byte) {
            return Err(self.unexpected(what));
        }
        self.position += 1;
        Ok(())
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.position).copied()
    }

    fn unexpected(&self, expected: &'static str) -> Error {
        self.fail(VmdescError::Json { expected, found: self.peek() })
    }

    fn fail(&self, kind: impl Into<ErrorKind>) -> Error {
        Located::new(kind.into(), self.offset())
    }
}
