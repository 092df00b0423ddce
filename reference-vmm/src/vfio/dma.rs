//! Which pages of the guest's RAM devices have written to.

use super::VfioError;

/// Who tells which pages devices have written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Each device logs its own writes.
    Devices,
    /// The container does.
    Container,
    /// Unknown: all of RAM may have been written to, as long as a device works.
    Nobody,
}

/// The log of what some devices write to.
pub trait DmaLog: Send + Sync {
    /// Begins to log, by the best means that works.
    fn start(&self) -> Tracking;

    /// Tells which pages were written to since the last report, and forgets them: words of 64 pages of the RAM, of
    /// which the first is that page, a multiple of 64. Nothing of a log that is not kept.
    ///
    /// # Errors
    /// [`Failure::Log`](super::Failure::Log).
    fn report(&self, found: &mut dyn FnMut(u64, &[u64])) -> Result<(), VfioError>;

    /// Ends the log.
    fn stop(&self);
}
