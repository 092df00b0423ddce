//! Sizes in bytes.

use qevm_migration::BadSize;
use qevm_wire::Located;

/// Bytes, as QEMU's options take them: decimal or hexadecimal, or decimal with a binary suffix.
pub(crate) fn parse_size(text: &str) -> Result<u64, Located<BadSize>> {
    qevm_migration::parse_size(text, 1)
}
