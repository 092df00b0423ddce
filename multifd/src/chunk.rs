//! Parts of a packet that have one length.

use crate::{Error, Reader};
use qevm_wire::WireError;

/// The next `N` bytes of the input, without copying them.
pub(crate) fn chunk<'a, const N: usize>(reader: &mut Reader<'a>) -> Result<&'a [u8; N], Error> {
    match reader.rest().first_chunk() {
        Some(chunk) => {
            reader.take(N as u64)?;
            Ok(chunk)
        }
        None => Err(reader.fail(WireError::Truncated { needed: N as u64, available: reader.remaining() as u64 })),
    }
}
