//! Where pages go as they come.

use super::copy::PageCopy;
use super::ordered::OrderedCopy;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// Takes pages as they come.
#[derive(Debug)]
pub enum Copying {
    /// Each page has its place.
    Placed(PageCopy),
    /// Pages follow one another.
    Ordered(Box<OrderedCopy>),
}

impl Copying {
    /// True if this is the file that it copies to.
    pub(super) fn is_to(&self, file: &File) -> io::Result<bool> {
        let ours = match self {
            Copying::Placed(copy) => copy.file(),
            Copying::Ordered(copy) => copy.file(),
        };
        let (ours, theirs) = (ours.metadata()?, file.metadata()?);
        Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
    }

    /// The page at `offset` of `block` holds `bytes`.
    pub(super) fn put(&mut self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Copying::Placed(copy) => copy.put(block, offset, bytes),
            Copying::Ordered(copy) => copy.page(block, offset, Some(bytes)),
        }
    }

    /// The pages of `size` bytes each in `len` bytes from `offset` of `block` on hold zeroes. `had_contents`: some held
    /// something else.
    pub(super) fn zeroes(
        &mut self,
        block: usize,
        offset: u64,
        len: u64,
        size: u64,
        had_contents: bool,
    ) -> io::Result<()> {
        match self {
            Copying::Placed(copy) if had_contents => copy.clear(block, offset, len),
            Copying::Placed(_) => Ok(()),
            Copying::Ordered(copy) => {
                let mut pages = (offset..offset.saturating_add(len)).step_by(size as usize);
                pages.try_for_each(|offset| copy.page(block, offset, None))
            }
        }
    }

    /// The pages in `len` bytes from `offset` of `block` on have no content any more. `had_contents`: some held
    /// something else than zeroes.
    pub(super) fn discard(&mut self, block: usize, offset: u64, len: u64, had_contents: bool) -> io::Result<()> {
        match self {
            Copying::Placed(copy) if had_contents => return copy.clear(block, offset, len),
            Copying::Placed(_) => {}
            Copying::Ordered(copy) => _ = copy.comes_in_order(block, offset),
        }
        Ok(())
    }
}
