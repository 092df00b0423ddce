//! Memory cut into the pages of a dump.

use super::pages::Pages;
use super::parts::Misplaced;

/// Takes memory in order of its addresses, and gives on pages.
#[derive(Debug)]
pub(super) struct Frames<'f> {
    pages: Pages<'f>,
    /// The page that is not given on yet; zero where nothing came.
    frame: Vec<u8>,
    /// Its number.
    open: Option<u64>,
}

impl<'f> Frames<'f> {
    pub(super) fn new(pages: Pages<'f>, frame_size: u64) -> Self {
        Frames { pages, frame: vec![0; frame_size as usize], open: None }
    }

    /// The next bytes of memory, from `address` on.
    pub(super) fn put(&mut self, mut address: u64, mut bytes: &[u8]) -> Result<(), Misplaced> {
        let size = self.frame.len() as u64;
        while !bytes.is_empty() {
            self.open(address / size)?;
            let start = (address % size) as usize;
            if start == 0 && bytes.len() >= self.frame.len() {
                // A page as it is, which need not be copied.
                let (page, rest) = bytes.split_at(self.frame.len());
                self.open = None;
                self.pages.page(page)?;
                (bytes, address) = (rest, address + size);
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(self.frame.len() - start));
            self.frame[start..start + now.len()].copy_from_slice(now);
            (bytes, address) = (rest, address + now.len() as u64);
        }
        Ok(())
    }

    /// `len` bytes of zeroes, from `address` on.
    pub(super) fn put_zeroes(&mut self, mut address: u64, mut len: u64) -> Result<(), Misplaced> {
        let size = self.frame.len() as u64;
        while len > 0 {
            let (number, start) = (address / size, address % size);
            let now = if start == 0 && len >= size {
                self.close()?;
                self.pages.zeroes(len / size)?;
                len / size * size
            } else {
                self.open(number)?;
                len.min(size - start)
            };
            (address, len) = (address + now, len - now);
        }
        Ok(())
    }

    /// Gives on what is held; the offset at which the file ends.
    pub(super) fn finish(mut self) -> Result<u64, Misplaced> {
        self.close()?;
        self.pages.finish()
    }

    fn open(&mut self, number: u64) -> Result<(), Misplaced> {
        if self.open != Some(number) {
            self.close()?;
            self.open = Some(number);
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), Misplaced> {
        if self.open.take().is_some() {
            self.pages.page(&self.frame)?;
            self.frame.fill(0);
        }
        Ok(())
    }
}
