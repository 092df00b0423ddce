//! Deflate streams: one for the whole channel with `zlib`, one for each page with `qpl`.

use super::incompressible::looks_random;
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
    pub(super) fn zlib() -> Result<Self, CompressionError> {
        Ok(Inflate { stream: Decompress::new(true), method: Compression::Zlib })
    }

    /// A stream without header.
    pub(super) fn raw() -> Result<Self, CompressionError> {
        Ok(Inflate { stream: Decompress::new(false), method: Compression::Qpl })
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

/// The zlib stream of a channel that is written. It never ends, so its checksum is never due, and the deflate blocks in
/// it may come from wherever they are made.
pub(super) struct Deflate {
    stream: Compress,
    level: u32,
    started: bool,
    /// `stream` has pages that it has not written.
    waiting: bool,
    /// The reader has had bytes that `stream` does not know, so what it could refer back to is elsewhere.
    passed_by: bool,
}

/// What a sync flush appends: a stored block without bytes.
const FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];
/// The most bytes of a stored block (RFC 1951, 3.2.4).
const STORED_MAX: usize = 0xffff;

impl Deflate {
    pub(super) fn new(level: u32) -> Result<Self, CompressionError> {
        let stream = Compress::new(flate2::Compression::new(level), false);
        Ok(Deflate { stream, level, started: false, waiting: false, passed_by: false })
    }

    /// Appends what there is to send after `page`: with the last page of a packet all of it.
    ///
    /// Noise is stored: looking for matches in it takes longer than everything else, and finds none.
    pub(super) fn page(&mut self, page: &[u8], last: bool, output: &mut Vec<u8>) -> Result<(), CompressionError> {
        if !std::mem::replace(&mut self.started, true) {
            output.extend_from_slice(&header(self.level));
        }
        if self.level == 0 || looks_random(page) {
            self.store(page, output)?;
            if last {
                output.extend_from_slice(&FLUSH);
            }
            return Ok(());
        }
        if std::mem::take(&mut self.passed_by) {
            self.stream.reset();
        }
        self.waiting = !last;
        self.compress(page, if last { FlushCompress::Sync } else { FlushCompress::None }, output)
    }

    /// Appends a page as it is, in blocks that begin and end with a byte as everything does after a flush.
    fn store(&mut self, page: &[u8], output: &mut Vec<u8>) -> Result<(), CompressionError> {
        if std::mem::take(&mut self.waiting) {
            self.compress(&[], FlushCompress::Sync, output)?;
        }
        for bytes in page.chunks(STORED_MAX) {
            let len = bytes.len() as u16;
            output.push(0);
            output.extend_from_slice(&len.to_le_bytes());
            output.extend_from_slice(&(!len).to_le_bytes());
            output.extend_from_slice(bytes);
        }
        self.passed_by = true;
        Ok(())
    }

    fn compress(
        &mut self,
        mut input: &[u8],
        flush: FlushCompress,
        output: &mut Vec<u8>,
    ) -> Result<(), CompressionError> {
        loop {
            // Room for a page and its flush, so that one call does.
            output.reserve(input.len() + input.len() / 1000 + 64);
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

/// CMF and FLG (RFC 1950, 2.2): deflate with a window of 32 KiB, and roughly the level.
fn header(level: u32) -> [u8; 2] {
    match level {
        0 | 1 => [0x78, 0x01],
        2..=5 => [0x78, 0x5e],
        6 => [0x78, 0x9c],
        _ => [0x78, 0xda],
    }
}
