//! Pages that are waited for: those that are missing, and those that are protected.

use crate::GuestError;
use std::ops::Range;

/// RAM whose pages are missing until they are filled in: who touches one waits for it (`userfaultfd`).
///
/// Blocks have their numbers in [`Guest::ram`](crate::Guest::ram); offsets and lengths are bytes.
pub trait MissingPages: Send + Sync {
    /// Bytes of a block that are filled in at once at least: 4096, or those of a huge page. The block's length is a
    /// multiple of that.
    ///
    /// # Errors
    /// The guest's own.
    fn unit(&self, block: usize) -> Result<u64, GuestError>;

    /// Empties bytes of a block, whole units: nothing is in them afterwards, as in memory that was not touched.
    ///
    /// # Errors
    /// The guest's own; above all when the host cannot do that with this memory.
    fn discard(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError>;

    /// Makes the pages of a block missing that have nothing in them; those that have keep it.
    ///
    /// # Errors
    /// The guest's own; above all when the host cannot do that with this memory.
    fn add(&self, block: usize) -> Result<(), GuestError>;

    /// Waits until a page is touched that is missing, and says which. The same page may be told of several times,
    /// and while it is being filled in. `None` after [`stop`](MissingPages::stop).
    ///
    /// # Errors
    /// The guest's own.
    fn wait(&self) -> Result<Option<Touch>, GuestError>;

    /// How many vCPUs [`wait`](MissingPages::wait) can tell apart, for capability `postcopy-blocktime`. By default
    /// none.
    fn vcpus(&self) -> usize {
        0
    }

    /// Fills in pages that are missing, and lets those go on who wait for them.
    ///
    /// # Errors
    /// The guest's own; [`std::io::Error`] of the kind [`AlreadyExists`](std::io::ErrorKind::AlreadyExists) when one of
    /// them is not missing.
    fn fill(&self, block: usize, offset: u64, bytes: &[u8]) -> Result<(), GuestError>;

    /// The same with zeros.
    ///
    /// # Errors
    /// As [`fill`](MissingPages::fill).
    fn fill_zeros(&self, block: usize, offset: u64, len: u64) -> Result<(), GuestError>;

    /// Makes [`wait`](MissingPages::wait) end.
    fn stop(&self);

    /// What is missing now is zero from now on, and no wait is left.
    ///
    /// # Errors
    /// The guest's own.
    fn release(&self) -> Result<(), GuestError>;
}

/// A page that is missing and waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// The block.
    pub block: usize,
    /// Any offset in the page.
    pub offset: u64,
    /// The vCPU that waits, if one does and it is known which.
    pub vcpu: Option<usize>,
}

/// RAM that can be protected against writes: who writes to a protected page waits until it is no longer
/// (`userfaultfd`).
///
/// Blocks have their numbers in [`Guest::ram`](crate::Guest::ram); offsets and lengths are bytes.
pub trait ProtectedPages: Send + Sync {
    /// Protects a block of a paused guest. Gives the bytes that are unprotected at once at least: 4096, or those of a
    /// huge page.
    ///
    /// # Errors
    /// The guest's own; above all when the host cannot do that with this memory.
    fn protect(&self, block: usize) -> Result<u64, GuestError>;

    /// Waits until a protected page is written to, and says which: a block and any offset in the page. The
    /// same page may be told of several times, and after it was unprotected. `None` after
    /// [`stop`](ProtectedPages::stop).
    ///
    /// # Errors
    /// The guest's own.
    fn wait(&self) -> Result<Option<(usize, u64)>, GuestError>;

    /// Lets pages be written to, and those go on who wait for that.
    ///
    /// # Errors
    /// The guest's own.
    fn unprotect(&self, block: usize, offset: u64, len: u64) -> Result<(), GuestError>;

    /// Makes [`wait`](ProtectedPages::wait) end.
    fn stop(&self);

    /// Ends the protection of all blocks: no wait is left.
    ///
    /// # Errors
    /// The guest's own.
    fn release(&self) -> Result<(), GuestError>;
}
