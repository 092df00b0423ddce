//! What a source has sent of each page: the old versions that differences are made to.

use super::encode;
use qevm_wire::PageGeometry;

/// How many generations an entry is safe from being replaced by another page.
const LIFETIME: u64 = 2;

/// The cache of a source with capability `xbzrle`: direct-mapped, with one page per entry.
///
/// It does not show on the wire; its rules only decide which pages travel as differences. A *generation* is a round
/// over the guest's memory (QEMU's `dirty-sync-count`): an entry that was used in this or the round before is not
/// replaced by another page.
///
/// The cache must hold exactly what was sent. A page of a running guest has to be copied first, and then the copy given
/// to [`page`](Cache::page) and sent. Differences are of use only from the second round on; before, QEMU does not look
/// at the cache (11.1 counts no miss in the first round, and one for every page of the second).
///
/// ```
/// use qevm_savevm::xbzrle::{Cache, Outcome};
/// use qevm_wire::PageGeometry;
///
/// let mut cache = Cache::new(1 << 20, PageGeometry::X86)?;
/// let mut difference = Vec::new();
/// let mut page = vec![7; 4096];
/// assert_eq!(cache.page(0x3000, &page, 1, false, &mut difference), Outcome::Miss); // sent whole
/// page[9] = 8;
/// assert_eq!(cache.page(0x3000, &page, 2, false, &mut difference), Outcome::Difference);
/// assert_eq!(difference, [9, 1, 8]);
/// # Ok::<(), qevm_savevm::xbzrle::CacheError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Cache {
    entries: Vec<Option<Entry>>,
    pages: PageGeometry,
}

#[derive(Debug, Clone)]
struct Entry {
    address: u64,
    generation: u64,
    page: Box<[u8]>,
}

/// How a page is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The page was not in the cache: send it whole.
    Miss,
    /// The page is what was sent before: send nothing.
    Unchanged,
    /// Send the difference.
    Difference,
    /// The difference is longer than the page: send it whole.
    Overflow,
}

/// A cache size that QEMU refuses as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("xbzrle-cache-size {found}, expected a power of two and at least a page of {page_size} bytes")]
pub struct CacheError {
    /// The size given in bytes.
    pub found: u64,
    /// The target page size in bytes.
    pub page_size: u64,
}

impl Cache {
    /// Default of `xbzrle-cache-size` in bytes.
    pub const DEFAULT_SIZE: u64 = 64 << 20;

    /// A cache of `size` bytes (`xbzrle-cache-size`). Memory for pages is taken as they come.
    ///
    /// # Errors
    /// [`CacheError`] if `size` is no power of two or less than a page.
    pub fn new(size: u64, pages: PageGeometry) -> Result<Self, CacheError> {
        let error = CacheError { found: size, page_size: pages.size() };
        if !size.is_power_of_two() || size < pages.size() {
            return Err(error);
        }
        let count = usize::try_from(pages.index(size)).map_err(|_| error)?;
        let mut entries = Vec::new();
        entries.try_reserve_exact(count).map_err(|_| error)?;
        entries.resize_with(count, || None);
        Ok(Cache { entries, pages })
    }

    /// Decides how `page`, which is not zero, is sent, and remembers it. `address` tells pages of all RAM blocks apart
    /// (offset in the block plus where the block starts in a common numbering). With `last_round` the guest has stopped
    /// and every page is sent for the last time, so new ones are not remembered.
    ///
    /// `difference` is replaced, and holds the data to be sent if the outcome is [`Outcome::Difference`].
    pub fn page(
        &mut self,
        address: u64,
        page: &[u8],
        generation: u64,
        last_round: bool,
        difference: &mut Vec<u8>,
    ) -> Outcome {
        difference.clear();
        let index = self.index(address);
        match &mut self.entries[index] {
            Some(entry) if entry.address == address && entry.page.len() == page.len() => {
                entry.generation = generation;
                let outcome = match encode(&entry.page, page, difference) {
                    Some(0) => return Outcome::Unchanged,
                    Some(_) => Outcome::Difference,
                    None => Outcome::Overflow,
                };
                entry.page.copy_from_slice(page);
                outcome
            }
            _ => {
                if !last_round {
                    self.insert(address, page, generation);
                }
                Outcome::Miss
            }
        }
    }

    /// Remembers that the page at `address` was sent as a page of zeroes.
    pub fn zero_page(&mut self, address: u64, generation: u64) {
        let index = self.index(address);
        match &mut self.entries[index] {
            Some(entry) if entry.address == address => {
                entry.generation = generation;
                entry.page.fill(0);
            }
            _ => {
                let zeroes = vec![0; self.pages.size() as usize];
                self.insert(address, &zeroes, generation);
            }
        }
    }

    /// True if the page at `address` is remembered.
    pub fn contains(&self, address: u64) -> bool {
        self.entries[self.index(address)].as_ref().is_some_and(|entry| entry.address == address)
    }

    fn insert(&mut self, address: u64, page: &[u8], generation: u64) {
        let index = self.index(address);
        let slot = &mut self.entries[index];
        match slot {
            Some(entry) if entry.address != address && entry.generation + LIFETIME > generation => {}
            Some(entry) if entry.page.len() == page.len() => {
                entry.page.copy_from_slice(page);
                (entry.address, entry.generation) = (address, generation);
            }
            _ => *slot = Some(Entry { address, generation, page: page.into() }),
        }
    }

    fn index(&self, address: u64) -> usize {
        // The number of entries is a power of two.
        self.pages.index(address) as usize & (self.entries.len() - 1)
    }
}
