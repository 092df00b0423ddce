//! Huge pages come in pieces.

use crate::PAGE_SIZE;

/// The pieces of a unit that have come on one channel.
#[derive(Default)]
pub(super) struct Assembly {
    unit: Option<(usize, u64)>,
    bytes: Vec<u8>,
    pieces: u64,
}

impl Assembly {
    /// Takes a piece in. Gives the unit when it is whole; the error is where another was begun.
    pub(super) fn add(
        &mut self,
        unit: (usize, u64),
        at: u64,
        content: Option<&[u8]>,
        len: u64,
    ) -> Result<Option<&[u8]>, (usize, u64)> {
        if let Some((block, begun)) = self.unit.filter(|begun| *begun != unit) {
            return Err((block, begun * len));
        }
        if self.unit.replace(unit).is_none() {
            self.bytes.clear();
            self.bytes.resize(len as usize, 0);
            self.pieces = 0;
        }
        let bytes = &mut self.bytes[at as usize..][..PAGE_SIZE as usize];
        match content {
            Some(content) => bytes.copy_from_slice(content),
            None => bytes.fill(0),
        }
        self.pieces += 1;
        if self.pieces * PAGE_SIZE < len {
            return Ok(None);
        }
        self.unit = None;
        Ok(Some(&self.bytes))
    }
}
