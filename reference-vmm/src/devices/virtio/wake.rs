//! What wakes the thread of a device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Makes the thread ask anew what the model is interested in.
#[derive(Clone, Debug)]
pub(super) struct Wake(Arc<EventFd>);

impl Wake {
    pub(super) fn new() -> io::Result<Wake> {
        Ok(Wake(Arc::new(EventFd::new(EFD_NONBLOCK)?)))
    }

    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = self.0.write(1);
    }

    /// What to wait for, beside other descriptors.
    pub(super) fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The thread is awake. Another thread may have been faster to say so.
    pub(super) fn awake(&self) {
        let _ = self.0.read();
    }
}
