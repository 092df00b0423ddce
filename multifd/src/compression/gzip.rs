//! Packets one by one: `qatzip`, whose blocks are gzip members with an extra field.

use super::{Compression, CompressionError};
use flate2::read::MultiGzDecoder;
use std::io::Read;

const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The pages of one payload, as gzip members one after the other.
pub(super) struct GzipPacket<'a> {
    members: MultiGzDecoder<&'a [u8]>,
}

impl<'a> GzipPacket<'a> {
    pub(super) fn new(payload: &'a [u8]) -> Result<Self, CompressionError> {
        if !payload.starts_with(&MAGIC) {
            let what = "a block that is no gzip member";
            return Err(CompressionError::Hardware { method: Compression::Qatzip, what });
        }
        Ok(GzipPacket { members: MultiGzDecoder::new(payload) })
    }

    /// Fills `output`, and says how much of it was filled.
    pub(super) fn fill(&mut self, output: &mut [u8]) -> Result<usize, CompressionError> {
        let mut filled = 0;
        while filled < output.len() {
            match self.members.read(&mut output[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(_) => {
                    let what = "broken gzip member";
                    return Err(CompressionError::Corrupt { method: Compression::Qatzip, what });
                }
            }
        }
        Ok(filled)
    }
}
