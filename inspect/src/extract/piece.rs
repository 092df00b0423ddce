//! Where guest-physical memory is.

/// A stretch of guest-physical memory. Addresses and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the RAM block.
    pub block: usize,
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Offset of that byte in the block.
    pub block_offset: u64,
    /// Length of the stretch.
    pub len: u64,
}
