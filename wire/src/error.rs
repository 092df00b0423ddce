//! Errors that say whose fault it is, where it happened and what was found.
//!
//! Every crate of the workspace has its own error *kind* (an enum with the offending and the expected value inside)
//! and reports it as [`Located<Kind>`]: the kind, the byte offset in the stream, and the path of nested things that
//! were being read. [`WireError`] is the kind of the primitives here; the other crates' kinds contain it.

use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::fmt;

/// Whose fault an error is, and so what can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The peer (or the writer of the file) broke the format.
    Malformed,
    /// Legal, but nothing here can handle it.
    Unsupported,
    /// Legal, but it disagrees with this machine or this configuration.
    Mismatch,
    /// More than the configured [`Limits`](crate::Limits) allow.
    Limit,
    /// The input ended too early. To an incremental decoder this means "more bytes, please".
    Truncated,
    /// The program that uses this library called it in a way that makes no sense. No peer can bring this about.
    Misuse,
}

impl Fault {
    /// The lower-case word used for this fault in messages and in JSON.
    ///
    /// ```
    /// assert_eq!(qevm_wire::Fault::Truncated.as_str(), "truncated");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Malformed => "malformed",
            Fault::Unsupported => "unsupported",
            Fault::Mismatch => "mismatch",
            Fault::Limit => "limit",
            Fault::Truncated => "truncated",
            Fault::Misuse => "misuse",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error kind that knows whose fault it is.
pub trait Blame {
    /// Whose fault this error is.
    fn fault(&self) -> Fault;

    /// How many bytes from the place of the error are needed to read on, if the only fault is that there are fewer.
    fn needed(&self) -> Option<u64> {
        None
    }
}

/// What the primitives of this crate can report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The input ended; `needed` more bytes were expected where `available` are left.
    #[error("the input ends here: {needed} bytes expected, {available} left")]
    Truncated {
        /// Bytes the item being read takes.
        needed: u64,
        /// Bytes that are left.
        available: u64,
    },
    /// A length or count from the peer is above the configured limit.
    #[error("{what} is {found}, above the limit of {limit}")]
    LimitExceeded {
        /// What was counted, e.g. `"RAM block count"`.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The configured limit.
        limit: u64,
    },
    /// A value has exactly one legal content and held another.
    #[error("{what} is {found:#x}, expected {expected:#x}")]
    Unexpected {
        /// What was read, e.g. `"stream magic"`.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The only legal value.
        expected: u64,
    },
    /// A bounded region was not used up by its content.
    #[error("{what} has {left} bytes left over after its content")]
    TrailingBytes {
        /// The region, e.g. `"command payload"`.
        what: &'static str,
        /// How many bytes are left.
        left: u64,
    },
    /// A name that must not be empty is.
    #[error("{what} is empty")]
    Empty {
        /// What is empty, e.g. `"RAM block name"`.
        what: &'static str,
    },
    /// More payload was skipped than remains. The caller's fault.
    #[error("skipped {found} bytes of a payload of which {remaining} remain")]
    SkipTooFar {
        /// Bytes skipped.
        found: u64,
        /// Bytes that remain.
        remaining: u64,
    },
    /// A value to be written does not fit its field. The caller's fault.
    #[error("{what} is {found}, but its field holds at most {max}")]
    TooLong {
        /// What does not fit.
        what: &'static str,
        /// Its size or value.
        found: u64,
        /// The largest size or value that fits.
        max: u64,
    },
}

impl Blame for WireError {
    fn fault(&self) -> Fault {
        match self {
            WireError::Truncated { .. } => Fault::Truncated,
            WireError::LimitExceeded { .. } => Fault::Limit,
            WireError::Unexpected { .. } | WireError::TrailingBytes { .. } | WireError::Empty { .. } => {
                Fault::Malformed
            }
            WireError::SkipTooFar { .. } | WireError::TooLong { .. } => Fault::Misuse,
        }
    }

    fn needed(&self) -> Option<u64> {
        match self {
            WireError::Truncated { needed, .. } => Some(*needed),
            _ => None,
        }
    }
}

/// The nested things that were being read when an error happened, outermost first.
///
/// ```
/// use qevm_wire::Path;
///
/// let mut path = Path::default();
/// path.enter("field ioredtbl[3]"); // innermost first: paths grow while an error travels outwards
/// path.enter("section 12 'ioapic'");
/// assert_eq!(path.to_string(), "section 12 'ioapic' › field ioredtbl[3]");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Path {
    innermost_first: Vec<Cow<'static, str>>,
}

impl Path {
    /// Puts `what` around everything in the path so far.
    pub fn enter(&mut self, what: impl Into<Cow<'static, str>>) {
        self.innermost_first.push(what.into());
    }

    /// The parts of the path, outermost first.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.innermost_first.iter().rev().map(AsRef::as_ref)
    }

    /// True if nothing was entered.
    pub fn is_empty(&self) -> bool {
        self.innermost_first.is_empty()
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, part) in self.parts().enumerate() {
            if i > 0 {
                f.write_str(" › ")?;
            }
            f.write_str(part)?;
        }
        Ok(())
    }
}

/// An error kind together with where it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located<K> {
    /// What went wrong.
    pub kind: K,
    /// Byte offset, from the start of the stream, of the item at fault.
    pub offset: u64,
    /// What was being read, outermost first.
    pub path: Path,
}

impl<K> Located<K> {
    /// `kind` at byte `offset`, with an empty path.
    pub fn new(kind: K, offset: u64) -> Self {
        Located { kind, offset, path: Path::default() }
    }

    /// The same error with `what` put around its path.
    #[must_use]
    pub fn within(mut self, what: impl Into<Cow<'static, str>>) -> Self {
        self.path.enter(what);
        self
    }

    /// The same place with another kind: how an error crosses from one crate to the next.
    pub fn map<L>(self, convert: impl FnOnce(K) -> L) -> Located<L> {
        Located { kind: convert(self.kind), offset: self.offset, path: self.path }
    }
}

impl<K: Blame> Located<K> {
    /// Whose fault this error is.
    pub fn fault(&self) -> Fault {
        self.kind.fault()
    }

    /// True if more input could make the error go away.
    pub fn is_truncated(&self) -> bool {
        self.fault() == Fault::Truncated
    }
}

impl<K: fmt::Display + Blame> fmt::Display for Located<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.kind.fault(), self.offset)?;
        if !self.path.is_empty() {
            write!(f, ", in {}", self.path)?;
        }
        write!(f, ": {}", self.kind)
    }
}

impl<K: fmt::Debug + fmt::Display + Blame> core::error::Error for Located<K> {}

/// Adds path parts to the error side of a result.
pub trait Within {
    /// Puts `what()` around the path of the error, if there is one.
    #[must_use]
    fn within<S: Into<Cow<'static, str>>>(self, what: impl FnOnce() -> S) -> Self;
}

impl<T, K> Within for Result<T, Located<K>> {
    fn within<S: Into<Cow<'static, str>>>(self, what: impl FnOnce() -> S) -> Self {
        self.map_err(|e| e.within(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn a_message_names_fault_place_and_values() {
        let error = Located::new(WireError::Unexpected { what: "footer", found: 0x12, expected: 0x7e }, 4096)
            .within("section 3 'ram'");
        assert_eq!(error.fault(), Fault::Malformed);
        assert_eq!(error.to_string(), "malformed at byte 4096, in section 3 'ram': footer is 0x12, expected 0x7e");
    }

    #[test]
    fn every_kind_has_its_fault() {
        let truncated = WireError::Truncated { needed: 4, available: 1 };
        let limit = WireError::LimitExceeded { what: "x", found: 2, limit: 1 };
        assert_eq!(truncated.fault(), Fault::Truncated);
        assert_eq!(limit.fault(), Fault::Limit);
        assert!(Located::new(truncated, 0).is_truncated());
        assert!(!Located::new(limit, 0).is_truncated());
    }
}
