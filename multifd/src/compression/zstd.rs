//! Zstandard: one frame for the whole channel.

use super::{Compression, CompressionError};
use zstd::stream::raw::{Decoder, Encoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

/// Highest level of `multifd-zstd-level`; the lowest is 0, which is zstd's default level.
pub(super) const MAX_LEVEL: i32 = 20;
/// log2 of the largest window that is accepted: what level 20 uses for a stream of unknown length.
const WINDOW_LOG_MAX: u32 = 25;

/// The frame of a channel that is read.
pub(super) struct ZstdStream {
    stream: Decoder<'static>,
}

impl ZstdStream {
    pub(super) fn new() -> Result<Self, CompressionError> {
        let mut stream = Decoder::new().map_err(|_| corrupt("no memory for its context"))?;
        let window = DParameter::WindowLogMax(WINDOW_LOG_MAX);
        stream.set_parameter(window).map_err(|_| corrupt("the library refuses its window"))?;
        Ok(ZstdStream { stream })
    }

    /// Takes from `input` what is needed to fill `output`, and says how much of `output` was filled.
    pub(super) fn fill(&mut self, input: &mut &[u8], output: &mut [u8]) -> Result<usize, CompressionError> {
        let mut to = OutBuffer::around(output);
        while to.pos() < to.capacity() {
            let (mut from, produced) = (InBuffer::around(input), to.pos());
            self.stream.run(&mut from, &mut to).map_err(|_| corrupt("broken or oversized frame"))?;
            let consumed = from.pos();
            *input = input.get(consumed..).unwrap_or_default();
            if consumed == 0 && to.pos() == produced {
                break;
            }
        }
        Ok(to.pos())
    }
}

/// The frame of a channel that is written.
pub(super) struct ZstdEncoder {
    stream: Encoder<'static>,
}

impl ZstdEncoder {
    pub(super) fn new(level: i32) -> Result<Self, CompressionError> {
        Ok(ZstdEncoder { stream: Encoder::new(level).map_err(|_| corrupt("no memory for its context"))? })
    }

    /// Appends what there is to send after `page`: with the last page of a packet all of it.
    pub(super) fn page(&mut self, page: &[u8], last: bool, output: &mut Vec<u8>) -> Result<(), CompressionError> {
        let broken = |_| corrupt("the library failed");
        let mut input = InBuffer::around(page);
        while input.pos() < page.len() {
            append(output, |to| self.stream.run(&mut input, to)).map_err(broken)?;
        }
        while last && append(output, |to| self.stream.flush(to)).map_err(broken)? > 0 {}
        Ok(())
    }
}

/// Runs an operation with room after the content of `output`.
fn append<T>(
    output: &mut Vec<u8>,
    operation: impl FnOnce(&mut OutBuffer<'_, Vec<u8>>) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let len = output.len();
    output.reserve(zstd::zstd_safe::CCtx::out_size());
    operation(&mut OutBuffer::around_pos(output, len))
}

fn corrupt(what: &'static str) -> CompressionError {
    CompressionError::Corrupt { method: Compression::Zstd, what }
}
