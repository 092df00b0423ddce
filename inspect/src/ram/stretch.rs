//! Memory that came, in order: for those who write it elsewhere.

use super::block::no_block;
use super::image::Image;
use super::{GuestRam, Keep, PageState, is_zero};
use crate::failure::{Error, Failure};
use std::io;

/// A stretch of pages of a block, as [`GuestRam::stretches`] tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stretch<'a> {
    /// This many pages that never came.
    Absent(u64),
    /// This many pages of zeroes.
    Zero(u64),
    /// Pages, one or more whole ones, with this content, none of which is all zeroes.
    Data(&'a [u8]),
}

impl GuestRam {
    /// Calls `visit` for the pages in `len` bytes from `offset` of `block`, in order, with the offset of each stretch
    /// of them; needs [`Keep::Image`] or [`Keep::Contents`]. A page that is cut by the end of `len` comes as a whole.
    pub fn stretches<E: From<Failure>>(
        &mut self,
        block: usize,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, Stretch<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let temporary = |error: io::Error| Failure::io("temporary file", 0, &error);
        let first = self.blocks.get(block).ok_or_else(no_block).map_err(temporary)?.first_page;
        if self.image.is_none() && self.keep != Keep::Contents {
            return Err(temporary(io::Error::other("page contents were not kept")).into());
        }
        let (mut page, end) = (first + offset / self.page_size, first + (offset + len).div_ceil(self.page_size));
        let mut contents = Vec::new();
        while page < end {
            let run = self.table.run_at(page, end).map_err(temporary)?;
            let place = (page - first) * self.page_size;
            let pages = match (run.state, &mut self.image, &mut self.stored) {
                (PageState::Absent, ..) => {
                    visit(place, Stretch::Absent(run.pages))?;
                    run.pages
                }
                (PageState::Zero, ..) => {
                    visit(place, Stretch::Zero(run.pages))?;
                    run.pages
                }
                (PageState::Data, _, Some(stored)) => {
                    let pages = stored.read_run(page, end, &mut contents)?;
                    visit_contents(&contents, self.page_size, place, &mut visit)?;
                    pages
                }
                (PageState::Data, Some(image), None) => {
                    // One read for as many pages as lie one after the other.
                    let most = end.min(Image::run_end(page));
                    let mut pages = 1;
                    while page + pages < most && self.table.state(page + pages).map_err(temporary)? == PageState::Data {
                        pages += 1;
                    }
                    contents.resize((pages * self.page_size) as usize, 0);
                    image.read(page, &mut contents).map_err(temporary)?;
                    visit(place, Stretch::Data(&contents))?;
                    pages
                }
                (PageState::Data, None, None) => 1,
            };
            page += pages;
        }
        Ok(())
    }

    /// Calls `visit` for the pages of `block` whose content is kept, with the number of each run's first page and how
    /// many there are. Unless pages are [copied](Self::copy_to), some may be all zeroes.
    pub(crate) fn contents(
        &mut self,
        block: usize,
        mut visit: impl FnMut(u64, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let temporary = |error: io::Error| Failure::io("temporary file", 0, &error);
        let found = self.blocks.get(block).ok_or_else(no_block).map_err(temporary)?;
        let (first, end) = (found.first_page, found.first_page + found.used_length / self.page_size);
        let (mut page, mut start) = (first, first);
        while page < end {
            let run = self.table.run_at(page, end).map_err(temporary)?;
            if run.state != PageState::Data {
                if start < page {
                    visit(start - first, page - start)?;
                }
                start = page + run.pages;
            }
            page += run.pages;
        }
        if start < page { visit(start - first, page - start) } else { Ok(()) }
    }
}

/// Calls `visit` for pages as they were stored, of which some may be all zeroes.
fn visit_contents<E>(
    contents: &[u8],
    page_size: u64,
    offset: u64,
    visit: &mut impl FnMut(u64, Stretch<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let size = page_size as usize;
    let (mut at, mut start) = (0, 0);
    while at < contents.len() {
        if is_zero(&contents[at..at + size]) {
            if start < at {
                visit(offset + start as u64, Stretch::Data(&contents[start..at]))?;
            }
            visit(offset + at as u64, Stretch::Zero(1))?;
            start = at + size;
        }
        at += size;
    }
    match start < at {
        true => visit(offset + start as u64, Stretch::Data(&contents[start..at])),
        false => Ok(()),
    }
}
