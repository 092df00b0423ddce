//! Received bitmaps of postcopy recovery: which pages of a RAM block the destination has (QEMU 3.0).
//!
//! The source asks with `MIG_CMD_RECV_BITMAP` on the main channel, block by block; the destination answers with
//! [`Message::RecvBitmap`](crate::Message::RecvBitmap) and the bitmap: little-endian words of 64 bits, bit `i` for
//! target page `i`, 1 for a page that is there. Everything else has to be sent again.

use crate::session::SessionError;
use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use qevm_wire::{CountedString, PageGeometry};

/// Length in bytes of the bitmap of a block of `used_length` bytes: one bit for each target page, rounded up to whole
/// words of 8 bytes.
///
/// ```
/// use qevm_returnpath::bitmap::bitmap_len;
/// use qevm_wire::PageGeometry;
///
/// assert_eq!(bitmap_len(32 << 20, PageGeometry::X86), 1024);
/// assert_eq!(bitmap_len(0x1000, PageGeometry::X86), 8);
/// ```
pub fn bitmap_len(used_length: u64, pages: PageGeometry) -> u64 {
    used_length.div_ceil(pages.size()).div_ceil(64) * 8
}

/// The pages that the destination lacks, of the `count` pages that a piece of a bitmap stands for from its first bit
/// on. A piece that is too short has no bits after its end.
///
/// ```
/// use qevm_returnpath::bitmap::missing_pages;
///
/// assert_eq!(missing_pages(&[0b1110_1111, 0xff, 0x01], 20).collect::<Vec<_>>(), [4, 17, 18, 19]);
/// ```
pub fn missing_pages(bitmap: &[u8], count: u64) -> impl Iterator<Item = u64> + '_ {
    (0..count).filter(|page| {
        let byte = usize::try_from(page / 8).ok().and_then(|byte| bitmap.get(byte));
        byte.is_none_or(|byte| byte >> (page % 8) & 1 == 0)
    })
}

/// The bitmaps that a source has asked for and not received.
#[derive(Debug, Clone, Default)]
pub struct BitmapExchange {
    asked: BTreeMap<CountedString, u64>,
}

impl BitmapExchange {
    /// The bitmap of a block of `used_length` bytes was asked for.
    ///
    /// # Errors
    /// [`SessionError::Order`] if it was asked for before.
    pub fn ask(&mut self, block: CountedString, used_length: u64, pages: PageGeometry) -> Result<(), SessionError> {
        match self.asked.entry(block) {
            Entry::Vacant(entry) => {
                entry.insert(bitmap_len(used_length, pages));
                Ok(())
            }
            Entry::Occupied(_) => {
                Err(SessionError::Order { what: "RECV_BITMAP", place: "was asked for this block before" })
            }
        }
    }

    /// The bitmap of a block was announced, `len` bytes long.
    ///
    /// # Errors
    /// [`SessionError::BitmapNotAsked`] and [`SessionError::BitmapLength`]; the bitmap is then not to be used.
    pub fn answer(&mut self, block: &CountedString, len: u64) -> Result<(), SessionError> {
        match self.asked.remove(block) {
            None => Err(SessionError::BitmapNotAsked { block: block.clone() }),
            Some(expected) if expected != len => {
                Err(SessionError::BitmapLength { block: block.clone(), found: len, expected })
            }
            Some(_) => Ok(()),
        }
    }

    /// The blocks whose bitmaps have not come.
    pub fn waiting(&self) -> impl Iterator<Item = &CountedString> {
        self.asked.keys()
    }
}
