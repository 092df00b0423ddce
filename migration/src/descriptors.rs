//! Files and connections that others have opened for the monitor.

use super::GuestError;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The descriptors that a monitor was given: by name for `fd:NAME` (QMP's `getfd`), in sets for `file:/dev/fdset/N`
/// (`add-fd`).
pub trait Descriptors {
    /// Hands out a descriptor by its name; it is the caller's from then on.
    ///
    /// # Errors
    /// The monitor's own; there is none of that name.
    fn take(&mut self, name: &str) -> Result<OwnedFd, GuestError>;

    /// The descriptor that stands for `path`, open for writing (or reading); `None` for a file that is to be opened as
    /// usual.
    ///
    /// # Errors
    /// The monitor's own; `path` names a set that does not exist, or has no descriptor of that kind.
    fn of_set(&self, path: &Path, write: bool) -> Option<Result<OwnedFd, GuestError>> {
        let _ = (path, write);
        None
    }
}

/// The descriptors of a monitor that was given none.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoDescriptors;

impl Descriptors for NoDescriptors {
    fn take(&mut self, name: &str) -> Result<OwnedFd, GuestError> {
        Err(format!("File descriptor named '{name}' has not been found").into())
    }
}
