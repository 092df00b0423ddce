//! How reading ends.

use super::analysis::Analysis;
use super::checkpoints::Checkpoints;
use crate::failure::Failure;

/// How reading ended.
pub(super) enum Outcome {
    /// At the end, or at a fault.
    Done(Box<Analysis>),
    /// At an XBZRLE page, which needs the contents of pages, and they were not kept.
    NeedsImage,
    /// At the end of the stream, which checkpoints follow: with them it is to be read again.
    Checkpoints(Box<Checkpoints>),
}

/// Why reading stops before the end.
pub(super) enum Halt {
    /// The stream is bad.
    Failure(Failure),
    /// See [`Outcome::NeedsImage`].
    NeedsImage,
    /// See [`Outcome::Checkpoints`].
    Checkpoints(Box<Checkpoints>),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Halt::Failure(failure)
    }
}
