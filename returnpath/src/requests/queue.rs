//! The queue of the source.

use super::page_set::PageSet;
use super::{RequestBlocks, RequestError};
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use qevm_wire::CountedString;

/// The pages that the destination's guest waits for, in the order of its requests. What is in here goes out before any
/// page that is not waited for.
///
/// A destination may ask for a page many times (QEMU's threads do, by tens of thousands under KVM); a page that is in
/// the queue is not queued again. Memory: at most one bit and one queue entry for each page that is waited for.
///
/// ```
/// use qevm_returnpath::requests::{PageRequest, PageRequests, RequestBlock, RequestBlocks};
/// use qevm_wire::CountedString;
///
/// let name = CountedString::new("pc.ram").unwrap();
/// let block = RequestBlock { name: name.clone(), used_length: 0x10000, page_size: 0x1000 };
/// let mut queue = PageRequests::new(RequestBlocks::new(vec![block])?, 0x1000);
/// queue.request(Some(&name), 0x5000, 0x1000)?;
/// queue.request(None, 0x2000, 0x2000)?; // the same block
/// queue.request(None, 0x5000, 0x1000)?; // asked for already
/// queue.sent(0, 0x3000); // went out by itself
/// let sent: Vec<u64> = std::iter::from_fn(|| queue.next_page()).map(|page| page.offset).collect();
/// assert_eq!(sent, [0x5000, 0x2000]);
/// # Ok::<(), qevm_returnpath::RequestError>(())
/// ```
#[derive(Debug, Clone)]
pub struct PageRequests {
    blocks: RequestBlocks,
    host_page_size: u64,
    /// Block of the last request.
    last: Option<usize>,
    /// For each block, the host pages that are waited for.
    waiting: Vec<PageSet>,
    total_waiting: u64,
    pub(super) queue: VecDeque<Entry>,
}

/// Some of these host pages are waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    block: usize,
    first: u64,
    count: u64,
}

/// A host page to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRequest {
    /// The block's place in the list.
    pub block: usize,
    /// Offset of the host page in the block, in bytes.
    pub offset: u64,
    /// Its length in bytes: the host page size of the block, or less at the end of the block.
    pub len: u64,
}

impl PageRequests {
    /// An empty queue. `host_page_size` is the size in bytes of an ordinary host page, of which every request must be a
    /// multiple.
    pub fn new(blocks: RequestBlocks, host_page_size: u64) -> Self {
        let waiting = vec![PageSet::default(); blocks.len()];
        PageRequests { blocks, host_page_size, last: None, waiting, total_waiting: 0, queue: VecDeque::new() }
    }

    /// Takes a request as [`Message::ReqPages`](crate::Message::ReqPages) has it, and says how many host pages of it
    /// were not waited for before.
    ///
    /// # Errors
    /// [`RequestError::NoBlock`], [`RequestError::UnknownBlock`], [`RequestError::Unaligned`] and
    /// [`RequestError::Range`]; [`RequestError::HostPageSize`] if the queue's is none. The queue is as before.
    pub fn request(&mut self, block: Option<&CountedString>, start: u64, len: u32) -> Result<u64, RequestError> {
        if !self.host_page_size.is_power_of_two() {
            return Err(RequestError::HostPageSize { found: self.host_page_size });
        }
        let index = match block {
            Some(name) => self.blocks.index(name).ok_or_else(|| RequestError::UnknownBlock { name: name.clone() })?,
            None => self.last.ok_or(RequestError::NoBlock)?,
        };
        let block = self.blocks.block(index).ok_or(RequestError::NoBlock)?;
        let len = u64::from(len);
        for (what, found) in [("start", start), ("length", len)] {
            if !found.is_multiple_of(self.host_page_size) {
                let (page_size, name) = (self.host_page_size, block.name.clone());
                return Err(RequestError::Unaligned { what, found, page_size, name });
            }
        }
        let end = start.checked_add(len).filter(|end| len > 0 && *end <= block.used_length);
        let end = end.ok_or_else(|| block.fail_range(start, len))?;
        let first = block.page(start);
        let count = block.page(end - 1) - first + 1;
        self.last = Some(index);
        let new = self.waiting[index].insert(first, count);
        if new > 0 {
            self.total_waiting += new;
            self.queue.push_back(Entry { block: index, first, count });
            self.shrink();
        }
        Ok(new)
    }

    /// Takes the next host page to send out of the queue; `None` if no page is waited for.
    pub fn next_page(&mut self) -> Option<PageRequest> {
        while let Some(entry) = self.queue.front_mut() {
            let index = entry.block;
            match self.waiting[index].first_of(entry.first, entry.count) {
                Some(page) => {
                    entry.count -= page + 1 - entry.first;
                    entry.first = page + 1;
                    self.waiting[index].remove(page, 1);
                    self.total_waiting -= 1;
                    let block = self.blocks.block(index)?;
                    let offset = page * block.page_size;
                    return Some(PageRequest {
                        block: index,
                        offset,
                        len: block.page_size.min(block.used_length - offset),
                    });
                }
                None => drop(self.queue.pop_front()),
            }
        }
        None
    }

    /// A host page went out although it was not its turn: it is no longer waited for.
    pub fn sent(&mut self, block: usize, offset: u64) {
        if let (Some(waiting), Some(block)) = (self.waiting.get_mut(block), self.blocks.block(block)) {
            self.total_waiting -= waiting.remove(block.page(offset), 1);
        }
    }

    /// The destination comes back on a new return path: its first request must name its block again, and it asks again
    /// for what it waits for.
    pub fn reconnected(&mut self) {
        self.last = None;
    }

    /// How many host pages are waited for.
    pub fn waiting(&self) -> u64 {
        self.total_waiting
    }

    /// The blocks.
    pub fn blocks(&self) -> &RequestBlocks {
        &self.blocks
    }

    /// Drops the entries that are no longer needed, when they are many: their pages went out by themselves, or entries
    /// in front of them have the same pages. As many entries as pages are left at most, so that the cost of this is
    /// spread over the requests that made it necessary.
    fn shrink(&mut self) {
        const SLACK: u64 = 1024;
        if self.queue.len() as u64 > 2 * self.total_waiting + SLACK {
            let mut uncovered = self.waiting.clone();
            self.queue.retain(|entry| uncovered[entry.block].remove(entry.first, entry.count) > 0);
        }
    }
}
