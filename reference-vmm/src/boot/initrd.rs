//! Where the initial RAM disk goes.

use super::BootError;
use crate::error::Result;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// Puts it as high as `limit`, the byte after the last it may have, and `kernel_end` let it be, and gives its address
/// and length. `None`: there is none.
pub(super) fn load(memory: &GuestMemory, bytes: &[u8], kernel_end: u64, limit: u64) -> Result<Option<(u64, u64)>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let size = bytes.len() as u64;
    let start = limit.checked_sub(size).map(|start| start & !(PAGE_SIZE - 1)).filter(|start| *start >= kernel_end);
    let start = start.ok_or(BootError::InitrdNoRoom { size, kernel_end, limit })?;
    memory.write(start, bytes)?;
    Ok(Some((start, size)))
}
