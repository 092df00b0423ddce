//! The capability for message-signalled interrupts (PCI Local Bus Specification 3.0, 6.8.1), without I/O.

use super::error::PciError;

/// A message that interrupts a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciMessage {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

const CONTROL: usize = 2;
const ADDRESS: usize = 4;
const ENABLE: u16 = 1 << 0;
const WIDE: u16 = 1 << 7;
const MASKS: u16 = 1 << 8;
const MOST_VECTORS: u32 = 32;

/// What an MSI capability offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Msi {
    at: usize,
    vectors: u32,
    wide: bool,
    masks: bool,
}

impl Msi {
    /// The capability's identifier.
    pub const ID: u8 = 0x05;

    /// A capability at `at` with 1, 2, 4, 8, 16 or 32 vectors, whose address may be `wide` (64 bits), and whose vectors
    /// may have `masks`.
    ///
    /// # Errors
    /// [`PciError::Vectors`] for another number of vectors.
    pub fn new(at: usize, vectors: u32, wide: bool, masks: bool) -> Result<Msi, PciError> {
        if !vectors.is_power_of_two() || vectors > MOST_VECTORS {
            return Err(PciError::Vectors(vectors));
        }
        Ok(Msi { at, vectors, wide, masks })
    }

    /// As a capability at `at` says in its control.
    ///
    /// # Errors
    /// As [`new`](Msi::new).
    pub(super) fn of(at: usize, control: u16) -> Result<Msi, PciError> {
        Msi::new(at, 1 << (control >> 1 & 7), control & WIDE != 0, control & MASKS != 0)
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Offset of the data within the capability.
    fn data(&self) -> usize {
        if self.wide { 12 } else { 8 }
    }

    fn mask(&self) -> Option<usize> {
        self.masks.then(|| self.data() + 4)
    }

    /// Where in the configuration space the pending bits are.
    pub(super) fn pending_at(&self) -> Option<usize> {
        self.mask().map(|mask| self.at + mask + 4)
    }

    /// Bytes of the capability.
    pub(super) fn length(&self) -> usize {
        self.data() + if self.masks { 12 } else { 2 }
    }

    /// One bit for each vector.
    fn all(&self) -> u32 {
        u32::MAX >> (MOST_VECTORS - self.vectors)
    }

    /// After identifier and link.
    pub(super) fn body(&self) -> Vec<u8> {
        let capable = self.vectors.trailing_zeros() as u16;
        let flag = |is_there: bool, flag: u16| if is_there { flag } else { 0 };
        let control = capable << 1 | flag(self.wide, WIDE) | flag(self.masks, MASKS);
        let mut body = vec![0; self.length() - 2];
        body[..2].copy_from_slice(&control.to_le_bytes());
        body
    }

    /// Bytes of the configuration space that the guest can write, with the bits.
    pub(super) fn writable(&self) -> Vec<(usize, u8)> {
        // Enable, and how many of the vectors are used.
        let mut writable =
            vec![(CONTROL, 0x71), (ADDRESS, 0xfc), (ADDRESS + 1, 0xff), (ADDRESS + 2, 0xff), (ADDRESS + 3, 0xff)];
        writable[0].1 = if self.vectors > 1 { 0x71 } else { 0x01 };
        writable.extend((8..self.data()).map(|at| (at, 0xff)));
        writable.extend([(self.data(), 0xff), (self.data() + 1, 0xff)]);
        if let Some(mask) = self.mask() {
            writable.extend((mask..).zip(self.all().to_le_bytes()));
        }
        writable.into_iter().map(|(at, mask)| (self.at + at, mask)).collect()
    }

    /// Whether the guest uses it, by its bytes.
    pub fn is_enabled(&self, bytes: &[u8]) -> bool {
        control(bytes) & ENABLE != 0
    }

    /// How many vectors the guest uses: never more than there are.
    pub fn used(&self, bytes: &[u8]) -> u32 {
        (1 << (control(bytes) >> 4 & 7)).min(self.vectors)
    }

    /// The message of a vector; `None` when MSI is off or the vector not used. It may be [masked](Msi::is_masked).
    pub fn message(&self, bytes: &[u8], vector: u32) -> Option<PciMessage> {
        let used = self.used(bytes);
        if !self.is_enabled(bytes) || vector >= used {
            return None;
        }
        let upper = if self.wide { u64::from(u32_at(bytes, 8)) << 32 } else { 0 };
        let data = u32::from(u16_at(bytes, self.data()));
        // The vector's number is in the lowest bits.
        Some(PciMessage { address: u64::from(u32_at(bytes, ADDRESS)) | upper, data: data & !(used - 1) | vector })
    }

    /// Whether the guest holds a vector back.
    pub fn is_masked(&self, bytes: &[u8], vector: u32) -> bool {
        self.mask().is_some_and(|mask| vector < MOST_VECTORS && u32_at(bytes, mask) & 1 << vector != 0)
    }

    /// The pending bits.
    pub fn pending(&self, bytes: &[u8]) -> u32 {
        self.mask().map_or(0, |mask| u32_at(bytes, mask + 4))
    }
}

fn control(bytes: &[u8]) -> u16 {
    u16_at(bytes, CONTROL)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
