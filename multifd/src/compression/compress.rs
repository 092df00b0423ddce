//! From pages to payloads.

use super::zlib::{self, Deflate};
use super::zstd::{self, ZstdEncoder};
use super::{Compression, CompressionError};

/// Turns pages into the payloads of one channel. `zlib` and `zstd` carry on from packet to packet, so there is one
/// compressor for each channel, and every payload it makes must be sent.
///
/// As QEMU does, pages are compressed one after the other and flushed with the last of each packet, so that every
/// payload can be read as soon as it has arrived; the stream itself never ends.
///
/// The memory of a running guest may change while it is read. Compress from a copy of the pages: a deflate stream
/// made from changing bytes can be broken.
pub struct Compressor {
    method: Compression,
    state: State,
}

enum State {
    Stored,
    Zlib(Deflate),
    Zstd(ZstdEncoder),
}

impl core::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Compressor").field("method", &self.method).finish_non_exhaustive()
    }
}

/// Default of `multifd-zlib-level` and `multifd-zstd-level`.
const DEFAULT_LEVEL: i32 = 1;

impl Compressor {
    /// A compressor for a channel from its first payload. `level` is `multifd-zlib-level` (0 to 9) or
    /// `multifd-zstd-level` (0 to 20), and 1 where it is left out.
    ///
    /// # Errors
    /// [`CompressionError::Level`]; [`CompressionError::Hardware`] for methods that cannot be written here;
    /// [`CompressionError::NotBuilt`] for those whose library was left out.
    pub fn new(method: Compression, level: Option<i32>) -> Result<Self, CompressionError> {
        let level = level.unwrap_or(DEFAULT_LEVEL);
        let checked = |max| match u32::try_from(level) {
            Ok(level) if level <= max as u32 => Ok(level),
            _ => Err(CompressionError::Level { method, found: level, min: 0, max }),
        };
        let state = match method {
            Compression::None => State::Stored,
            Compression::Zlib => State::Zlib(Deflate::new(checked(zlib::MAX_LEVEL)?)?),
            Compression::Zstd => {
                checked(zstd::MAX_LEVEL)?;
                State::Zstd(ZstdEncoder::new(level)?)
            }
            Compression::Qpl | Compression::Uadk | Compression::Qatzip => {
                return Err(CompressionError::Hardware { method, what: "no accelerator is used here to write it" });
            }
        };
        Ok(Compressor { method, state })
    }

    /// The method.
    pub fn method(&self) -> Compression {
        self.method
    }

    /// Appends to `payload` what there is to send of the next page; `last` says that it is the last of its packet.
    ///
    /// # Errors
    /// [`CompressionError::Corrupt`] if the compression library fails, which none does on memory.
    pub fn page(&mut self, page: &[u8], last: bool, payload: &mut Vec<u8>) -> Result<(), CompressionError> {
        match &mut self.state {
            State::Stored => payload.extend_from_slice(page),
            State::Zlib(stream) => stream.page(page, last, payload)?,
            State::Zstd(stream) => stream.page(page, last, payload)?,
        }
        Ok(())
    }

    /// Appends the payload of a packet with these normal pages.
    ///
    /// # Errors
    /// As [`page`](Self::page).
    pub fn packet<'p>(
        &mut self,
        pages: impl IntoIterator<Item = &'p [u8]>,
        payload: &mut Vec<u8>,
    ) -> Result<(), CompressionError> {
        let mut pages = pages.into_iter().peekable();
        while let Some(page) = pages.next() {
            self.page(page, pages.peek().is_none(), payload)?;
        }
        Ok(())
    }
}
