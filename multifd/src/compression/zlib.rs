//! Deflate streams: one for the whole channel with `zlib`, one for each page with `qpl`.

use super::{Compression, CompressionError};
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

/// Highest level of `multifd-zlib-level`; the lowest is 0.
pub(super) const MAX_LEVEL: i32 = 9;

/// A deflate stream that is read.
pub(super) struct Inflate {
    stream: Decompress,
    method: Compression,
}

impl Inflate {
    /// A stream with zlib's header, which never ends.
    pub(super) fn zlib() -> Self {
        Inflate { stream: Decompress::new(true), method: Compression::Zlib }
    }

    /// A stream without header.
    pub(super) fn raw() -> Self {
        Inflate { stream: Decompress::new(false), method: Compression::Qpl }
    }

    /// Starts a new stream without header.
    pub(super) fn restart(&mut self) {
        self.stream.reset(false);
    }

    /// Takes from `input` what is needed to fill `output`, and says how much of `output` was filled.
    pub(super) fn fill(&mut self, input: &mut &[u8], output: &mut [u8]) -> Result<usize, CompressionError> {
        let corrupt = |what| CompressionError::Corrupt { method: self.method, what };
        let mut filled = 0;
        while filled < output.len() {
            let (consumed, produced) = (self.stream.total_in(), self.stream.total_out());
            let status = self
                .stream
                .decompress(input, &mut output[filled..], FlushDecompress::Sync)
                .map_err(|_| corrupt("broken deflate stream"))?;
            let (consumed, produced) = (self.stream.total_in() - consumed, self.stream.total_out() - produced);
            *input = input.get(consumed as usize..).unwrap_or_default();
            filled += produced as usize;
            match (status, self.method) {
                (Status::StreamEnd, Compression::Zlib) => return Err(corrupt("the channel's deflate stream ends")),
                (Status::StreamEnd, _) => break,
                _ if consumed == 0 && produced == 0 => break,
                _ => {}
            }
        }
        Ok(filled)
    }
}

/// The deflate stream of a channel that is written.
pub(super) struct Deflate {
    stream: Compress,
}

impl Deflate {
    pub(super) fn new(level: u32) -> Self {
        Deflate { stream: Compress::new(flate2::Compression::new(level), true) }
    }

    /// Appends what there is to send after `page`: with the last page of a packet all of it.
    pub(super) fn page(&mut self, page: &[u8], last: bool, output: &mut Vec<u8>) -> Result<(), CompressionError> {
        let flush = if last { FlushCompress::Sync } else { FlushCompress::None };
        let mut input = page;
        loop {
            // Room for an incompressible page and its flush, so that one call does.
            output.reserve(page.len() + page.len() / 1000 + 64);
            let consumed = self.stream.total_in();
            self.stream.compress_vec(input, output, flush).map_err(|_| CompressionError::Corrupt {
                method: Compression::Zlib,
                what: "the stream was finished",
            })?;
            input = input.get((self.stream.total_in() - consumed) as usize..).unwrap_or_default();
            if input.is_empty() && output.len() < output.capacity() {
                return Ok(());
            }
        }
    }
}
