//! CRC-32 of a whole RAM block from the CRCs of its pages.

use crc32fast::Hasher;

/// CRC-32 of pages appended one after the other, from each page's own CRC.
///
/// Appending `n` zero bytes changes a CRC by a linear map that depends on `n` only, and
/// `crc(A ‖ B) = map(crc(A)) ⊕ crc(B)`. The map of one page is a table here, so a page costs four look-ups.
#[derive(Debug)]
pub(super) struct PageCrc {
    page_size: u64,
    map: Box<[[u32; 256]; 4]>,
    zero_page: u32,
}

impl PageCrc {
    /// Tables for pages of `page_size` bytes.
    pub(super) fn new(page_size: u64) -> Self {
        let mut map = Box::new([[0u32; 256]; 4]);
        for (byte, table) in map.iter_mut().enumerate() {
            for bit in 0..8 {
                let image = shift(1 << (8 * byte + bit), page_size);
                let bit = 1usize << bit;
                for low in 0..bit {
                    table[bit | low] = table[low] ^ image;
                }
            }
        }
        PageCrc { page_size, map, zero_page: zeroes(page_size) }
    }

    /// CRC-32 of one page of zeroes.
    pub(super) fn zero_page(&self) -> u32 {
        self.zero_page
    }

    /// `crc` with one page of CRC `page` appended.
    pub(super) fn append(&self, crc: u32, page: u32) -> u32 {
        let [a, b, c, d] = crc.to_le_bytes();
        let m = &self.map;
        m[0][a as usize] ^ m[1][b as usize] ^ m[2][c as usize] ^ m[3][d as usize] ^ page
    }

    /// `crc` with `pages` pages of zeroes appended, in time that grows with the logarithm of `pages`.
    pub(super) fn append_zero_pages(&self, crc: u32, pages: u64) -> u32 {
        let length = pages.saturating_mul(self.page_size);
        shift(crc, length) ^ zeroes(length)
    }
}

/// `crc(A ‖ length zeroes) ⊕ crc(length zeroes)`, given `crc(A)`.
fn shift(crc: u32, length: u64) -> u32 {
    let mut hasher = Hasher::new_with_initial_len(crc, 0);
    hasher.combine(&Hasher::new_with_initial_len(0, length));
    hasher.finalize()
}

/// CRC-32 of `length` zero bytes.
fn zeroes(length: u64) -> u32 {
    let mut total = Hasher::new();
    let mut power = 1u64;
    // CRC of 1, 2, 4, … zero bytes by doubling.
    let mut crc = crc32fast::hash(&[0]);
    let mut left = length;
    while left > 0 {
        if left & 1 == 1 {
            total.combine(&Hasher::new_with_initial_len(crc, power));
        }
        left >>= 1;
        if left > 0 {
            let mut doubled = Hasher::new_with_initial_len(crc, power);
            doubled.combine(&Hasher::new_with_initial_len(crc, power));
            crc = doubled.finalize();
            power *= 2;
        }
    }
    total.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_of_pages_is_the_crc_of_their_bytes() {
        let pages: Vec<Vec<u8>> =
            (0..9u32).map(|p| (0..4096u32).map(|i| (i.wrapping_mul(p * 77 + 1) >> 3) as u8).collect()).collect();
        let combine = PageCrc::new(4096);
        let mut crc = 0;
        for page in &pages {
            crc = combine.append(crc, crc32fast::hash(page));
        }
        crc = combine.append_zero_pages(crc, 3);
        crc = combine.append(crc, combine.zero_page());
        let mut bytes = pages.concat();
        bytes.resize(bytes.len() + 4 * 4096, 0);
        assert_eq!(crc, crc32fast::hash(&bytes));
        assert_eq!(combine.append_zero_pages(0, 0), 0);
    }

    /// The well-known CRC-32 of a zero page (as `head -c 4096 /dev/zero | crc32` prints it).
    #[test]
    fn a_zero_page_has_its_known_crc() {
        assert_eq!(PageCrc::new(4096).zero_page(), 0xc71c_0011);
    }
}
