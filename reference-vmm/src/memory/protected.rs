//! Guest memory that is not written to unseen: Linux' `userfaultfd` for writes.

use super::GuestMemory;
use super::missing::{GROUP, Userfault, available, call};
use linux_raw_sys::general::{
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED,
    UFFDIO_REGISTER_MODE_WP, uffdio_writeprotect,
};
use qevm_migration::{GuestError, MissingPages, ProtectedPages};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use std::sync::Arc;

const WRITEPROTECT: Opcode = opcode::read_write::<uffdio_writeprotect>(GROUP, 6);
/// For a page that was not touched, too (Linux 6.4), and for shared memory and huge pages (5.19).
const FEATURES: u32 = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

/// All blocks of a machine, which can be protected.
pub(crate) struct WriteProtection(Userfault);

impl WriteProtection {
    /// Nothing is protected so far.
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Result<WriteProtection, GuestError> {
        let blocks = memory.blocks().len();
        let faults = Userfault::with(memory, FEATURES.into())?;
        (0..blocks).try_for_each(|number| faults.register(number, UFFDIO_REGISTER_MODE_WP))?;
        Ok(WriteProtection(faults))
    }

    /// Whether the kernel can do that.
    pub(crate) fn is_available() -> bool {
        available(FEATURES).is_ok()
    }

    fn protect_range(&self, block: usize, offset: u64, len: u64, protect: bool) -> Result<(), GuestError> {
        let range = self.0.place(block, offset, len)?;
        // The kernel's only bit of it.
        let mut mode = uffdio_writeprotect { range, mode: u64::from(protect) };
        loop {
            match call::<WRITEPROTECT, _>(&self.0.faults, &mut mode) {
                // Other changes of the process' memory came in between.
                Err(Errno::AGAIN) => {}
                done => return Ok(done?),
            }
        }
    }
}

impl ProtectedPages for WriteProtection {
    fn protect(&self, number: usize) -> Result<u64, GuestError> {
        let block = self.0.block(number)?;
        self.protect_range(number, 0, block.max_length(), true)?;
        Ok(block.host_page_size())
    }

    fn wait(&self) -> Result<Option<(usize, u64)>, GuestError> {
        Ok(self.0.wait()?.map(|touch| (touch.block, touch.offset)))
    }

    fn unprotect(&self, block: usize, offset: u64, len: u64) -> Result<(), GuestError> {
        self.protect_range(block, offset, len, false)
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn release(&self) -> Result<(), GuestError> {
        self.0.release()
    }
}
