//! Pages that are written to a file as they come, so that they are read once.

use crate::failure::{Elsewhere, Error, Failure};
use crate::output_file::Runs;
use std::fs::File;
use std::io;

/// Shorter stretches of zeroes are written; longer ones become holes.
const HOLE: u64 = 64 << 10;
const ZEROES: [u8; 4096] = [0; 4096];

/// A stretch of a RAM block, and where in a file it goes. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Destination {
    /// Number of the block.
    pub block: usize,
    /// Where in the block it starts.
    pub block_offset: u64,
    /// Its length.
    pub len: u64,
    /// Where in the file it goes.
    pub file_offset: u64,
}

impl Destination {
    fn end(&self) -> u64 {
        self.block_offset.saturating_add(self.len)
    }
}

/// Writes pages to their places in a file, each time they come: what comes later takes the place of what came before.
///
/// Whoever reads a migration may not know yet where its memory goes in the end. If that turns out to be elsewhere, the
/// file is emptied and the memory is read once more.
#[derive(Debug)]
pub struct PageCopy {
    runs: Runs<File>,
    /// As errors call the file.
    name: String,
    /// In order. None if what was copied is not to be used.
    destinations: Vec<Destination>,
}

impl PageCopy {
    /// Copies to `file`, which is called `name` in errors and is empty up to now. `None` if a part of a block has more
    /// than one destination.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn new(file: &File, name: &str, mut destinations: Vec<Destination>) -> io::Result<Option<Self>> {
        destinations.sort_unstable();
        let mut pairs = destinations.iter().zip(destinations.iter().skip(1));
        if pairs.any(|(one, next)| one.block == next.block && one.end() > next.block_offset) {
            return Ok(None);
        }
        Ok(Some(PageCopy { runs: Runs::new(file.try_clone()?), name: name.to_owned(), destinations }))
    }

    pub(super) fn file(&self) -> &File {
        self.runs.file()
    }

    /// The pages from `offset` of `block` on hold `bytes`.
    pub(super) fn put(&mut self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.each(block, offset, bytes.len() as u64, |runs, from, len, place| {
            let from = (from - offset) as usize;
            runs.put(place, &bytes[from..from + len as usize])
        })
    }

    /// The pages in `len` bytes from `offset` of `block` on, some of which had other contents, hold zeroes.
    pub(super) fn clear(&mut self, block: usize, offset: u64, len: u64) -> io::Result<()> {
        let cleared = self.each(block, offset, len, |runs, _, len, place| match len < HOLE {
            true => (0..len).step_by(ZEROES.len()).try_for_each(|done| {
                let piece = (len - done).min(ZEROES.len() as u64);
                runs.put(place + done, &ZEROES[..piece as usize])
            }),
            false => runs.clear(place, len),
        });
        match cleared {
            // Zeroes for all of a guest may be more than all that comes of it.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.destinations.clear();
                Ok(())
            }
            cleared => cleared,
        }
    }

    /// Writes what is not written yet, and tells what was copied to where.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if it cannot be written.
    pub(crate) fn finish(mut self) -> Result<Vec<Destination>, Error> {
        self.runs.flush().map_err(|(place, error)| Failure::io(&self.name, place, &error))?;
        Ok(self.destinations)
    }

    /// Calls `each` for what has a destination, with its offset in the block, its length and its place in the file.
    fn each(
        &mut self,
        block: usize,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&mut Runs<File>, u64, u64, u64) -> Result<(), (u64, io::Error)>,
    ) -> io::Result<()> {
        let end = offset.saturating_add(len);
        let first = self.destinations.partition_point(|d| (d.block, d.end()) <= (block, offset));
        for destination in &self.destinations[first..] {
            if destination.block != block || destination.block_offset >= end {
                break;
            }
            let (from, to) = (offset.max(destination.block_offset), end.min(destination.end()));
            let place = destination.file_offset + (from - destination.block_offset);
            let done = each(&mut self.runs, from, to - from, place);
            done.map_err(|(at, error)| match error.kind() {
                io::ErrorKind::Unsupported => error,
                _ => Elsewhere::failed(&self.name, at, error),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read_at::read_exact_at;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_cleared_and_comes_again_is_there() {
        let file = tempfile::tempfile().unwrap();
        let whole = Destination { block: 0, block_offset: 0, len: MIB, file_offset: 4096 };
        let mut copy = PageCopy::new(&file, "out", vec![whole]).unwrap().unwrap();
        for offset in (0..MIB).step_by(4096) {
            copy.put(0, offset, &[7; 4096]).unwrap();
        }
        // A hole, zeroes that are written, and pages that come again in both.
        copy.clear(0, 8192, 2 * HOLE).unwrap();
        copy.clear(0, 4 * HOLE, 8192).unwrap();
        copy.put(0, 12288, &[8; 4096]).unwrap();
        copy.put(0, 4 * HOLE, &[9; 4096]).unwrap();
        // Nothing of it is copied.
        copy.put(1, 0, &[1; 4096]).unwrap();
        copy.put(0, MIB, &[1; 4096]).unwrap();
        assert_eq!(copy.finish().unwrap(), [whole]);
        let mut expected = vec![7; MIB as usize];
        let mut put = |at: u64, len: u64, byte| expected[at as usize..(at + len) as usize].fill(byte);
        put(8192, 2 * HOLE, 0);
        put(4 * HOLE, 8192, 0);
        put(12288, 4096, 8);
        put(4 * HOLE, 4096, 9);
        let mut written = vec![0; MIB as usize];
        read_exact_at(&file, &mut written, 4096).unwrap();
        assert!(written == expected);
        assert_eq!(file.metadata().unwrap().len(), 4096 + MIB);
    }

    #[test]
    fn a_part_with_two_destinations_is_not_copied() {
        let file = tempfile::tempfile().unwrap();
        let at = |block_offset, file_offset| Destination { block: 0, block_offset, len: 8192, file_offset };
        assert!(PageCopy::new(&file, "out", vec![at(4096, 0), at(0, 8192)]).unwrap().is_none());
        assert!(PageCopy::new(&file, "out", vec![at(8192, 0), at(0, 8192)]).unwrap().is_some());
    }

    #[test]
    fn what_cannot_be_written_is_a_failure_of_the_output() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let whole = Destination { block: 0, block_offset: 0, len: MIB, file_offset: 4096 };
        let mut copy = PageCopy::new(&full, "out", vec![whole]).unwrap().unwrap();
        let error = copy.put(0, 0, &vec![7; 1 << 17]).unwrap_err();
        let failure = Failure::io("in", 3, &error);
        assert_eq!((&*failure.file, failure.kind, failure.offset), ("out", "io", 4096), "{failure}");
        copy.put(0, 0, &[7; 4096]).unwrap();
        let Err(Error::Bad(failure)) = copy.finish() else { panic!("nothing is wrong") };
        assert_eq!((&*failure.file, failure.kind, failure.offset), ("out", "io", 4096), "{failure}");
    }
}
