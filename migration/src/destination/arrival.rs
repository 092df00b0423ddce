//! What arrives.

use crate::{LazyRestore, Postcopy};

/// What arrived.
#[derive(Debug)]
pub struct Arrival {
    /// The guest ran at the source, and is to run here.
    pub running: bool,
    /// Bytes of the stream.
    pub bytes: u64,
    /// Guest memory that has not come, under capability `postcopy-ram`: it is to be taken care of when the guest has
    /// been started.
    pub rest: Option<Rest>,
}

/// The part of a guest's memory that has not come when the guest starts.
#[derive(Debug)]
pub enum Rest {
    /// It is in the file that the guest comes from, with `mapped-ram` on.
    InFile(LazyRestore),
    /// It is on its way from the source (postcopy).
    AtSource(Postcopy),
}
