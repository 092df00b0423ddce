//! Jobs in which a guest with VFIO devices goes from one monitor to another, and further on.

mod case;
mod cases;
mod faults;
mod figures;
mod judge;
mod used;

pub(super) use case::Case;
pub(super) use cases::{cases, recordings};
pub(super) use figures::{figures, tables};
pub(super) use judge::judge;

/// A job with this at the beginning of its name is a recording.
pub const RECORDING: &str = "record-";
