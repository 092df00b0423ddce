//! Pages of a file that this process and others have in common, such as those of a device's BAR.

use super::host::{HostMemory, PAGE_SIZE, Wanted};
use std::fs::File;
use std::io;

/// Pages of a file. They are mapped as long as this lives, and nothing here reaches into them.
#[derive(Debug)]
pub struct SharedPages {
    memory: HostMemory,
    len: u64,
}

impl SharedPages {
    /// Maps `len` bytes of a file from `offset` on, whole pages.
    ///
    /// # Errors
    /// The host's; `InvalidInput` where they are no whole pages, or none.
    pub fn map(file: &File, offset: u64, len: u64) -> io::Result<SharedPages> {
        let whole = len > 0 && len.is_multiple_of(PAGE_SIZE) && offset.is_multiple_of(PAGE_SIZE);
        let bytes = usize::try_from(len).ok().filter(|_| whole).ok_or(io::ErrorKind::InvalidInput)?;
        let wanted = Wanted { file: Some((file, offset)), share: true, reserve: true, ..Wanted::ANONYMOUS };
        Ok(SharedPages { memory: HostMemory::new(bytes, wanted)?, len })
    }

    /// How many bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where they are.
    pub(crate) fn host_address(&self) -> *mut u8 {
        self.memory.start()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_are_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * PAGE_SIZE).unwrap();
        let pages = SharedPages::map(&file, PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        assert_eq!(pages.len(), 2 * PAGE_SIZE);
        for (offset, len) in [(0, 0), (0, 1), (1, PAGE_SIZE), (0, PAGE_SIZE + 1), (u64::MAX - 4095, PAGE_SIZE)] {
            assert!(SharedPages::map(&file, offset, len).is_err(), "{offset} {len}");
        }
    }
}
