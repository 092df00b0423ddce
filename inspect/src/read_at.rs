//! Reading at any place, by any number of threads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that can be read in any order, by several threads at once.
pub trait ReadAt: Send + Sync {
    /// Reads some of the bytes from `offset` on into `buffer`, and says how many; 0 only at the end.
    ///
    /// # Errors
    /// What the operating system says; [`io::ErrorKind::InvalidData`] and [`io::ErrorKind::UnexpectedEof`] of what the
    /// bytes are gathered from.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// How many bytes from `offset` on are a hole, which reads as zeroes. 0 if it is not known.
    fn hole_at(&self, _offset: u64) -> u64 {
        0
    }

    /// How many bytes from `offset` on are no hole. `u64::MAX` if it is not known.
    fn data_at(&self, _offset: u64) -> u64 {
        u64::MAX
    }

    /// Something that is different after a write to them; `None` where none is possible.
    ///
    /// # Errors
    /// What the operating system says.
    fn stamp(&self) -> io::Result<Option<Stamp>> {
        Ok(None)
    }
}

/// What changes with a file: its length and the time of its last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    len: u64,
    modified: (i64, i64),
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // The operating system has another error for places that no file can have.
        if i64::try_from(offset).is_err() {
            return Ok(0);
        }
        FileExt::read_at(self, buffer, offset)
    }

    fn hole_at(&self, offset: u64) -> u64 {
        match rustix::fs::seek(self, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data.saturating_sub(offset),
            // No data up to the end.
            Err(rustix::io::Errno::NXIO) => u64::MAX,
            // A file system that does not tell.
            Err(_) => 0,
        }
    }

    fn data_at(&self, offset: u64) -> u64 {
        rustix::fs::seek(self, rustix::fs::SeekFrom::Hole(offset)).map_or(u64::MAX, |hole| hole.saturating_sub(offset))
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.metadata()?;
        Ok(Some(Stamp { len: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }))
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

/// Fills `buffer` with the bytes from `offset` on.
///
/// # Errors
/// As [`ReadAt::read_at`]; [`io::ErrorKind::UnexpectedEof`] if there are fewer.
pub fn read_exact_at(input: &(impl ReadAt + ?Sized), buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read_at(&mut buffer[filled..], offset.saturating_add(filled as u64)) {
            Ok(0) => {
                let message = format!("the input ends here: {} bytes expected, {filled} left", buffer.len());
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
