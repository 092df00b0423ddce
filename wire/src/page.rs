//! Page arithmetic in target pages, the unit of RAM records and multifd packets.

/// The size of a target page and the arithmetic on it.
///
/// On x86 a target page is always 4096 bytes, whatever the host or huge page size is; other targets announce theirs in
/// the `configuration/target-page-bits` subsection.
///
/// ```
/// use qevm_wire::PageGeometry;
///
/// let pages = PageGeometry::X86;
/// assert_eq!(pages.size(), 4096);
/// assert_eq!(pages.count(0x10000), Some(16));
/// assert_eq!(pages.count(0x10001), None); // not whole pages
/// assert_eq!(pages.split(0x5000 | 0x08), (0x5000, 0x08)); // offset and flags of a RAM record
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageGeometry {
    bits: u8,
}

impl PageGeometry {
    /// 4096-byte pages.
    pub const X86: PageGeometry = PageGeometry { bits: 12 };

    /// Smallest page of any QEMU target (AVR's 256 bytes up to QEMU 10.0). It leaves no room for the flags `0x100` and
    /// `0x200` of a RAM record, which QEMU itself cannot tell from an address there; pages of 1 KiB leave room for all.
    pub const MIN_BITS: u8 = 8;
    /// Largest page any QEMU target uses (64 KiB), with room to spare.
    pub const MAX_BITS: u8 = 20;

    /// Pages of `1 << bits` bytes; `None` if `bits` is outside
    /// [`MIN_BITS`](Self::MIN_BITS)..=[`MAX_BITS`](Self::MAX_BITS).
    pub fn from_bits(bits: u32) -> Option<Self> {
        let bits = u8::try_from(bits).ok()?;
        (Self::MIN_BITS..=Self::MAX_BITS).contains(&bits).then_some(PageGeometry { bits })
    }

    /// Pages of `size` bytes; `None` if that is no power of two in range.
    pub fn from_size(size: u64) -> Option<Self> {
        size.is_power_of_two().then(|| Self::from_bits(size.trailing_zeros())).flatten()
    }

    /// log2 of the page size.
    pub fn bits(self) -> u32 {
        self.bits.into()
    }

    /// Bytes in a page.
    pub fn size(self) -> u64 {
        1 << self.bits
    }

    /// How many pages `len` bytes are; `None` if they are not whole pages.
    pub fn count(self, len: u64) -> Option<u64> {
        (len & (self.size() - 1) == 0).then_some(len >> self.bits)
    }

    /// Number of the page that byte `offset` is in.
    pub fn index(self, offset: u64) -> u64 {
        offset >> self.bits
    }

    /// Splits the word that opens a RAM record into page offset and flags.
    pub fn split(self, word: u64) -> (u64, u64) {
        let low = self.size() - 1;
        (word & !low, word & low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_in_range_are_page_sizes() {
        assert_eq!(PageGeometry::from_size(4096), Some(PageGeometry::X86));
        for size in [0, 1, 128, 4095, 6144, 1 << 21, u64::MAX] {
            assert_eq!(PageGeometry::from_size(size), None, "{size}");
        }
        assert_eq!(PageGeometry::from_bits(64), None);
    }

    #[test]
    fn the_last_page_of_the_address_space_has_an_index() {
        assert_eq!(PageGeometry::X86.index(u64::MAX), u64::MAX >> 12);
        assert_eq!(PageGeometry::X86.count(u64::MAX - 0xfff), Some((1 << 52) - 1));
    }
}
