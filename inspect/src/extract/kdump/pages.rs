//! The pages of a dump: a descriptor for each, and its content.

use super::header::{DESCRIPTOR_LEN, Header, ZLIB, ZSTD};
use super::parts::{Misplaced, PageCompression};
use crate::extract::elf_core::Format;
use crate::output_file::Runs;
use flate2::{Compress, Compression, FlushCompress, Status};
use std::fmt;
use std::fs::File;

/// zstd's fastest level of those that every release has.
const ZSTD_LEVEL: i32 = 1;

/// Writes pages in order.
pub(super) struct Pages<'f> {
    descriptors: Runs<&'f File>,
    next_descriptor: u64,
    contents: Runs<&'f File>,
    end: u64,
    zeroes: Descriptor,
    format: Format,
    compressor: Compressor,
    /// A compressed page, which is shorter than the page.
    packed: Vec<u8>,
    /// Descriptors of a run.
    written: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    offset: u64,
    len: u32,
    flags: u32,
}

enum Compressor {
    Zlib(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl fmt::Debug for Pages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("end", &self.end).finish_non_exhaustive()
    }
}

impl<'f> Pages<'f> {
    /// Writes the page that those of zeroes share.
    pub(super) fn new(
        file: &'f File,
        format: Format,
        compression: PageCompression,
        header: &Header,
        frame_size: u64,
    ) -> Result<Self, Misplaced> {
        let compressor = match compression {
            PageCompression::Zlib => Compressor::Zlib(Compress::new(Compression::fast(), true)),
            PageCompression::Zstd => {
                Compressor::Zstd(zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|error| (header.contents, error))?)
            }
        };
        let mut contents = Runs::new(file);
        contents.put(header.contents, &vec![0; frame_size as usize])?;
        Ok(Pages {
            descriptors: Runs::new(file),
            next_descriptor: header.descriptors,
            contents,
            end: header.contents + frame_size,
            zeroes: Descriptor { offset: header.contents, len: frame_size as u32, flags: 0 },
            format,
            compressor,
            packed: vec![0; frame_size as usize - 1],
            written: Vec::new(),
        })
    }

    /// The next page.
    pub(super) fn page(&mut self, page: &[u8]) -> Result<(), Misplaced> {
        if page.iter().all(|byte| *byte == 0) {
            return self.zeroes(1);
        }
        let (flags, packed) = self.compressor.compress(page, &mut self.packed);
        let content = packed.map_or(page, |len| &self.packed[..len]);
        let flags = if packed.is_some() { flags } else { 0 };
        let descriptor = Descriptor { offset: self.end, len: content.len() as u32, flags };
        self.contents.put(self.end, content)?;
        self.end += content.len() as u64;
        self.describe(descriptor, 1)
    }

    /// The next pages, which are zeroes.
    pub(super) fn zeroes(&mut self, mut pages: u64) -> Result<(), Misplaced> {
        while pages > 0 {
            let now = pages.min(4096);
            self.describe(self.zeroes, now)?;
            pages -= now;
        }
        Ok(())
    }

    /// Writes what is held; the offset at which the file ends.
    pub(super) fn finish(mut self) -> Result<u64, Misplaced> {
        self.descriptors.flush()?;
        self.contents.flush()?;
        Ok(self.end)
    }

    fn describe(&mut self, descriptor: Descriptor, times: u64) -> Result<(), Misplaced> {
        self.written.clear();
        for _ in 0..times {
            self.format.long(&mut self.written, descriptor.offset);
            self.format.words(&mut self.written, [descriptor.len, descriptor.flags]);
            self.format.long(&mut self.written, 0);
        }
        self.descriptors.put(self.next_descriptor, &self.written)?;
        self.next_descriptor += times * DESCRIPTOR_LEN;
        Ok(())
    }
}

impl Compressor {
    /// The flag of pages that are compressed so, and the length of `page` in `packed`, if it has room there.
    fn compress(&mut self, page: &[u8], packed: &mut [u8]) -> (u32, Option<usize>) {
        match self {
            Compressor::Zlib(zlib) => {
                zlib.reset();
                let done = matches!(zlib.compress(page, packed, FlushCompress::Finish), Ok(Status::StreamEnd));
                (ZLIB, done.then(|| zlib.total_out() as usize))
            }
            Compressor::Zstd(zstd) => (ZSTD, zstd.compress_to_buffer(page, packed).ok()),
        }
    }
}
