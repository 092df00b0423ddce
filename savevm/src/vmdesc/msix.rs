//! How long MSI-X tables are.

use super::fields::Fields;
use crate::Error;

/// An MSI-X table of `vectors` entries takes 16 bytes for each, and its pending bits one byte for each eight.
pub(super) const MSIX_ENTRY: u64 = 16;

/// Bytes of an MSI-X table with its pending bits, by the number of vectors.
pub(super) fn msix_len(vectors: u64) -> usize {
    (vectors * MSIX_ENTRY + vectors.div_ceil(8)) as usize
}

pub(super) fn msix_tables(fields: &mut Fields<'_, '_>, vectors: u64) -> Result<(), Error> {
    fields.buffer("table", vectors * MSIX_ENTRY)?;
    fields.buffer("pending", vectors.div_ceil(8)).map(drop)
}
