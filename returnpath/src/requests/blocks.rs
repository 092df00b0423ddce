//! The RAM blocks that requests refer to.

use super::RequestError;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use qevm_wire::CountedString;

/// A RAM block whose pages can be requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestBlock {
    /// Its name.
    pub name: CountedString,
    /// Its length in bytes.
    pub used_length: u64,
    /// The size in bytes of the host pages that back it, huge or not; a power of two.
    pub page_size: u64,
}

impl RequestBlock {
    /// The host page that byte `offset` is in.
    pub(super) fn page(&self, offset: u64) -> u64 {
        offset / self.page_size
    }

    pub(super) fn fail_range(&self, start: u64, len: u64) -> RequestError {
        RequestError::Range { start, len, used_length: self.used_length, name: self.name.clone() }
    }
}

/// All of them, in the order of the block list; requests refer to them by their place in it.
#[derive(Debug, Clone)]
pub struct RequestBlocks {
    blocks: Vec<RequestBlock>,
    by_name: BTreeMap<CountedString, usize>,
}

impl RequestBlocks {
    /// Takes the list.
    ///
    /// # Errors
    /// [`RequestError::Blocks`] for a name that comes twice or a page size that is no power of two between 1 KiB and
    /// 2 GiB.
    pub fn new(blocks: Vec<RequestBlock>) -> Result<Self, RequestError> {
        let mut by_name = BTreeMap::new();
        for (index, block) in blocks.iter().enumerate() {
            let fail = |what| Err(RequestError::Blocks { name: block.name.clone(), what });
            // The length of a request is 32 bits wide.
            if !block.page_size.is_power_of_two() || !(1 << 10..=1 << 31).contains(&block.page_size) {
                return fail("has an impossible page size");
            }
            if by_name.insert(block.name.clone(), index).is_some() {
                return fail("is listed twice");
            }
        }
        Ok(RequestBlocks { blocks, by_name })
    }

    /// The block at a place of the list.
    pub fn block(&self, index: usize) -> Option<&RequestBlock> {
        self.blocks.get(index)
    }

    /// The place of a block in the list.
    pub fn index(&self, name: &CountedString) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}
