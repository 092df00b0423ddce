//! The preempt channel of a source: pages that the guest waits for, sent by the thread that receives the requests.
//!
//! To wake another thread takes about as long as to send a page. The core learns of it when it is polled next.

use super::core::source::{Batch, Sent};
use super::ram_sender::RamSender;
use super::return_path::ReturnPath;
use super::{Channel, MigrationError};
use parking_lot::{Mutex, MutexGuard};
use qevm_savevm::StreamWriter;
use std::sync::Arc;

/// The preempt channel, which two threads may use.
#[derive(Default)]
pub(crate) struct Urgent {
    /// With what writes its records, once pages may be sent on it.
    channel: Mutex<Option<(Arc<dyn Channel>, StreamWriter)>>,
}

impl Urgent {
    /// Pages may be sent from here on.
    pub(crate) fn begin(&self, channel: Arc<dyn Channel>, stream: StreamWriter) {
        *self.lock() = Some((channel, stream));
    }

    /// The channel was lost.
    pub(crate) fn forget(&self) {
        *self.lock() = None;
    }

    /// Sends pages that are sent nowhere else.
    ///
    /// # Errors
    /// There is no channel, or it has failed.
    pub(crate) fn send(&self, ram: &RamSender<'_>, batch: &Batch) -> Result<Sent, MigrationError> {
        let mut channel = self.lock();
        let (channel, stream) = channel.as_mut().ok_or_else(missing)?;
        ram.send(&**channel, stream, batch)
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub(crate) fn end(&self, ram: &RamSender<'_>) -> Result<Sent, MigrationError> {
        let mut channel = self.lock();
        let (channel, stream) = channel.as_mut().ok_or_else(missing)?;
        stream.eos()?;
        ram.send(&**channel, stream, &Batch::default())
    }

    /// Sends what the guest waits for. False if the core has to learn of it, because others send it or nothing is left.
    ///
    /// # Errors
    /// The channel has failed.
    pub(crate) fn serve(&self, ram: &RamSender<'_>, path: &ReturnPath) -> Result<bool, MigrationError> {
        let mut channel = self.lock();
        let Some((channel, stream)) = channel.as_mut() else { return Ok(false) };
        loop {
            let mut answers = path.answers();
            let Some(batch) = answers.next_urgent() else { return Ok(!answers.nothing_is_left()) };
            drop(answers);
            let sent = ram.send(&**channel, stream, &batch)?;
            path.answers().urgent_sent(sent);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Arc<dyn Channel>, StreamWriter)>> {
        self.channel.lock()
    }
}

/// There is no preempt channel.
pub(super) fn missing() -> MigrationError {
    MigrationError::guest("send a page that is waited for")("there is no preempt channel".into())
}
