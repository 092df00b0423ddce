//! What all parts of a dump have in common.

use std::io;

/// A fault of the output file, and the offset of what was to be written.
pub(super) type Misplaced = (u64, io::Error);

/// How the pages of a dump are compressed, each by itself. One that does not get shorter is stored as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PageCompression {
    /// zlib, which every `crash` reads.
    #[default]
    Zlib,
    /// Zstandard: shorter and faster, for `crash` 8.0 and `makedumpfile` 1.7.1 and later.
    Zstd,
}
