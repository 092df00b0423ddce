//! RAM blocks.

use std::io;

/// One RAM block and the pages it got.
#[derive(Debug, Clone)]
pub struct Block {
    /// Its name; bytes that are not ASCII are escaped.
    pub name: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// Pages that the stream gave a content.
    pub pages: u64,
    /// Those of [`Block::pages`] that are all zeroes in the end.
    pub zero_pages: u64,
    pub(super) first_page: u64,
}

pub(super) fn no_block() -> io::Error {
    io::Error::other("no such RAM block")
}
