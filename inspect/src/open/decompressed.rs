//! Compressed inputs: members one after the other, what follows the last of them, and whose fault it is when one cannot
//! be read on.

use crate::bounds::Exceeded;
use qevm_savevm::container::Compression;
use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::rc::Rc;

/// What `xz` may ask for: its own presets need up to 65 MiB.
const XZ_MEMORY_KIB: u32 = 1 << 20;
/// Enough to see all magics.
const MAGIC_LEN: usize = 6;

/// True once bytes were seen after compressed data that are none.
pub(super) type Trailing = Rc<Cell<bool>>;

type Input = BufReader<Box<dyn Read>>;

/// A decompressor whose errors say whether the compressed data is damaged (`InvalidData`), ends early (`UnexpectedEof`)
/// or asks for too much memory ([`Exceeded`]). The decompressors have other kinds for that, each its own. What the
/// operating system says stays as it is.
///
/// Compressed data may be in several members, as `cat a.gz b.gz` makes it. What follows the last member and starts none
/// is not read: a volume is longer than what was put into it.
pub(super) struct Decompressed {
    member: Member,
    compression: Compression,
    trailing: Trailing,
}

enum Member {
    Gzip(Box<flate2::bufread::GzDecoder<Input>>),
    Bzip2(Box<bzip2::bufread::BzDecoder<Input>>),
    Xz(Box<lzma_rust2::XzReader<Input>>),
    Zstd(Box<zstd::Decoder<'static, Input>>),
    Lz4(Box<lz4_flex::frame::FrameDecoder<Watched>>),
    /// All was read, or the next member could not be begun.
    Ended,
}

/// An input that knows whether its end was met. The decoder of lz4 takes an input that ends before the mark at the end
/// of the frame for a whole one; but a reader that has seen that mark stops.
struct Watched {
    input: Input,
    ended: bool,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.ended |= read == 0 && !buffer.is_empty();
        Ok(read)
    }
}

impl fmt::Debug for Decompressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressed").field("compression", &self.compression).finish_non_exhaustive()
    }
}

impl Decompressed {
    /// Reads `input`, which starts with compressed data. `None` for a compression that is not supported.
    pub(super) fn new(
        input: Box<dyn Read>,
        compression: Compression,
        trailing: Trailing,
    ) -> io::Result<Option<Decompressed>> {
        let member = Member::begin(BufReader::new(input), compression)?;
        Ok(member.map(|member| Decompressed { member, compression, trailing }))
    }

    fn blame(&self, error: io::Error) -> io::Error {
        let program = self.compression.as_str();
        if error.raw_os_error().is_some() || error.kind() == ErrorKind::Interrupted {
            return error;
        }
        // zstd has no kinds, but this text.
        let text = error.to_string();
        match error.kind() {
            ErrorKind::UnexpectedEof => {
                io::Error::new(ErrorKind::UnexpectedEof, format!("the compressed data ({program}) ends early"))
            }
            _ if error.kind() == ErrorKind::OutOfMemory || text.contains("too much memory") => {
                let message =
                    format!("the compressed data asks for too much memory: decompress it with `{program} -dc` first");
                io::Error::other(Exceeded::new(message))
            }
            _ => io::Error::new(ErrorKind::InvalidData, format!("the compressed data ({program}) is damaged: {text}")),
        }
    }

    /// A member is over: begins the next one, if there is one.
    fn next_member(&mut self) -> io::Result<()> {
        let Some(mut input) = std::mem::replace(&mut self.member, Member::Ended).end() else { return Ok(()) };
        // Between members of xz, zeroes fill up to multiples of four.
        let mut seen_zeroes = false;
        if self.compression == Compression::Xz {
            while let Some(zeroes) = leading_zeroes(input.fill_buf()?) {
                input.consume(zeroes);
                seen_zeroes = true;
            }
        }
        let mut first = Vec::with_capacity(MAGIC_LEN);
        input.by_ref().take(MAGIC_LEN as u64).read_to_end(&mut first)?;
        if !starts_member(&first, self.compression) {
            self.trailing.set(seen_zeroes || !first.is_empty());
            return Ok(());
        }
        let input: Box<dyn Read> = Box::new(io::Cursor::new(first).chain(input));
        self.member = Member::begin(BufReader::new(input), self.compression)?.unwrap_or(Member::Ended);
        Ok(())
    }
}

impl Read for Decompressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match &mut self.member {
                Member::Gzip(reader) => reader.read(buffer),
                Member::Bzip2(reader) => reader.read(buffer),
                Member::Xz(reader) => reader.read(buffer),
                Member::Zstd(reader) => reader.read(buffer),
                Member::Lz4(reader) => match reader.read(buffer) {
                    Ok(0) if reader.get_ref().ended => Err(ErrorKind::UnexpectedEof.into()),
                    read => read,
                },
                Member::Ended => return Ok(0),
            };
            match read {
                Ok(0) if !buffer.is_empty() => self.next_member().map_err(|error| self.blame(error))?,
                read => return read.map_err(|error| self.blame(error)),
            }
        }
    }
}

impl Member {
    fn begin(input: Input, compression: Compression) -> io::Result<Option<Self>> {
        Ok(Some(match compression {
            Compression::Gzip => Member::Gzip(Box::new(flate2::bufread::GzDecoder::new(input))),
            Compression::Bzip2 => Member::Bzip2(Box::new(bzip2::bufread::BzDecoder::new(input))),
            Compression::Xz => Member::Xz(Box::new(lzma_rust2::XzReader::new_mem_limit(input, false, XZ_MEMORY_KIB))),
            Compression::Zstd => Member::Zstd(Box::new(zstd::Decoder::with_buffer(input)?.single_frame())),
            Compression::Lz4 => {
                Member::Lz4(Box::new(lz4_flex::frame::FrameDecoder::new(Watched { input, ended: false })))
            }
            _ => return Ok(None),
        }))
    }

    /// What comes after the member.
    fn end(self) -> Option<Input> {
        Some(match self {
            Member::Gzip(reader) => reader.into_inner(),
            Member::Bzip2(reader) => reader.into_inner(),
            Member::Xz(reader) => reader.into_inner(),
            Member::Zstd(reader) => reader.finish(),
            Member::Lz4(reader) => reader.into_inner().input,
            Member::Ended => return None,
        })
    }
}

/// How many zeroes `bytes` start with; `None` for none.
fn leading_zeroes(bytes: &[u8]) -> Option<usize> {
    let zeroes = bytes.iter().take_while(|byte| **byte == 0).count();
    (zeroes > 0).then_some(zeroes)
}

/// The bytes after a member start another one: RFC 1952, RFC 8878 (a frame, or one to be skipped), and the magics of
/// bzip2, xz and lz4.
fn starts_member(first: &[u8], compression: Compression) -> bool {
    match compression {
        Compression::Gzip => first.starts_with(&[0x1f, 0x8b, 8]),
        Compression::Bzip2 => first.starts_with(b"BZh") && matches!(first.get(3), Some(b'1'..=b'9')),
        Compression::Xz => first.starts_with(b"\xfd7zXZ\0"),
        Compression::Zstd => {
            first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || matches!(first, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
        }
        Compression::Lz4 => first.starts_with(&[0x04, 0x22, 0x4d, 0x18]),
        _ => false,
    }
}
