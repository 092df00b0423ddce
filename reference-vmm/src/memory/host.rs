//! The host's memory behind a block.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// The target page of x86, the unit of the wire and of the dirty log.
pub const PAGE_SIZE: u64 = 4096;

/// What a huge page of x86 covers. Memory that starts at a multiple of it can be mapped into the guest in huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// A mapping for the guest. Anonymous memory is in huge pages where the host has them (`madvise`), which spares most of
/// the page faults of a migration that fills it. It goes back to the host when this is dropped.
#[derive(Debug)]
pub(super) struct HostMemory {
    start: NonNull<u8>,
    len: usize,
    share: bool,
    /// It is a private copy of a file.
    copy: bool,
}

// SAFETY: this owns the mapping, as a box does; nothing here reaches into it.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

/// What is mapped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'f> {
    /// A file, and where in it; otherwise it is anonymous, zeroed memory.
    pub(super) file: Option<(&'f File, u64)>,
    /// Other processes, or other mappings of the file, see what is written.
    pub(super) share: bool,
    /// The host sets the memory aside now, or refuses.
    pub(super) reserve: bool,
    /// Bytes of a page of the file, a power of two.
    pub(super) page_size: usize,
}

impl Wanted<'_> {
    /// Zeroed, private memory, which the host sets aside as it is written to.
    pub(super) const ANONYMOUS: Wanted<'static> =
        Wanted { file: None, share: false, reserve: false, page_size: PAGE_SIZE as usize };
}

impl HostMemory {
    /// Memory for `len` bytes, a number of whole pages. The host backs a page when it is first written to.
    pub(super) fn new(len: usize, wanted: Wanted<'_>) -> io::Result<HostMemory> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let align = wanted.page_size.max(HUGE_PAGE);
        let room = len.checked_add(align).ok_or_else(too_large)?;
        let nowhere = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place that the kernel chooses touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, nowhere, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = start.align_offset(align);
        let aligned = start.wrapping_byte_add(before);
        // SAFETY: both ends are whole pages of the mapping made above, which is unused. The kernel refuses to give up
        // nothing at all, which is as well.
        unsafe {
            libc::munmap(start, before);
            libc::munmap(aligned.wrapping_byte_add(len), align - before);
        }
        // From here on it is given back whatever happens.
        let start = NonNull::new(aligned.cast()).ok_or_else(too_large)?;
        let memory = HostMemory { start, len, share: wanted.share, copy: wanted.file.is_some() && !wanted.share };
        let (fd, offset) = match wanted.file {
            Some((file, offset)) => (file.as_raw_fd(), offset.try_into().map_err(|_| too_large())?),
            None => (-1, 0),
        };
        let flags = [
            (true, libc::MAP_FIXED),
            (wanted.file.is_none(), libc::MAP_ANONYMOUS),
            (wanted.share, libc::MAP_SHARED),
            (!wanted.share, libc::MAP_PRIVATE),
            (!wanted.reserve, libc::MAP_NORESERVE),
        ];
        let flags = flags.into_iter().filter(|(on, _)| *on).fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: it takes the place of what is left of the mapping made above, which is unused.
        let mapped = unsafe { libc::mmap(aligned, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Hosts seldom give huge pages to files, and a file's own are not asked for.
        if wanted.file.is_none() {
            memory.hint(libc::MADV_HUGEPAGE);
        }
        // It has the guest's secrets. The whole process is kept out of dumps, too, but that can be undone from outside.
        memory.hint(libc::MADV_DONTDUMP);
        Ok(memory)
    }

    /// Whether it is a private copy of a file, which shows the file's pages when it is given back.
    pub(super) fn is_copy(&self) -> bool {
        self.copy
    }

    /// Where it lies.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Gives bytes of it back to the host: they are zero, and missing, until they are touched. Private memory of a
    /// file becomes what the file holds.
    pub(super) fn discard(&self, bytes: Range<usize>) -> io::Result<()> {
        self.advise_part(bytes, if self.share { libc::MADV_REMOVE } else { libc::MADV_DONTNEED })
    }

    /// Lets the host keep pages of the same content once.
    pub(super) fn merge(&self) {
        self.hint(libc::MADV_MERGEABLE);
    }

    /// Makes the host back all of it now.
    pub(super) fn populate(&self) -> io::Result<()> {
        self.advise(libc::MADV_POPULATE_WRITE)
    }

    /// Advice that a kernel which does not know it may refuse.
    fn hint(&self, advice: libc::c_int) {
        // Everything works without.
        let _ = self.advise(advice);
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        self.advise_part(0..self.len, advice)
    }

    fn advise_part(&self, bytes: Range<usize>, advice: libc::c_int) -> io::Result<()> {
        let len = bytes.len();
        if bytes.end > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.start().wrapping_add(bytes.start);
        // SAFETY: the range lies in a mapping of ours, as was checked. Where the advice changes its content, that is
        // what the guest's owner wants; there is no reference into it, as vCPUs change it, too.
        match unsafe { libc::madvise(start.cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and what was given its address borrows from the block that owns this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn memory_begins_at_a_huge_page() {
        for len in [4096, HUGE_PAGE - 4096, HUGE_PAGE, 3 * HUGE_PAGE + 8192] {
            let memory = HostMemory::new(len, Wanted::ANONYMOUS).unwrap();
            assert_eq!(memory.start().align_offset(HUGE_PAGE), 0);
            // The host backs the mapping to its last page, and no further.
            memory.populate().unwrap();
            assert_eq!(resident(&memory), len / 4096);
        }
        assert!(HostMemory::new(usize::MAX - 4095, Wanted::ANONYMOUS).is_err());
    }

    #[test]
    fn populated_memory_is_there() {
        let memory = HostMemory::new(8 << 20, Wanted::ANONYMOUS).unwrap();
        assert_eq!(resident(&memory), 0);
        memory.populate().unwrap();
        assert_eq!(resident(&memory), 2048);
    }

    /// Pages that the host backs, by the bits of `/proc/self/pagemap`.
    fn resident(memory: &HostMemory) -> usize {
        let mut bits = vec![0; memory.len / 4096 * 8];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut bits, memory.start() as u64 / 4096 * 8).unwrap();
        bits.chunks(8).filter(|page| page[7] & 0x80 != 0).count()
    }
}
