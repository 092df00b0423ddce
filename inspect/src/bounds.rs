//! What a command may cost beyond what its input is worth: temporary files, and memory that was claimed and never sent.
//!
//! With n bytes of input (after decompression), every command needs at most 64 MiB + 8 n bytes of memory, and work in
//! proportion to n. What cannot follow n has a bound of its own, which the user can move: [`Bounds`].

use crate::size::size;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a command may cost beyond what follows from its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bounds {
    /// Bytes that may go into temporary files (in `TMPDIR`): page contents, where they are needed, and the rest of a
    /// stream that comes through a pipe.
    pub max_spool: u64,
    /// Bytes of guest memory above which a guest is refused where every byte has to be produced, whether it came or
    /// not: extracted memory, a SHA-256, a guest that is written again.
    pub max_ram: u64,
}

impl Default for Bounds {
    /// 128 GiB each.
    fn default() -> Self {
        Bounds { max_spool: 128 << 30, max_ram: 128 << 30 }
    }
}

impl Bounds {
    /// Bounds of `max_spool` and `max_ram` bytes.
    pub const fn new(max_spool: u64, max_ram: u64) -> Self {
        Bounds { max_spool, max_ram }
    }

    /// The room for temporary files that one command has.
    pub fn spool(&self) -> Spool {
        Spool::new(self.max_spool)
    }
}

/// Room for temporary files, shared by all that write some.
///
/// ```
/// use qevm_inspect::bounds::{Exceeded, Spool};
///
/// let spool = Spool::new(10);
/// spool.take(8)?;
/// let error = spool.take(3).unwrap_err();
/// assert!(error.get_ref().unwrap().is::<Exceeded>());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Spool {
    limit: u64,
    used: Arc<AtomicU64>,
}

impl Spool {
    /// Room for `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Spool { limit, used: Arc::default() }
    }

    /// Room for anything.
    pub fn unlimited() -> Self {
        Self::new(u64::MAX)
    }

    /// Bytes that may still be written.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used.load(Ordering::Relaxed))
    }

    /// Says that `bytes` more are about to be written.
    ///
    /// # Errors
    /// [`Exceeded`], as what an [`io::Error`] holds, if there is no room for them.
    pub fn take(&self, bytes: u64) -> io::Result<()> {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        match used > self.limit {
            true => Err(io::Error::other(Exceeded::spool(self.limit))),
            false => Ok(()),
        }
    }
}

/// A bound was reached; a [`Failure`](crate::failure::Failure) of kind `limit` says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    message: String,
}

impl Exceeded {
    fn spool(limit: u64) -> Self {
        Exceeded { message: format!("temporary files would take more than {} (--max-spool)", size(limit)) }
    }

    /// `found` bytes of guest memory, of which every one would have to be produced.
    pub fn ram(found: u64, limit: u64) -> Self {
        let (found, limit) = (size(found), size(limit));
        let message = format!(
            "{found} of guest memory, every byte of which has to be produced here, more than {limit} (--max-ram)"
        );
        Exceeded { message }
    }

    /// Something else, in words.
    pub fn new(message: String) -> Self {
        Exceeded { message }
    }
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exceeded {}
