//! The book of the destination.

use super::page_set::PageSet;
use super::{RequestBlocks, RequestError};
use crate::Message;
use alloc::vec;
use alloc::vec::Vec;

/// What the destination has asked for and not received, so that it asks for each host page once, and names the RAM
/// block only where it has to.
///
/// ```
/// use qevm_returnpath::{Message, requests::{PageFaults, RequestBlock, RequestBlocks}};
/// use qevm_wire::CountedString;
///
/// let name = CountedString::new("pc.ram").unwrap();
/// let block = RequestBlock { name: name.clone(), used_length: 0x10000, page_size: 0x1000 };
/// let mut faults = PageFaults::new(RequestBlocks::new(vec![block])?);
/// let first = faults.fault(0, 0x5123)?;
/// assert_eq!(first, Some(Message::ReqPages { block: Some(name), start: 0x5000, len: 0x1000 }));
/// assert_eq!(faults.fault(0, 0x5fff)?, None); // the same page
/// assert_eq!(faults.fault(0, 0x6000)?, Some(Message::ReqPages { block: None, start: 0x6000, len: 0x1000 }));
/// # Ok::<(), qevm_returnpath::RequestError>(())
/// ```
#[derive(Debug, Clone)]
pub struct PageFaults {
    blocks: RequestBlocks,
    last: Option<usize>,
    waiting: Vec<PageSet>,
}

impl PageFaults {
    /// A book without entries.
    pub fn new(blocks: RequestBlocks) -> Self {
        let waiting = vec![PageSet::default(); blocks.len()];
        PageFaults { blocks, last: None, waiting }
    }

    /// The guest touched byte `offset` of the block at place `block` of the list, and its page is not there. Gives the
    /// request to send, unless the page was asked for before.
    ///
    /// # Errors
    /// [`RequestError::NoSuchBlock`], or [`RequestError::Outside`] if the offset is not in the block.
    pub fn fault(&mut self, block: usize, offset: u64) -> Result<Option<Message>, RequestError> {
        let blocks = self.blocks.len();
        let target = self.blocks.block(block).ok_or(RequestError::NoSuchBlock { found: block, blocks })?;
        if offset >= target.used_length {
            let (used_length, name) = (target.used_length, target.name.clone());
            return Err(RequestError::Outside { found: offset, used_length, name });
        }
        let page = target.page(offset);
        if self.waiting[block].insert(page, 1) == 0 {
            return Ok(None);
        }
        Ok(self.message(block, page))
    }

    /// A host page has come, asked for or not.
    pub fn received(&mut self, block: usize, offset: u64) {
        if let (Some(waiting), Some(block)) = (self.waiting.get_mut(block), self.blocks.block(block)) {
            waiting.remove(block.page(offset), 1);
        }
    }

    /// How many host pages were asked for and have not come.
    pub fn waiting(&self) -> u64 {
        self.waiting.iter().map(PageSet::len).sum()
    }

    /// The connection was replaced by a new one: everything that has not come is to be asked for again, with these
    /// messages.
    pub fn reconnected(&mut self) -> Vec<Message> {
        self.last = None;
        let pages: Vec<(usize, u64)> = self
            .waiting
            .iter()
            .enumerate()
            .flat_map(|(block, pages)| pages.iter().map(move |page| (block, page)))
            .collect();
        pages.into_iter().filter_map(|(block, page)| self.message(block, page)).collect()
    }

    fn message(&mut self, index: usize, page: u64) -> Option<Message> {
        let block = self.blocks.block(index)?;
        let named = self.last.replace(index) != Some(index);
        // A page size is at most 2 GiB, see `RequestBlocks::new`.
        let len = block.page_size as u32;
        Some(Message::ReqPages { block: named.then(|| block.name.clone()), start: page * block.page_size, len })
    }
}
