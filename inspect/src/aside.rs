//! Output that has to wait for its turn, kept in a temporary file: the report about many small items is larger than the
//! items.

use crate::bounds::Spool;
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};
use tempfile::SpooledTempFile;

/// What is more than this goes to a temporary file.
const IN_MEMORY: usize = 1 << 20;

/// Text put aside.
pub struct Aside {
    file: SpooledTempFile,
    len: u64,
    room: Spool,
}

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aside").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Aside {
    /// Nothing put aside; what will be comes out of `room`.
    pub fn new(room: Spool) -> Self {
        Aside { file: tempfile::spooled_tempfile(IN_MEMORY), len: 0, room }
    }

    /// Bytes put aside.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if nothing was put aside.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets everything.
    pub fn clear(&mut self) -> io::Result<()> {
        self.len = 0;
        self.file.rewind()?;
        self.file.set_len(0)
    }

    /// Writes `len` bytes from `start` on to `out`. Nothing can be put aside after that.
    pub fn copy(&mut self, start: u64, len: u64, out: &mut (impl Write + ?Sized)) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(start))?;
        io::copy(&mut (&mut self.file).take(len), out).map(drop)
    }
}

impl Write for Aside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.room.take(bytes.len() as u64)?;
        let written = self.file.write(bytes)?;
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
