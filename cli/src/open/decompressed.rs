//! Whose fault it is when a compressed input cannot be read on.

use crate::bounds::Exceeded;
use std::fmt;
use std::io::{self, ErrorKind, Read};

/// What `xz` may ask for: its own presets need up to 65 MiB.
pub(super) const XZ_MEMORY_KIB: u32 = 1 << 20;

/// A decompressor whose errors say whether the compressed data is damaged (`InvalidData`), ends early (`UnexpectedEof`) or
/// asks for too much memory ([`Exceeded`]). The decompressors have other kinds for that, each its own. What the
/// operating system says stays as it is.
pub(super) struct Decompressed {
    pub(super) reader: Box<dyn Read>,
    /// What has compressed it.
    pub(super) program: &'static str,
}

impl fmt::Debug for Decompressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressed").field("program", &self.program).finish_non_exhaustive()
    }
}

impl Read for Decompressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer).map_err(|error| self.blame(error))
    }
}

impl Decompressed {
    fn blame(&self, error: io::Error) -> io::Error {
        let program = self.program;
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
}
