//! The bitmap of a mapped-ram block: which pages the file has.

use super::{MappedRamError, bitmap_len};

/// One bit per page, in the file's own form: little-endian 64-bit words, so bit *i* is bit *i* mod 8 of byte *i* / 8.
///
/// ```
/// use qevm_savevm::mapped_ram::PageBitmap;
///
/// let present = PageBitmap::from_bytes(vec![0b0000_0110, 0, 0, 0, 0, 0, 0, 0], 10)?;
/// assert!(present.contains(1) && !present.contains(3));
/// assert_eq!(present.count(), 2);
/// assert_eq!(present.runs(u64::MAX).collect::<Vec<_>>(), [(1, 2)]);
/// # Ok::<(), qevm_savevm::mapped_ram::MappedRamError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBitmap {
    bytes: Vec<u8>,
    pages: u64,
}

impl PageBitmap {
    /// A bitmap over `pages` pages, none of them present.
    pub fn new(pages: u64) -> Self {
        PageBitmap { bytes: vec![0; bitmap_len(pages) as usize], pages }
    }

    /// The bitmap as read from a file.
    ///
    /// # Errors
    /// [`MappedRamError::BitmapLength`] if the bytes are not those of `pages` pages, and
    /// [`MappedRamError::BitBehindLastPage`] if a bit is set that stands for no page.
    pub fn from_bytes(bytes: Vec<u8>, pages: u64) -> Result<Self, MappedRamError> {
        let (found, expected) = (bytes.len() as u64, bitmap_len(pages));
        if found != expected {
            return Err(MappedRamError::BitmapLength { found, expected, pages });
        }
        let bitmap = PageBitmap { bytes, pages };
        match bitmap.first_at_or_behind(pages) {
            Some(found) => Err(MappedRamError::BitBehindLastPage { found, pages }),
            None => Ok(bitmap),
        }
    }

    /// The bitmap as a file has it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many pages the bitmap is about.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// True if page `page` is present; false past the last page.
    pub fn contains(&self, page: u64) -> bool {
        self.byte(page).is_some_and(|byte| byte & bit(page) != 0)
    }

    /// Marks page `page` as present. A page after the last one is ignored.
    pub fn set(&mut self, page: u64) {
        if page < self.pages {
            self.bytes[(page / 8) as usize] |= bit(page);
        }
    }

    /// Marks page `page` as absent, which means zero. A page after the last one is ignored.
    pub fn clear(&mut self, page: u64) {
        if page < self.pages {
            self.bytes[(page / 8) as usize] &= !bit(page);
        }
    }

    /// How many pages are present.
    pub fn count(&self) -> u64 {
        self.bytes.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// The runs of present pages, as first page and number of pages, cut where they are longer than `longest`.
    pub fn runs(&self, longest: u64) -> Runs<'_> {
        Runs { bitmap: self, next: 0, longest: longest.max(1) }
    }

    /// The first bit that is set at or after `page`.
    pub(super) fn first_at_or_behind(&self, page: u64) -> Option<u64> {
        self.next_matching(page, false)
    }

    /// The first page at or after `page` whose bit, with all bits inverted if `inverted`, is set.
    fn next_matching(&self, page: u64, inverted: bool) -> Option<u64> {
        let flip = if inverted { u64::MAX } else { 0 };
        let (words, _) = self.bytes.as_chunks::<8>();
        let first_word = usize::try_from(page / 64).ok()?;
        let mut mask = u64::MAX << (page % 64);
        for (number, word) in words.iter().enumerate().skip(first_word) {
            let word = (u64::from_le_bytes(*word) ^ flip) & mask;
            if word != 0 {
                return Some(number as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    fn byte(&self, page: u64) -> Option<u8> {
        self.bytes.get(usize::try_from(page / 8).ok()?).copied()
    }
}

fn bit(page: u64) -> u8 {
    1 << (page % 8)
}

/// Iterator over the runs of present pages; see [`PageBitmap::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    bitmap: &'a PageBitmap,
    next: u64,
    longest: u64,
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let first = self.bitmap.next_matching(self.next, false)?;
        let end = self.bitmap.next_matching(first, true).unwrap_or(self.bitmap.pages).min(self.bitmap.pages);
        self.next = end.min(first.saturating_add(self.longest));
        Some((first, self.next - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bitmap_of_the_wrong_size_is_refused() {
        let error = PageBitmap::from_bytes(vec![0; 8], 65).unwrap_err();
        assert_eq!(error, MappedRamError::BitmapLength { found: 8, expected: 16, pages: 65 });
    }

    #[test]
    fn a_bit_for_no_page_is_refused() {
        let error = PageBitmap::from_bytes(vec![0, 0, 0, 0, 0, 0, 0, 0x80], 63).unwrap_err();
        assert_eq!(error, MappedRamError::BitBehindLastPage { found: 63, pages: 63 });
    }

    #[test]
    fn pages_behind_the_last_are_neither_set_nor_present() {
        let mut bitmap = PageBitmap::new(3);
        bitmap.set(3);
        bitmap.set(u64::MAX);
        assert_eq!(bitmap.count(), 0);
        assert!(!bitmap.contains(u64::MAX));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn bytes_and_sets_agree(pages in 1u64..400, set in prop::collection::btree_set(0u64..400, 0..200), longest in 1u64..100) {
            let set: std::collections::BTreeSet<u64> = set.into_iter().filter(|&p| p < pages).collect();
            let mut bitmap = PageBitmap::new(pages);
            set.iter().for_each(|&page| bitmap.set(page));
            let again = PageBitmap::from_bytes(bitmap.as_bytes().to_vec(), pages).unwrap();
            prop_assert_eq!(&again, &bitmap);
            prop_assert_eq!(bitmap.count(), set.len() as u64);
            let from_runs: Vec<u64> = bitmap.runs(longest).flat_map(|(first, count)| first..first + count).collect();
            prop_assert!(bitmap.runs(longest).all(|(_, count)| count <= longest));
            prop_assert_eq!(from_runs, Vec::from_iter(set.iter().copied()));
            set.iter().for_each(|&page| bitmap.clear(page));
            prop_assert_eq!(bitmap, PageBitmap::new(pages));
        }
    }
}
