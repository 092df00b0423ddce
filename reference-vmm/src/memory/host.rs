//! The host's memory behind a block.

use std::io;
use std::ptr::NonNull;

/// What a huge page of x86 covers. Memory that starts at a multiple of it can be mapped into the guest in huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed, private memory, in huge pages where the host has them (`madvise`), which spares most of the page faults of a
/// migration that fills it. It goes back to the host when this is dropped.
#[derive(Debug)]
pub(super) struct HostMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: this owns the mapping, as a box does; nothing here reaches into it.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Memory for `len` bytes, a number of whole pages. The host backs a page when it is first written to.
    pub(super) fn new(len: usize) -> io::Result<HostMemory> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let room = len.checked_add(HUGE_PAGE).ok_or_else(too_large)?;
        // SAFETY: a new mapping at a place that the kernel chooses touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), room, protection, flags | libc::MAP_NORESERVE, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = start.align_offset(HUGE_PAGE);
        let aligned = start.wrapping_byte_add(before);
        // SAFETY: both ends are whole pages of the mapping made above, which nobody uses. The kernel refuses to give up
        // nothing at all, which is as well.
        unsafe {
            libc::munmap(start, before);
            libc::munmap(aligned.wrapping_byte_add(len), HUGE_PAGE - before);
        }
        // SAFETY: advice on memory of ours; a kernel without huge pages refuses it, and small ones do as well.
        unsafe { libc::madvise(aligned, len, libc::MADV_HUGEPAGE) };
        // SAFETY: advice on memory of ours, which has the guest's secrets. The whole process is kept out of dumps, too, but
        // that can be undone from outside.
        unsafe { libc::madvise(aligned, len, libc::MADV_DONTDUMP) };
        let start = NonNull::new(aligned.cast()).ok_or_else(too_large)?;
        Ok(HostMemory { start, len })
    }

    /// Where it lies.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Makes the host back all of it now.
    pub(super) fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is a mapping of ours; this writes nothing that can be seen.
        match unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever was given its address borrows from the block that owns this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_at_a_huge_page() {
        for len in [4096, HUGE_PAGE - 4096, HUGE_PAGE, 3 * HUGE_PAGE + 8192] {
            let memory = HostMemory::new(len).unwrap();
            assert_eq!(memory.start().align_offset(HUGE_PAGE), 0);
            // SAFETY: the last byte of the mapping.
            assert_eq!(unsafe { memory.start().add(len - 1).read() }, 0);
        }
        assert!(HostMemory::new(usize::MAX - 4095).is_err());
    }

    #[test]
    fn populated_memory_is_there() {
        let memory = HostMemory::new(8 << 20).unwrap();
        let resident = || {
            let mut pages = vec![0u8; memory.len / 4096];
            // SAFETY: one byte for each page of the mapping.
            let told = unsafe { libc::mincore(memory.start().cast(), memory.len, pages.as_mut_ptr()) };
            assert_eq!(told, 0, "{}", io::Error::last_os_error());
            pages.iter().filter(|page| **page & 1 == 1).count()
        };
        assert_eq!(resident(), 0);
        memory.populate().unwrap();
        assert_eq!(resident(), 2048);
    }
}
