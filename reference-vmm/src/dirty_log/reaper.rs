//! A thread that harvests dirty rings now and then, so that vCPUs seldom leave the guest for it.

use super::DirtyLog;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// From one harvest to the next (QEMU 6.1 to 11.1).
const PERIOD: Duration = Duration::from_secs(1);

/// The thread. It ends with this.
pub(crate) struct Reaper {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    /// Starts it, if the log has rings.
    pub(crate) fn start(log: &Arc<DirtyLog>) -> Result<Reaper> {
        let (end, ended) = channel();
        if log.ring_size() == 0 {
            return Ok(Reaper { end: None, thread: None });
        }
        let log = log.clone();
        let body = move || {
            while ended.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = log.reap() {
                    tracing::error!(%error, "the dirty rings are not harvested");
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("reaper".into())
            .spawn(body)
            .map_err(|cause| Error::Host { what: "start the thread that harvests dirty rings", cause })?;
        Ok(Reaper { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that harvests dirty rings panicked");
        }
    }
}
