//! How a command ends.

use qevm_inspect::failure::{Error, Failure};

/// How a command ends without success.
#[derive(Debug)]
pub enum Stop {
    /// The input is bad: exit code 1. The line was or will be printed by [`crate::run`].
    Bad(Failure),
    /// The command was used wrongly, or an input does not exist: exit code 2.
    Usage(String),
    /// The command found what it looks for, e.g. differences, and has said so: exit code 1.
    Found,
    /// What is known does not tell: exit code 3.
    Undecided,
    /// The reader of our output went away: there is none to report to.
    OutputClosed,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Bad(failure)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error {
            Error::Bad(failure) => Stop::Bad(failure),
            Error::Usage(message) => Stop::Usage(message),
            error => Stop::Usage(error.to_string()),
        }
    }
}

impl From<std::io::Error> for Stop {
    /// A temporary file could not be read or written.
    fn from(error: std::io::Error) -> Self {
        Error::from(error).into()
    }
}
