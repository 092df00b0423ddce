//! Why something could not be done: whose fault, in which file, at which byte, within what.

use crate::bounds::Exceeded;
use qevm_wire::{Blame, DriveError, Fault, Located};
use std::fmt;
use std::io;

/// A fault found in an input, or met on the way to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The file (or address) as the user named it.
    pub file: String,
    /// `malformed`, `unsupported`, `mismatch`, `limit`, `truncated`; `reencode` if what was decoded does not re-encode
    /// to the same bytes; `io` if the input could not be read.
    pub kind: &'static str,
    /// Offset of the byte at fault in the file; in the decompressed stream if the file is compressed.
    pub offset: u64,
    /// What was being read, outermost first; empty at the top level.
    pub path: String,
    /// What was found and what was expected.
    pub message: String,
}

impl Failure {
    /// A decoder's error about `file`.
    pub fn located<K: Blame + fmt::Display>(file: &str, error: Located<K>) -> Self {
        Failure {
            file: file.to_owned(),
            kind: error.kind.fault().as_str(),
            offset: error.offset,
            path: error.path.to_string(),
            message: error.kind.to_string(),
        }
    }

    /// Why `file` could not be read on at `offset`: its bytes, or the file itself.
    pub fn driven<K: Blame + fmt::Display>(file: &str, offset: u64, error: DriveError<K>) -> Self {
        match error {
            DriveError::Stream(error) => Failure::located(file, error),
            DriveError::Io(error) => Failure::io(file, offset, &error),
            error => Failure::io(file, offset, &io::Error::other(error.to_string())),
        }
    }

    /// `file` could not be read (or a temporary file not written) at `offset`. If that is because a bound of the
    /// command was reached, the failure is of kind `limit`; if what the file is wrapped in is damaged, of kind
    /// `malformed`, or `truncated`.
    pub fn io(file: &str, offset: u64, error: &io::Error) -> Self {
        if let Some(Elsewhere { file, offset, error }) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
            return Self::io(file, *offset, error);
        }
        if let Some(exceeded) = error.get_ref().and_then(|inner| inner.downcast_ref::<Exceeded>()) {
            return Self::exceeded(file, offset, "", exceeded.clone());
        }
        let kind = match error.kind() {
            // Said by readers of what is inside the file: the operating system has neither.
            io::ErrorKind::UnexpectedEof => Fault::Truncated.as_str(),
            io::ErrorKind::InvalidData => Fault::Malformed.as_str(),
            _ => "io",
        };
        Failure { file: file.to_owned(), kind, offset, path: String::new(), message: error.to_string() }
    }

    /// At `offset` of `file` a bound was reached.
    pub fn exceeded(file: &str, offset: u64, path: &str, exceeded: Exceeded) -> Self {
        let (path, message) = (path.to_owned(), exceeded.to_string());
        Failure { file: file.to_owned(), kind: Fault::Limit.as_str(), offset, path, message }
    }

    /// Two inputs, or two places of one, that do not fit together.
    pub fn mismatch(file: &str, offset: u64, path: impl Into<String>, message: impl Into<String>) -> Self {
        Failure { file: file.to_owned(), kind: "mismatch", offset, path: path.into(), message: message.into() }
    }
}

/// What an [`io::Error`] holds that is of another file than the one that is read at the time.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    file: String,
    offset: u64,
    error: io::Error,
}

impl Elsewhere {
    /// `file` could not be read or written at `offset`.
    pub(crate) fn failed(file: &str, offset: u64, error: io::Error) -> io::Error {
        io::Error::other(Elsewhere { file: file.to_owned(), offset, error })
    }
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", printable(&self.file), self.error)
    }
}

impl std::error::Error for Elsewhere {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line whatever a file's name or a message contains.
        write!(f, "{}: {} at byte {}", printable(&self.file), self.kind, self.offset)?;
        if !self.path.is_empty() {
            write!(f, ", in {}", printable(&self.path))?;
        }
        write!(f, ": {}", printable(&self.message))
    }
}

impl std::error::Error for Failure {}

/// Why something could not be done.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// An input is bad, or could not be read; an output could not be written.
    Bad(Failure),
    /// What was asked for cannot be had, in words: a file that cannot be opened, a snapshot that the image does not
    /// have, a guest whose memory map is not known.
    Usage(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Bad(failure) => failure.fmt(f),
            Error::Usage(message) => f.write_str(&printable(message)),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Bad(failure) => Some(failure),
            Error::Usage(_) => None,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Error::Bad(failure)
    }
}

impl From<io::Error> for Error {
    /// A temporary file could not be read or written.
    fn from(error: io::Error) -> Self {
        Failure::io("temporary file", 0, &error).into()
    }
}

/// `text` with control characters escaped, so that it stays on one line and does not drive a terminal.
pub fn printable(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_wire::WireError;

    #[test]
    fn a_failure_is_one_line_with_fault_place_and_path() {
        let kind = WireError::Truncated { needed: 8, available: 2 };
        let failure = Failure::located("a\nb", Located::new(kind, 40).within("section 2 'ram'"));
        assert_eq!(
            failure.to_string(),
            "a\\nb: truncated at byte 40, in section 2 'ram': the input ends here: 8 bytes expected, 2 left"
        );
    }
}
