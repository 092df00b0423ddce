//! Zero pages: who finds them and how they travel (parameter `zero-page-detection`; QEMU 9.0).

use crate::packet::PacketLayout;
pub use qevm_wire::profile::ZeroPageDetection;

/// How one page travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// As a ZERO record on the main channel.
    MainZero,
    /// As a zero page in a packet.
    PacketZero,
    /// As a normal page in a packet, zero or not.
    PacketNormal,
}

/// Says how the page of these bytes travels.
///
/// | detection | a zero page is |
/// |---|---|
/// | `none` | a normal page |
/// | `legacy` | a ZERO record on the main channel, found by the main thread |
/// | `multifd` | a zero page in a packet, found by the channel's thread |
///
/// Where the layout of the packets has no zero pages (before 9.0), `multifd` does what `legacy` does, as those releases
/// know nothing else.
///
/// ```
/// use qevm_multifd::{PacketLayout, zero_page::{Route, ZeroPageDetection, route}};
///
/// let (zero, layout) = ([0; 4096], PacketLayout::ZeroPages);
/// assert_eq!(route(&zero, ZeroPageDetection::Multifd, layout), Route::PacketZero);
/// assert_eq!(route(&zero, ZeroPageDetection::Legacy, layout), Route::MainZero);
/// assert_eq!(route(&zero, ZeroPageDetection::None, layout), Route::PacketNormal);
/// assert_eq!(route(&[1; 4096], ZeroPageDetection::Multifd, layout), Route::PacketNormal);
/// ```
pub fn route(page: &[u8], detection: ZeroPageDetection, layout: PacketLayout) -> Route {
    match (detection, layout) {
        (ZeroPageDetection::None, _) => Route::PacketNormal,
        _ if !is_zero(page) => Route::PacketNormal,
        (ZeroPageDetection::Multifd, PacketLayout::ZeroPages) => Route::PacketZero,
        _ => Route::MainZero,
    }
}

/// True if all bytes are zero. Stops early at pages that are not, which most pages show in their first bytes.
///
/// ```
/// use qevm_multifd::zero_page::is_zero;
///
/// assert!(is_zero(&[0; 4096]));
/// assert!(!is_zero(&[0, 0, 1]));
/// ```
pub fn is_zero(page: &[u8]) -> bool {
    /// Bytes that are looked at in one go: enough to keep vector registers busy.
    const STRIDE: usize = 256;
    let (strides, rest) = page.as_chunks::<STRIDE>();
    strides.iter().all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_anywhere_is_seen() {
        for len in [1, 255, 256, 257, 4096, 4099] {
            let mut page = vec![0; len];
            assert!(is_zero(&page));
            for at in 0..len {
                page[at] = 0x80;
                assert!(!is_zero(&page), "byte {at} of {len}");
                page[at] = 0;
            }
        }
    }

    #[test]
    fn old_packets_cannot_list_zero_pages() {
        assert_eq!(route(&[0; 4096], ZeroPageDetection::Multifd, PacketLayout::Pages), Route::MainZero);
    }
}
