//! The contents of guest memory, in an unlinked sparse temporary file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of consecutive pages that are gathered before they are written.
const RUN_BYTES: usize = 1 << 20;

/// A sparse file that disappears with the process. What was never written reads as zeroes.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    end: u64,
    run_start: u64,
    run: Vec<u8>,
}

impl Image {
    /// An empty image in the directory for temporary files (`TMPDIR`).
    pub(super) fn new() -> io::Result<Self> {
        Ok(Image { file: tempfile::tempfile()?, end: 0, run_start: 0, run: Vec::with_capacity(RUN_BYTES) })
    }

    /// Writes `bytes` at `offset`.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.run_start + self.run.len() as u64 != offset || self.run.len() + bytes.len() > RUN_BYTES {
            self.flush()?;
            self.run_start = offset;
        }
        self.run.extend_from_slice(bytes);
        Ok(())
    }

    /// Fills `bytes` from `offset` on.
    pub(super) fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.flush()?;
        // Behind the end of the file nothing was ever written.
        let inside = (bytes.len() as u64).min(self.end.saturating_sub(offset)) as usize;
        let (inside, outside) = bytes.split_at_mut(inside);
        self.file.read_exact_at(inside, offset)?;
        outside.fill(0);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.run.is_empty() {
            self.file.write_all_at(&self.run, self.run_start)?;
            self.end = self.end.max(self.run_start + self.run.len() as u64);
            self.run.clear();
        }
        Ok(())
    }
}
