//! Pages one by one, after a table of their lengths: `qpl` and `uadk`.

use super::zlib::Inflate;
use super::{Compression, CompressionError};

/// The pages of one payload: a big-endian `u32` length for each page, then their data back to back. A page that is as
/// long as a page is one that did not compress.
pub(super) struct PageLengths<'a> {
    lengths: &'a [[u8; 4]],
    data: &'a [u8],
}

impl<'a> PageLengths<'a> {
    pub(super) fn new(payload: &'a [u8], pages: u32, page_size: usize) -> Result<Self, CompressionError> {
        let table = pages as usize * 4;
        let Some((table, data)) = payload.split_at_checked(table) else {
            return Err(CompressionError::Length { found: payload.len() as u64, expected: table as u64 });
        };
        let (lengths, _) = table.as_chunks();
        let mut all = 0;
        for (index, length) in (0..).zip(lengths) {
            let found = u64::from(u32::from_be_bytes(*length));
            if found > page_size as u64 {
                return Err(CompressionError::PageLength { index, found, max: page_size as u64 });
            }
            all += found;
        }
        let found = data.len() as u64;
        if found < all {
            return Err(CompressionError::Length { found, expected: all });
        }
        if found > all {
            return Err(CompressionError::LeftOver { left: found - all, len: payload.len() as u64 });
        }
        Ok(PageLengths { lengths, data })
    }

    pub(super) fn page(
        &mut self,
        page: &mut [u8],
        inflate: Option<&mut Inflate>,
        method: Compression,
    ) -> Result<(), CompressionError> {
        let too_few = CompressionError::Length { found: 0, expected: page.len() as u64 };
        let Some((length, rest)) = self.lengths.split_first() else { return Err(too_few) };
        let Some((mut data, rest_of_data)) = self.data.split_at_checked(u32::from_be_bytes(*length) as usize) else {
            return Err(too_few);
        };
        (self.lengths, self.data) = (rest, rest_of_data);
        if data.len() == page.len() {
            page.copy_from_slice(data);
            return Ok(());
        }
        let Some(inflate) = inflate else {
            return Err(CompressionError::Hardware { method, what: "a page that the accelerator compressed" });
        };
        inflate.restart();
        let (len, expected) = (data.len() as u64, page.len() as u64);
        let filled = inflate.fill(&mut data, page)? as u64;
        let more = inflate.fill(&mut data, &mut [0])? as u64;
        if filled + more != expected {
            return Err(CompressionError::Length { found: filled + more, expected });
        }
        if !data.is_empty() {
            return Err(CompressionError::LeftOver { left: data.len() as u64, len });
        }
        Ok(())
    }
}
