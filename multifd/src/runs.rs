//! Runs of adjacent pages: what one read or write of guest memory can cover.

use qevm_wire::PageGeometry;

/// Adjacent pages of one RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// Offset of the first page in the block, in bytes.
    pub offset: u64,
    /// Length of all pages together, in bytes; never 0.
    pub len: u64,
}

/// Joins page offsets to runs, without changing their order: a run ends where the next offset is not the next page.
///
/// ```
/// use qevm_multifd::{Run, Runs};
/// use qevm_wire::PageGeometry;
///
/// let runs: Vec<Run> = Runs::new([0x3000, 0x4000, 0x1000, 0x2000], PageGeometry::X86).collect();
/// assert_eq!(runs, [Run { offset: 0x3000, len: 0x2000 }, Run { offset: 0x1000, len: 0x2000 }]);
/// ```
#[derive(Debug, Clone)]
pub struct Runs<I: Iterator<Item = u64>> {
    offsets: core::iter::Peekable<I>,
    page_size: u64,
}

impl<I: Iterator<Item = u64>> Runs<I> {
    /// The runs of pages of this geometry at `offsets` (in bytes).
    pub fn new(offsets: impl IntoIterator<IntoIter = I>, pages: PageGeometry) -> Self {
        Runs { offsets: offsets.into_iter().peekable(), page_size: pages.size() }
    }
}

impl<I: Iterator<Item = u64>> Iterator for Runs<I> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let offset = self.offsets.next()?;
        let mut len = self.page_size;
        while self.offsets.next_if(|next| offset.checked_add(len) == Some(*next)).is_some() {
            len = len.saturating_add(self.page_size);
        }
        Some(Run { offset, len })
    }
}
