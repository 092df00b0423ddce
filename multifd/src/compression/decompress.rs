//! From payloads to pages.

use super::gzip::GzipPacket;
use super::lengths::PageLengths;
use super::zlib::Inflate;
use super::zstd::ZstdStream;
use super::{Compression, CompressionError};
use qevm_wire::PageGeometry;

/// Turns the payloads of one channel into pages. `zlib` and `zstd` carry on from packet to packet, so there is one
/// decompressor for each channel, and it must see every payload in order. After an error it gives that error for ever.
///
/// `qpl` payloads are raw deflate and are inflated in software; `qatzip` payloads are read as far as they are gzip
/// members; of `uadk` only the pages that it left uncompressed can be read.
///
/// Memory: the window of the method, at most 32 KiB with `zlib` and 32 MiB with `zstd` (what QEMU's highest level
/// needs). Never more bytes come out than the caller has room for.
///
/// ```
/// use qevm_multifd::{Compression, compression::{Compressor, Decompressor}};
/// use qevm_wire::PageGeometry;
///
/// let (first, second) = ([0x11; 4096], [0x22; 4096]);
/// let mut payload = Vec::new();
/// Compressor::new(Compression::Zlib, Some(1))?.packet([&first[..], &second[..]], &mut payload)?;
///
/// let mut decompressor = Decompressor::new(Compression::Zlib, PageGeometry::X86)?;
/// let mut memory = [0; 8192];
/// let mut packet = decompressor.packet(&payload, 2)?;
/// packet.fill(&mut memory[..4096])?; // page by page, or run by run
/// packet.fill(&mut memory[4096..])?;
/// packet.finish()?;
/// assert_eq!(memory[4095..4097], [0x11, 0x22]);
/// # Ok::<(), qevm_multifd::CompressionError>(())
/// ```
#[derive(Debug)]
pub struct Decompressor {
    method: Compression,
    page_size: usize,
    state: State,
    /// The error that is given for ever.
    failed: Option<CompressionError>,
    /// A packet was begun and not finished.
    begun: bool,
}

enum State {
    Stored,
    Zlib(Inflate),
    Zstd(ZstdStream),
    /// Pages one by one; the context inflates the raw deflate of `qpl`.
    PageByPage(Option<Inflate>),
    Gzip,
}

impl core::fmt::Debug for State {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("decompression context")
    }
}

impl Decompressor {
    /// A decompressor for a channel from its first payload.
    ///
    /// # Errors
    /// [`CompressionError::Corrupt`] if the library has no memory for its context; [`CompressionError::NotBuilt`] if it
    /// was left out.
    pub fn new(method: Compression, pages: PageGeometry) -> Result<Self, CompressionError> {
        let state = match method {
            Compression::None => State::Stored,
            Compression::Zlib => State::Zlib(Inflate::zlib()?),
            Compression::Zstd => State::Zstd(ZstdStream::new()?),
            Compression::Qpl => State::PageByPage(Some(Inflate::raw()?)),
            Compression::Uadk => State::PageByPage(None),
            Compression::Qatzip => State::Gzip,
        };
        Ok(Decompressor { method, page_size: pages.size() as usize, state, failed: None, begun: false })
    }

    /// The method.
    pub fn method(&self) -> Compression {
        self.method
    }

    /// Starts with the payload of a packet with `pages` normal pages.
    ///
    /// # Errors
    /// The error of an earlier packet; [`CompressionError::Order`] if that was not [finished](PacketPages::finish);
    /// [`CompressionError::PageLength`], [`CompressionError::LeftOver`] and
    /// [`CompressionError::Length`] for the lengths in front of `qpl` and `uadk` data; [`CompressionError::Hardware`]
    /// for `qatzip` payloads that are not gzip; [`CompressionError::NotBuilt`] for all of them without feature `zlib`.
    pub fn packet<'a>(&'a mut self, payload: &'a [u8], pages: u32) -> Result<PacketPages<'a>, CompressionError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.begun {
            let error =
                CompressionError::Order { what: "a payload", place: "comes before the one before it was finished" };
            return Err(self.failed.insert(error).clone());
        }
        // Without pages there is nothing to finish.
        self.begun = pages > 0;
        let expected = u64::from(pages) * self.page_size as u64;
        let source = match &mut self.state {
            State::Stored => Ok(Source::Stored(payload)),
            State::Zlib(stream) => Ok(Source::Zlib { stream, input: payload }),
            State::Zstd(stream) => Ok(Source::Zstd { stream, input: payload }),
            State::PageByPage(inflate) => PageLengths::new(payload, pages, self.page_size)
                .map(|pages| Source::PageByPage { pages, inflate: inflate.as_mut(), method: self.method }),
            State::Gzip => GzipPacket::new(payload).map(|packet| Source::Gzip(Box::new(packet))),
        };
        match source {
            Ok(source) => {
                let (failed, begun, page_size) = (&mut self.failed, &mut self.begun, self.page_size);
                Ok(PacketPages { source, failed, begun, page_size, filled: 0, expected, len: payload.len() as u64 })
            }
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }
}

/// The pages of one payload, to be taken in order with [`fill`](PacketPages::fill).
#[derive(Debug)]
pub struct PacketPages<'a> {
    source: Source<'a>,
    failed: &'a mut Option<CompressionError>,
    begun: &'a mut bool,
    page_size: usize,
    filled: u64,
    expected: u64,
    len: u64,
}

enum Source<'a> {
    Stored(&'a [u8]),
    Zlib { stream: &'a mut Inflate, input: &'a [u8] },
    Zstd { stream: &'a mut ZstdStream, input: &'a [u8] },
    PageByPage { pages: PageLengths<'a>, inflate: Option<&'a mut Inflate>, method: Compression },
    Gzip(Box<GzipPacket<'a>>),
}

impl core::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("payload")
    }
}

impl PacketPages<'_> {
    /// Fills `pages`, whose length is a number of whole pages, with the next of the packet.
    ///
    /// # Errors
    /// [`CompressionError::Corrupt`] and [`CompressionError::Hardware`]; [`CompressionError::Length`] if the payload
    /// has less; [`CompressionError::Order`] if more is asked for than the packet has pages, or a part of one.
    pub fn fill(&mut self, pages: &mut [u8]) -> Result<(), CompressionError> {
        self.healthy()?;
        self.try_fill(pages).map_err(|error| self.failed.insert(error).clone())
    }

    /// Checks that all pages were taken and that the payload has nothing more.
    ///
    /// # Errors
    /// That of [`fill`](Self::fill) if it failed; [`CompressionError::Length`] and [`CompressionError::LeftOver`] if
    /// there is more; [`CompressionError::Order`] if not all pages were taken.
    pub fn finish(mut self) -> Result<(), CompressionError> {
        self.healthy()?;
        self.try_finish().map_err(|error| self.failed.insert(error).clone())?;
        *self.begun = false;
        Ok(())
    }

    fn healthy(&self) -> Result<(), CompressionError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn try_fill(&mut self, pages: &mut [u8]) -> Result<(), CompressionError> {
        let wanted = self.filled + pages.len() as u64;
        if wanted > self.expected {
            return Err(CompressionError::Order { what: "more pages", place: "are asked for than the packet has" });
        }
        if !pages.len().is_multiple_of(self.page_size) {
            return Err(CompressionError::Order { what: "a part of a page", place: "is asked for" });
        }
        let filled = match &mut self.source {
            Source::Stored(input) => match input.split_at_checked(pages.len()) {
                Some((data, rest)) => {
                    pages.copy_from_slice(data);
                    *input = rest;
                    pages.len()
                }
                None => input.len(),
            },
            Source::Zlib { stream, input } => stream.fill(input, pages)?,
            Source::Zstd { stream, input } => stream.fill(input, pages)?,
            Source::Gzip(packet) => packet.fill(pages)?,
            Source::PageByPage { pages: lengths, inflate, method } => {
                for page in pages.chunks_exact_mut(self.page_size) {
                    lengths.page(page, inflate.as_deref_mut(), *method)?;
                }
                pages.len()
            }
        };
        self.filled += filled as u64;
        if filled < pages.len() {
            return Err(CompressionError::Length { found: self.filled, expected: self.expected });
        }
        Ok(())
    }

    fn try_finish(&mut self) -> Result<(), CompressionError> {
        if self.filled != self.expected {
            return Err(CompressionError::Order {
                what: "the end of a packet",
                place: "comes before all its pages were taken",
            });
        }
        let mut probe = [0];
        let (more, left) = match &mut self.source {
            Source::Stored(input) => (0, input.len()),
            Source::Zlib { stream, input } => (stream.fill(input, &mut probe)?, input.len()),
            Source::Zstd { stream, input } => (stream.fill(input, &mut probe)?, input.len()),
            Source::Gzip(packet) => (packet.fill(&mut probe)?, 0),
            // Each page has used up its data, and their lengths were added up before.
            Source::PageByPage { .. } => (0, 0),
        };
        if more > 0 {
            return Err(CompressionError::Length { found: self.expected + more as u64, expected: self.expected });
        }
        if left > 0 {
            return Err(CompressionError::LeftOver { left: left as u64, len: self.len });
        }
        Ok(())
    }
}
