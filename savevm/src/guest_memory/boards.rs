//! Boards of other targets than x86, whose RAM blocks are not told by their names alone.

use super::Segment;

/// A line for each RAM block: the machine types, its name, the largest length that was looked at, and its pieces in
/// guest-physical memory as address, offset in the block and length; numbers in hexadecimal. Measured (`info mtree -f`,
/// QEMU 7.2 and 11.1, guests of up to 16 GiB where a board takes as much). What lies beyond 8 TiB is left out: no file
/// system has such a file.
const BOARDS: &str = include_str!("boards.txt");

/// Where the RAM block of a board lies; `None` for blocks that were not measured, or not as large.
pub(super) fn segments(machine: &str, block: &str, len: u64) -> Option<Vec<Segment>> {
    let words = BOARDS.lines().map(|line| line.split(' '));
    let mut pieces = words.filter_map(|mut words| {
        let machines = words.next()?;
        (words.next()? == block && machines.split(',').any(|name| name == machine)).then_some(words)
    });
    let mut pieces = pieces.next()?;
    if len > number(pieces.next()?)? {
        return None;
    }
    let segment = |piece: &str| {
        let mut numbers = piece.split('+').map(number);
        let (address, block_offset, most) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let len = len.checked_sub(block_offset).filter(|len| *len > 0)?.min(most);
        Some(Segment { address, block_offset, len })
    };
    Some(pieces.filter_map(segment).collect())
}

fn number(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No piece is lost to a line that is not as it should be, and no two pieces of a machine lie at one place.
    #[test]
    fn every_line_is_read_and_no_two_pieces_overlap() {
        let mut all: std::collections::BTreeMap<&str, Vec<(u64, u64)>> = Default::default();
        for line in BOARDS.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [machines, block, largest, pieces @ ..] = &words[..] else { panic!("{line}") };
            for machine in machines.split(',') {
                let found = segments(machine, block, number(largest).unwrap()).unwrap();
                assert_eq!((found.len(), pieces.is_empty()), (pieces.len(), false), "{line}");
                assert_eq!(segments(machine, block, number(largest).unwrap() + 1), None, "{line}");
                all.entry(machine).or_default().extend(found.iter().map(|piece| (piece.address, piece.len)));
            }
        }
        assert!(all.len() > 100, "{}", all.len());
        for (machine, mut pieces) in all {
            pieces.sort_unstable();
            let overlap =
                pieces.windows(2).find(|pair| pair[0].0.checked_add(pair[0].1).is_none_or(|end| end > pair[1].0));
            assert_eq!(overlap, None, "{machine}");
        }
    }

    #[test]
    fn large_memory_is_taken_apart_as_on_the_board() {
        let gib = 1u64 << 30;
        let at = |len| -> Vec<(u64, u64, u64)> {
            let found = segments("amd-versal-virt", "ddr", len).unwrap().into_iter();
            found.map(|piece| (piece.address, piece.block_offset, piece.len)).collect()
        };
        assert_eq!(at(gib), [(0, 0, gib)]);
        assert_eq!(at(4 * gib), [(0, 0, 2 * gib), (0x8_0000_0000, 2 * gib, 2 * gib)]);
    }
}
