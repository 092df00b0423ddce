//! The capability for message-signalled interrupts with a table (PCI Local Bus Specification 3.0, 6.8.2), without I/O.

use super::error::PciError;
use super::msi::PciMessage;

/// The capability's identifier.
pub(super) const ID: u8 = 0x11;
/// Bytes of the capability.
pub(super) const CAPABILITY: usize = 12;
/// Bits of the upper half of control that the guest can write: enabled, and all vectors masked.
pub(super) const CONTROL_WRITABLE: u8 = 0xc0;
/// Bytes of an entry of the table.
const ENTRY: usize = 16;
const MOST_VECTORS: u16 = 2048;
const DATA: usize = 8;
const VECTOR_CONTROL: usize = 12;
const MASKED: u8 = 1;

/// Where a function has table and pending bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    vectors: u16,
    table: (u8, u32),
    pending: (u8, u32),
}

impl Layout {
    /// This many vectors; table and pending bits each in a BAR, at an offset that is a multiple of 8.
    ///
    /// # Errors
    /// [`PciError::Vectors`] unless there are 1 to 2048; [`PciError::Bar`] for a BAR that there is not, or an offset
    /// that is no multiple of 8.
    pub fn new(vectors: u16, table: (u8, u32), pending: (u8, u32)) -> Result<Layout, PciError> {
        if !(1..=MOST_VECTORS).contains(&vectors) {
            return Err(PciError::Vectors(vectors.into()));
        }
        for (bar, offset) in [table, pending] {
            if bar > 5 || !offset.is_multiple_of(8) {
                return Err(PciError::Bar { index: bar.into(), size: offset.into() });
            }
        }
        Ok(Layout { vectors, table, pending })
    }

    /// As a capability says, from its identifier on.
    ///
    /// # Errors
    /// As [`new`](Layout::new).
    pub(super) fn of(capability: &[u8; CAPABILITY]) -> Result<Layout, PciError> {
        let place = |at: usize| {
            let word = capability[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            ((word & 7) as u8, word & !7)
        };
        let control = u16::from_le_bytes([capability[2], capability[3]]);
        Layout::new((control & 0x7ff) + 1, place(4), place(8))
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// BAR and offset of the table.
    pub fn table(&self) -> (u8, u32) {
        self.table
    }

    /// BAR and offset of the pending bits.
    pub fn pending(&self) -> (u8, u32) {
        self.pending
    }

    /// After identifier and link.
    pub(super) fn body(&self) -> [u8; CAPABILITY - 2] {
        let mut body = [0; CAPABILITY - 2];
        body[..2].copy_from_slice(&(self.vectors - 1).to_le_bytes());
        for (at, (bar, offset)) in [(2, self.table), (6, self.pending)] {
            body[at..at + 4].copy_from_slice(&(offset | u32::from(bar)).to_le_bytes());
        }
        body
    }
}

/// The guest's part of control.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Interrupts are sent by the table, and INTx is off.
    pub enabled: bool,
    /// No vector is sent, whatever its own mask says.
    pub all_masked: bool,
}

impl Control {
    pub(super) fn of(control: u16) -> Control {
        Control { enabled: control & 1 << 15 != 0, all_masked: control & 1 << 14 != 0 }
    }
}

/// Table and pending bits.
///
/// ```
/// use reference_vmm::devices::pci::{MsixControl, MsixTable, PciMessage};
/// let mut table = MsixTable::new(4)?;
/// let on = MsixControl { enabled: true, all_masked: false };
/// assert_eq!(table.trigger(2, on), None); // after reset every vector is masked: it waits
/// table.write(2 * 16, &0xfee0_0000_u64.to_le_bytes(), on);
/// let sent = table.write(2 * 16 + 8, &0x31_u64.to_le_bytes(), on); // data, and the mask is off
/// assert_eq!(sent, [PciMessage { address: 0xfee0_0000, data: 0x31 }]);
/// # Ok::<(), reference_vmm::devices::pci::PciError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    entries: Vec<u8>,
    /// One bit for each vector.
    pending: Vec<u8>,
}

impl Table {
    /// After reset: all vectors masked, none pending.
    ///
    /// # Errors
    /// [`PciError::Vectors`] unless there are 1 to 2048.
    pub fn new(vectors: u16) -> Result<Table, PciError> {
        Layout::new(vectors, (0, 0), (0, 0))?;
        let mut table = Table {
            entries: vec![0; usize::from(vectors) * ENTRY],
            pending: vec![0; usize::from(vectors).div_ceil(8)],
        };
        table.entries.chunks_mut(ENTRY).for_each(|entry| entry[VECTOR_CONTROL] = MASKED);
        Ok(table)
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.entries.len() / ENTRY
    }

    /// The guest reads the table; beyond its end there are zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        read(&self.entries, offset, data);
    }

    /// The guest reads the pending bits; beyond their end there are zeros.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        read(&self.pending, offset, data);
    }

    /// The guest writes to the table, 4 or 8 bytes at a multiple of that; anything else is ignored, as is what lies
    /// beyond its end. What has been waiting for a mask to go is to be sent.
    pub fn write(&mut self, offset: u64, data: &[u8], control: Control) -> Vec<PciMessage> {
        let Ok(offset) = usize::try_from(offset) else { return Vec::new() };
        let whole = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len());
        let Some(bytes) = self.entries.get_mut(offset..).and_then(|rest| rest.get_mut(..data.len())).filter(|_| whole)
        else {
            return Vec::new();
        };
        bytes.copy_from_slice(data);
        let vector = offset / ENTRY;
        // The lower two bits of an address are zero, and only one bit of a vector's control is there.
        let entry = &mut self.entries[vector * ENTRY..][..ENTRY];
        entry[0] &= !3;
        entry[VECTOR_CONTROL] &= MASKED;
        entry[VECTOR_CONTROL + 1..].fill(0);
        self.release(vector, control).into_iter().collect()
    }

    /// Control has changed: what may go now is to be sent.
    pub fn control_changed(&mut self, control: Control) -> Vec<PciMessage> {
        (0..self.vectors()).filter_map(|vector| self.release(vector, control)).collect()
    }

    /// The device has something to tell: the message to send, unless a mask holds it back until it goes. Vectors that
    /// there are not tell nothing.
    pub fn trigger(&mut self, vector: usize, control: Control) -> Option<PciMessage> {
        if !control.enabled || vector >= self.vectors() {
            return None;
        }
        if self.is_masked(vector, control) {
            self.pending[vector / 8] |= 1 << (vector % 8);
            return None;
        }
        Some(self.message(vector))
    }

    /// Whether a vector is held back.
    pub fn is_masked(&self, vector: usize, control: Control) -> bool {
        control.all_masked || self.entries.get(vector * ENTRY + VECTOR_CONTROL).is_none_or(|mask| mask & MASKED != 0)
    }

    /// What a vector sends; zeros for one that there is not.
    pub fn message(&self, vector: usize) -> PciMessage {
        let mut entry = [0; ENTRY];
        self.read((vector * ENTRY) as u64, &mut entry);
        let half = |at: usize| entry[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        PciMessage { address: u64::from(half(0)) | u64::from(half(4)) << 32, data: half(DATA) }
    }

    /// A vector waits for a mask to go.
    pub fn set_pending(&mut self, vector: usize) {
        if let Some(byte) = self.pending.get_mut(vector / 8).filter(|_| vector < self.entries.len() / ENTRY) {
            *byte |= 1 << (vector % 8);
        }
    }

    /// The vectors that wait for a mask to go, which do so no more.
    pub fn take_pending(&mut self) -> Vec<usize> {
        let none = vec![0; self.pending.len()];
        let pending = std::mem::replace(&mut self.pending, none);
        (0..self.vectors()).filter(|vector| pending[vector / 8] & 1 << (vector % 8) != 0).collect()
    }

    fn release(&mut self, vector: usize, control: Control) -> Option<PciMessage> {
        let (byte, bit) = (vector / 8, 1 << (vector % 8));
        if !control.enabled || self.is_masked(vector, control) || self.pending[byte] & bit == 0 {
            return None;
        }
        self.pending[byte] &= !bit;
        Some(self.message(vector))
    }

    /// Entries and pending bits, as they go on the wire.
    pub fn save(&self) -> Vec<u8> {
        [self.entries.as_slice(), &self.pending].concat()
    }

    /// Takes over what was saved.
    ///
    /// # Errors
    /// [`PciError::Size`] when it has another length. Then nothing has changed.
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), PciError> {
        let expected = self.entries.len() + self.pending.len();
        if bytes.len() != expected {
            return Err(PciError::Size { found: bytes.len(), expected });
        }
        let (entries, pending) = bytes.split_at(self.entries.len());
        self.entries.copy_from_slice(entries);
        self.pending.copy_from_slice(pending);
        Ok(())
    }
}

fn read(from: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| from.get(offset..)).unwrap_or_default();
    data.iter_mut().zip(rest).for_each(|(into, byte)| *into = *byte);
}
