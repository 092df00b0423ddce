//! Where bytes come from: a file that can be skipped in, or a pipe that must be read.

use crate::bounds::{Exceeded, Spool};
use crate::read_at::{ReadAt, read_exact_at};
use qevm_wire::Window;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use tempfile::SpooledData;

/// First read after a jump: enough for a few record headers.
const SMALL_READ: usize = 256;
/// Largest read: large enough to be cheap, small enough to stay in a processor's cache.
const LARGE_READ: usize = 64 << 10;
/// Jumps up to this far are read through: many small reads cost more than one that is not needed.
const NEAR: u64 = 64 << 10;
/// A spool larger than this goes to a file.
const SPOOL_IN_MEMORY: usize = 16 << 20;

/// A window that moves forward over an input.
///
/// The window only grows as far as a caller asks with [`Source::fill`]; what was consumed leaves it. Reads start small
/// after a jump and double while everything is consumed, so that a reader that jumps over pages reads little more than
/// the words between them.
pub struct Source {
    input: Input,
    /// Where a seekable input ends.
    total: Option<u64>,
    /// Offset of a seekable input's first byte.
    base: u64,
    buffer: Vec<u8>,
    /// Range of the buffer that holds bytes not consumed yet.
    start: usize,
    end: usize,
    /// Offset in the input of `buffer[start]`.
    offset: u64,
    read_size: usize,
    ended: bool,
}

enum Input {
    /// Read by position: a jump costs nothing.
    Placed(Arc<dyn ReadAt>),
    Stream(Box<dyn Read>),
}

/// A driver reads from it, and jumps over what is not read.
impl Window for Source {
    fn bytes(&self) -> &[u8] {
        self.window()
    }

    fn fill(&mut self, at_least: usize) -> io::Result<()> {
        Source::fill(self, at_least)
    }

    fn has_ended(&self) -> bool {
        self.at_end()
    }

    fn consume(&mut self, count: usize) {
        Source::consume(self, count);
    }

    fn skip(&mut self, count: u64) -> io::Result<u64> {
        Source::skip(self, count)
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("offset", &self.offset).field("total", &self.total).finish_non_exhaustive()
    }
}

impl Source {
    /// A file: seekable if it is a regular file or a block device.
    pub fn file(mut file: File) -> io::Result<Self> {
        // A pipe or a terminal refuses to seek; an empty regular file does not.
        match file.seek(SeekFrom::End(0)) {
            Ok(len) if file.metadata()?.is_file() || len > 0 => Ok(Self::seekable(Arc::new(file), len)),
            _ => Ok(Self::stream(Box::new(file))),
        }
    }

    /// Something that can only be read to its end.
    pub fn stream(input: Box<dyn Read>) -> Self {
        Self::with(Input::Stream(input), None)
    }

    /// Something of `len` bytes that can be read in any order.
    pub fn seekable(input: Arc<dyn ReadAt>, len: u64) -> Self {
        Self::with(Input::Placed(input), Some(len))
    }

    fn with(input: Input, total: Option<u64>) -> Self {
        let (buffer, start, end) = (Vec::new(), 0, 0);
        Source { input, total, base: 0, buffer, start, end, offset: 0, read_size: LARGE_READ, ended: false }
    }

    /// Offset in the input of the next byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the whole input, if that is known before its end.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// False if the input is known to end within the `len` bytes that come next.
    pub fn holds(&self, len: u64) -> bool {
        self.total.is_none_or(|total| self.offset.saturating_add(len) <= total)
    }

    /// True if the input can be read again from an earlier place.
    pub fn is_seekable(&self) -> bool {
        !matches!(self.input, Input::Stream(_))
    }

    /// The bytes that are there, without reading more.
    pub fn window(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// True once no byte follows those in the window.
    pub fn at_end(&self) -> bool {
        self.ended
    }

    /// Reads until the window has at least `bytes` bytes or the input ends; then [`Source::at_end`] holds.
    pub fn fill(&mut self, bytes: usize) -> io::Result<()> {
        while self.end - self.start < bytes && !self.ended {
            self.read_some(bytes)?;
        }
        Ok(())
    }

    /// Takes `bytes` bytes, at most the window's, from the front of the window.
    pub fn consume(&mut self, bytes: usize) {
        let bytes = bytes.min(self.end - self.start);
        self.start += bytes;
        self.offset += bytes as u64;
    }

    /// Jumps over up to `bytes` bytes and returns how many there were before the input's end.
    pub fn skip(&mut self, bytes: u64) -> io::Result<u64> {
        let held = (self.end - self.start) as u64;
        if bytes <= held {
            self.consume(bytes as usize);
            return Ok(bytes);
        }
        self.consume(held as usize);
        let wanted = bytes - held;
        if let Some(total) = self.total.filter(|_| wanted > NEAR) {
            let jump = wanted.min(total.saturating_sub(self.offset));
            self.offset += jump;
            self.read_size = SMALL_READ;
            self.ended = false;
            return Ok(held + jump);
        }
        let mut left = wanted;
        while left > 0 {
            self.fill(1)?;
            let step = left.min((self.end - self.start) as u64);
            if step == 0 {
                break;
            }
            self.consume(step as usize);
            left -= step;
        }
        Ok(bytes - left)
    }

    /// Goes to `offset`, forwards or backwards.
    ///
    /// # Errors
    /// `Unsupported` if the input is not seekable.
    pub fn jump(&mut self, offset: u64) -> io::Result<()> {
        if offset < self.base || !self.is_seekable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        (self.start, self.end, self.offset, self.ended) = (0, 0, offset, false);
        self.read_size = LARGE_READ;
        Ok(())
    }

    /// Puts everything that is still to come into a temporary file (memory, if it is little), so that it can be jumped
    /// in. Offsets stay as they are; earlier places than the present one are gone.
    ///
    /// # Errors
    /// An [`Exceeded`] if that is more than `most` bytes, or more than `room` has left; others if a file cannot be read
    /// or written.
    pub fn spool(&mut self, room: &Spool, most: u64) -> io::Result<()> {
        let Input::Stream(input) = &mut self.input else {
            return Ok(());
        };
        let mut spool = tempfile::spooled_tempfile(SPOOL_IN_MEMORY);
        let mut piece = std::mem::take(&mut self.buffer);
        let held = self.start..self.end;
        (self.start, self.end) = (0, 0);
        let mut len = 0u64;
        let mut put = |bytes: &[u8]| {
            len += bytes.len() as u64;
            if len > most {
                let message = format!(
                    "more than {most} bytes after the first device section, which no device sections and description take"
                );
                return Err(io::Error::other(Exceeded::new(message)));
            }
            room.take(bytes.len() as u64)?;
            spool.write_all(bytes)
        };
        put(&piece[held])?;
        piece.resize(LARGE_READ.max(piece.len()), 0);
        while !self.ended {
            match input.read(&mut piece) {
                Ok(0) => self.ended = true,
                Ok(read) => put(&piece[..read])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.base = self.offset;
        self.total = Some(self.base + len);
        self.input = Input::Placed(match spool.into_inner() {
            SpooledData::InMemory(bytes) => Arc::new(bytes.into_inner()),
            SpooledData::OnDisk(file) => Arc::new(file),
        });
        self.ended = false;
        Ok(())
    }

    /// How many bytes from `offset` on are a hole of the file, which reads as zeroes. 0 if it is not known.
    pub fn hole_at(&self, offset: u64) -> u64 {
        match (&self.input, self.total) {
            (Input::Placed(input), Some(total)) if (self.base..total).contains(&offset) => {
                input.hole_at(offset - self.base).min(total - offset)
            }
            _ => 0,
        }
    }

    /// How many bytes from `offset` on are no hole. `u64::MAX` if it is not known.
    pub fn data_at(&self, offset: u64) -> u64 {
        match &self.input {
            Input::Placed(input) if offset >= self.base => input.data_at(offset - self.base),
            _ => u64::MAX,
        }
    }

    /// What is read, for others to read in any order, and the offset of its first byte. `None` if it can be read only
    /// once.
    pub fn shared(&self) -> Option<(&Arc<dyn ReadAt>, u64)> {
        match &self.input {
            Input::Placed(input) => Some((input, self.base)),
            Input::Stream(_) => None,
        }
    }

    /// The last bytes of the input, at most `bytes` of them, without moving.
    ///
    /// # Errors
    /// `Unsupported` if the input is not seekable.
    pub fn tail(&self, bytes: u64) -> io::Result<Vec<u8>> {
        let (Input::Placed(input), Some(total)) = (&self.input, self.total) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let start = total.saturating_sub(bytes).max(self.base);
        let mut tail = vec![0; (total - start) as usize];
        read_exact_at(&**input, &mut tail, start - self.base)?;
        Ok(tail)
    }

    fn read_some(&mut self, wanted: usize) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        let missing = wanted.saturating_sub(self.end - self.start);
        let size = self.read_size.max(missing.min(LARGE_READ));
        if self.buffer.len() - self.end < size {
            let held = self.end - self.start;
            // What is held is moved only if at least as much was consumed before it.
            if self.start >= held {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, held);
            }
            if self.buffer.len() - self.end < size {
                self.buffer.resize((self.end + size).max(2 * LARGE_READ), 0);
            }
        }
        let position = self.offset + (self.end - self.start) as u64;
        let room = &mut self.buffer[self.end..self.end + size];
        let read = loop {
            let read = match &mut self.input {
                Input::Placed(input) => input.read_at(room, position - self.base),
                Input::Stream(input) => input.read(room),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.ended = read == 0;
        self.end += read;
        self.read_size = (self.read_size * 2).min(LARGE_READ);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn bytes() -> Vec<u8> {
        (0..1_000_000u32).map(|i| ((i * 31) >> 5) as u8).collect()
    }

    fn walk(mut source: Source) {
        let bytes = bytes();
        let mut at = 0;
        for step in [1usize, 7, 5000, 8, 300_000, 2, 4096, 600_000] {
            source.fill(8).unwrap();
            assert_eq!(source.offset(), at as u64);
            assert_eq!(source.window()[..8], bytes[at..at + 8]);
            assert_eq!(source.skip(step as u64).unwrap(), step as u64);
            at += step;
        }
        assert_eq!(source.skip(1 << 40).unwrap(), (bytes.len() - at) as u64);
        source.fill(1).unwrap();
        assert!(source.window().is_empty() && source.at_end());
        assert_eq!(source.offset(), bytes.len() as u64);
    }

    #[test]
    fn files_and_pipes_read_alike() {
        walk(Source::seekable(Arc::new(bytes()), bytes().len() as u64));
        walk(Source::stream(Box::new(Cursor::new(bytes()))));
    }

    #[test]
    fn the_window_grows_as_far_as_asked() {
        let mut source = Source::stream(Box::new(Cursor::new(bytes())));
        source.fill(900_000).unwrap();
        assert_eq!(source.window()[..900_000], bytes()[..900_000]);
        source.fill(2_000_000).unwrap();
        assert!(source.at_end());
        assert_eq!(source.window(), bytes());
    }

    #[test]
    fn a_file_reads_by_position() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes()).unwrap();
        let mut source = Source::file(file).unwrap();
        assert_eq!(source.total(), Some(1_000_000));
        assert_eq!(source.tail(10).unwrap(), bytes()[999_990..]);
        source.skip(500).unwrap();
        source.jump(3).unwrap();
        source.fill(2).unwrap();
        assert_eq!(source.window()[..2], bytes()[3..5]);
        source.jump(0).unwrap();
        walk(source);
    }

    #[test]
    fn a_spooled_pipe_goes_on_where_it_was() {
        let mut source = Source::stream(Box::new(Cursor::new(bytes())));
        source.fill(1000).unwrap();
        source.consume(700);
        source.spool(&Spool::unlimited(), u64::MAX).unwrap();
        assert_eq!((source.offset(), source.total()), (700, Some(1_000_000)));
        assert_eq!(source.tail(10).unwrap(), bytes()[999_990..]);
        assert_eq!(source.tail(u64::MAX).unwrap().len(), 999_300);
        source.fill(8).unwrap();
        assert_eq!(source.window()[..8], bytes()[700..708]);
        source.skip(500_000).unwrap();
        source.fill(8).unwrap();
        assert_eq!(source.window()[..8], bytes()[500_700..500_708]);
        source.jump(700).unwrap();
        assert!(source.jump(699).is_err());
    }

    #[test]
    fn only_a_seekable_input_goes_back() {
        let mut source = Source::seekable(Arc::new(bytes()), 1_000_000);
        source.skip(500).unwrap();
        source.jump(3).unwrap();
        source.fill(2).unwrap();
        assert_eq!(source.window()[..2], bytes()[3..5]);
        let error = Source::stream(Box::new(Cursor::new(bytes()))).jump(0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}
