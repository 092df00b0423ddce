//! Pages that no method makes smaller: encrypted or compressed before.

/// χ² of the byte values of random pages is 255 with a deviation of 23. Of 1,000 random pages about five lie outside of
/// this range. A page of which an eighth is repeated has 320, one of which a half is repeated 510; text and code have
/// thousands, and a table of all values 0.
const CHI_SQUARED: core::ops::RangeInclusive<u64> = 190..=320;

/// Whether the bytes of `page` are spread as random ones are, which hardly anything is that compresses.
///
/// What is overlooked is a random page that is a copy of another one just before it.
pub(super) fn looks_random(page: &[u8]) -> bool {
    // Four tables, so that equal neighbours do not wait for each other.
    let mut counts = [[0u32; 256]; 4];
    let (quads, rest) = page.as_chunks::<4>();
    for quad in quads {
        for (table, byte) in counts.iter_mut().zip(quad) {
            table[usize::from(*byte)] += 1;
        }
    }
    for byte in rest {
        counts[0][usize::from(*byte)] += 1;
    }
    let [a, b, c, d] = &counts;
    let squares: u64 = (0..256).map(|byte| u64::from(a[byte] + b[byte] + c[byte] + d[byte]).pow(2)).sum();
    let len = page.len() as u64;
    // Σ (count − expected)² / expected, where len / 256 are expected of each value.
    len > 0 && CHI_SQUARED.contains(&(256 * squares / len).saturating_sub(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn random(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..len).map(|_| byte()).collect()
    }

    #[test]
    fn random_pages_are_noise() {
        let found = random(4096 * 1000).chunks(4096).filter(|page| looks_random(page)).count();
        assert!(found > 980, "{found} of 1000");
        assert!(looks_random(&random(65536)), "a page of another size");
        // What another method has made is noise as well.
        let mut packed = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(9));
        packed.write_all(&random(1 << 18).iter().map(|byte| byte & 0x3f).collect::<Vec<_>>()).unwrap();
        let packed = packed.finish().unwrap();
        let found = packed.chunks_exact(4096).filter(|page| looks_random(page)).count();
        assert!(found * 2 > packed.len() / 4096, "{found}");
    }

    #[test]
    fn what_compresses_is_none() {
        let noise = random(4096);
        let repeated = |len: usize| -> Vec<u8> { noise[..len].iter().copied().cycle().take(4096).collect() };
        let pages: [Vec<u8>; 8] = [
            vec![0; 4096],
            repeated(16),
            repeated(1024),
            repeated(2048),
            (0..4096).map(|n| n as u8).collect(),
            (0..1024u32).flat_map(u32::to_le_bytes).collect(),
            noise.iter().map(|byte| byte & 0x7f).collect(),
            noise.iter().enumerate().map(|(n, byte)| if n % 8 == 0 { 0 } else { *byte }).collect(),
        ];
        for (number, page) in pages.iter().enumerate() {
            assert!(!looks_random(page), "page {number}");
        }
        assert!(!looks_random(&[]));
    }
}
