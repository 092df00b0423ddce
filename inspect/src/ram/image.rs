//! The contents of guest memory, in an unlinked temporary file.

use crate::bounds::Spool;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of consecutive pages that are gathered before they are written.
const RUN_BYTES: usize = 1 << 20;
/// Consecutive pages that lie together in the file. A unit has a place as soon as a page of it comes, so that the file
/// is as long as what came, however far apart in the guest's memory that is.
const UNIT_PAGES: u64 = 256;

/// Pages by number, in a file that disappears with the process.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    page_size: u64,
    /// By the number of the unit.
    units: BTreeMap<u64, Unit>,
    run_start: u64,
    run: Vec<u8>,
}

/// Consecutive pages, each of which has a place in the file once one of them has.
#[derive(Debug, Clone, Copy)]
struct Unit {
    /// Which of the file's units.
    place: u64,
    /// Pages that were written.
    written: [u64; UNIT_PAGES as usize / 64],
}

impl Image {
    /// An empty image in the directory for temporary files (`TMPDIR`), for pages of `page_size` bytes.
    pub(super) fn new(page_size: u64) -> io::Result<Self> {
        let (file, run) = (tempfile::tempfile()?, Vec::new());
        Ok(Image { file, page_size, units: BTreeMap::new(), run_start: 0, run })
    }

    /// The content of page number `page` is `bytes`; says where in the file that is. A page takes `room` once.
    pub(super) fn write(&mut self, page: u64, bytes: &[u8], room: &Spool) -> io::Result<u64> {
        let next = Unit { place: self.units.len() as u64, written: Default::default() };
        let unit = self.units.entry(page / UNIT_PAGES).or_insert(next);
        let (word, bit) = ((page % UNIT_PAGES / 64) as usize, 1 << (page % 64));
        if unit.written[word] & bit == 0 {
            room.take(self.page_size)?;
            unit.written[word] |= bit;
        }
        let place = unit.place;
        let offset = self.offset(place, page)?;
        if self.run_start + self.run.len() as u64 != offset || self.run.len() + bytes.len() > RUN_BYTES {
            self.flush()?;
            self.run_start = offset;
        }
        self.run.extend_from_slice(bytes);
        Ok(offset)
    }

    /// Up to this page, those from `page` on lie one after the other.
    pub(super) fn run_end(page: u64) -> u64 {
        (page / UNIT_PAGES + 1).saturating_mul(UNIT_PAGES)
    }

    /// Reads the contents of the pages from number `page` on, which were written and end at [`run_end`](Self::run_end)
    /// at the latest.
    pub(super) fn read(&mut self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.flush()?;
        let unit = self.units.get(&(page / UNIT_PAGES)).ok_or(io::ErrorKind::NotFound)?;
        self.file.read_exact_at(bytes, self.offset(unit.place, page)?)
    }

    /// The file, with all pages in it.
    pub(super) fn finish(mut self) -> io::Result<File> {
        self.flush()?;
        Ok(self.file)
    }

    fn offset(&self, place: u64, page: u64) -> io::Result<u64> {
        let pages = place.checked_mul(UNIT_PAGES).and_then(|first| first.checked_add(page % UNIT_PAGES));
        pages.and_then(|pages| pages.checked_mul(self.page_size)).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.run.is_empty() {
            self.file.write_all_at(&self.run, self.run_start)?;
            self.run.clear();
        }
        Ok(())
    }
}
