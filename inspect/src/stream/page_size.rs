//! The size of target pages, where neither the configuration nor a description tells it.

use crate::source::Source;
use qevm_savevm::ram::RamError;
use qevm_savevm::{Error, ErrorKind, StreamError};
use qevm_wire::PageGeometry;
use std::io;

/// Targets with pages of more than 4096 bytes, by machine types that no other target has.
const LARGE: [(&[u8], u64); 7] = [
    (b"clipper", 8192),
    (b"sun4u", 8192),
    (b"sun4v", 8192),
    (b"niagara", 8192),
    (b"or1k-sim", 8192),
    (b"tricore_testboard", 16384),
    (b"KIT_AURIX_TC277_TRB", 16384),
];
/// Pages of less than 4096 bytes: most Arm machines, AVR, and what is between.
const SMALL: [u64; 3] = [1024, 256, 2048];

/// Bits of a RAM record's first word that are flags in pages of every size.
const FLAGS: u64 = 0xff;
const CONTINUE: u64 = 0x20;
const ZERO: u64 = 0x02;
const PAGE: u64 = 0x08;

/// What the machine type tells.
pub(super) fn of_machine(machine: &[u8]) -> Option<PageGeometry> {
    let (_, size) = LARGE.iter().find(|(name, _)| *name == machine)?;
    PageGeometry::from_size(*size)
}

/// What an error shows that pages of the wrong size give: the advice of postcopy and the header of a mapped-ram block
/// tell the size, and a block that is not whole pages has smaller ones.
pub(super) fn of_error(error: &Error) -> Option<PageGeometry> {
    let size = match error.kind {
        ErrorKind::Stream(StreamError::AdvisedPageSize { found, .. })
        | ErrorKind::Ram(RamError::MappedRamPageSize { found, .. }) => found,
        ErrorKind::Ram(RamError::PartialPage { found, .. }) => {
            SMALL.into_iter().filter(|size| found.is_multiple_of(*size)).max()?
        }
        _ => return None,
    };
    PageGeometry::from_size(size)
}

/// Whether the record of a page that is next in `source` and the one after it show that pages are smaller than 4096
/// bytes: then the second is at an address that no page of 4096 bytes has. `None`: they show nothing.
pub(super) fn of_records(source: &mut Source) -> io::Result<Option<PageGeometry>> {
    let Some(first) = word(source, 0)? else { return Ok(None) };
    let (address, flags) = (first & !FLAGS, first & FLAGS);
    let name = match flags & CONTINUE {
        0 => byte(source, 8)?.map_or(0, |len| 1 + u64::from(len)),
        _ => 0,
    };
    let content = 8 + name;
    for size in SMALL {
        let next = match flags & !CONTINUE {
            ZERO => content + 1,
            PAGE => content + size,
            _ => return Ok(None),
        };
        let following = word(source, next)?;
        let fits = following.is_some_and(|word| {
            word & !FLAGS == address.wrapping_add(size) && [CONTINUE | ZERO, CONTINUE | PAGE].contains(&(word & FLAGS))
        });
        if fits {
            return Ok(PageGeometry::from_size(size));
        }
    }
    Ok(None)
}

fn word(source: &mut Source, at: u64) -> io::Result<Option<u64>> {
    let at = at as usize;
    source.fill(at + 8)?;
    let bytes = source.window().get(at..at + 8);
    Ok(bytes.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes))
}

fn byte(source: &mut Source, at: usize) -> io::Result<Option<u8>> {
    source.fill(at + 1)?;
    Ok(source.window().get(at).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &[u64], contents: &[usize]) -> Option<u64> {
        let mut bytes = Vec::new();
        for (number, (word, content)) in words.iter().zip(contents).enumerate() {
            bytes.extend(word.to_be_bytes());
            if number == 0 {
                bytes.extend(b"\x03ram");
            }
            bytes.resize(bytes.len() + content, 0x5a);
        }
        let mut source = Source::stream(Box::new(io::Cursor::new(bytes)));
        of_records(&mut source).unwrap().map(PageGeometry::size)
    }

    #[test]
    fn an_error_shows_the_size_that_would_be_right() {
        let error = |kind: ErrorKind| of_error(&Error::new(kind, 0)).map(PageGeometry::size);
        for size in [256, 1024, 8192, 16384, 65536] {
            let advised = StreamError::AdvisedPageSize { found: size, expected: 4096 };
            assert_eq!(error(advised.into()), Some(size));
            let mapped = RamError::MappedRamPageSize { found: size, expected: 4096 };
            assert_eq!(error(mapped.into()), Some(size));
        }
        for (found, size) in [(0x400, Some(1024)), (0x1800, Some(2048)), (0x20500, Some(256)), (0x1080, None)] {
            assert_eq!(error(RamError::PartialPage { found, page_size: 4096 }.into()), size);
        }
        assert_eq!(error(StreamError::AdvisedPageSize { found: 3, expected: 4096 }.into()), None);
    }

    #[test]
    fn small_pages_show_in_the_second_address() {
        for size in SMALL {
            let page = size as usize;
            assert_eq!(found(&[ZERO, size | CONTINUE | ZERO], &[1, 1]), Some(size));
            assert_eq!(found(&[PAGE, size | CONTINUE | ZERO], &[page, 1]), Some(size));
            assert_eq!(found(&[PAGE, size | CONTINUE | PAGE], &[page, page]), Some(size));
        }
        for (words, contents) in [
            (&[ZERO, 0x1000 | CONTINUE | ZERO][..], &[1, 1][..]),
            (&[PAGE, 0x1000 | CONTINUE | PAGE], &[4096, 4096]),
            // Pages that come on another channel, or are not sent, are no larger pages.
            (&[ZERO, 0x2000 | CONTINUE | ZERO], &[1, 1]),
            (&[ZERO], &[1]),
            (&[], &[]),
        ] {
            assert_eq!(found(words, contents), None, "{words:x?}");
        }
    }
}
