//! Who waits for whom at a destination with page channels, and how long.

use qevm_multifd::{Progress, SyncBarrier, SyncError};
use std::time::Duration;

/// What the main channel met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A flush record.
    Flush,
    /// An EOS of the `ram` section.
    Eos,
}

/// Longest time in which nothing at all arrives while the main channel waits for SYNC packets. The mark on the main
/// channel is sent after them, so whatever is missing is on its way already.
const PATIENCE: Duration = Duration::from_secs(60);

/// The synchronisation of the main channel with the page channels. Readers on several threads share it under a lock,
/// and wake each other after every call.
#[derive(Debug, Clone)]
pub struct Synchronisation {
    barrier: SyncBarrier,
    main: Option<Wait>,
}

/// The main channel waits.
#[derive(Debug, Clone, Copy)]
struct Wait {
    /// Until more synchronisations than this are complete,
    completed: u64,
    /// as long as, by this time,
    until: Duration,
    /// the page channels have received more than this many bytes.
    received: u64,
}

impl Synchronisation {
    /// For this many page channels, 1 to 255. How the source flushes is told by the stream.
    pub fn new(channels: u8) -> Self {
        Synchronisation { barrier: SyncBarrier::new(channels, None), main: None }
    }

    /// The main channel met a mark at time `now`, when the page channels had received this many bytes. It must not be
    /// read further until [`main_waits`](Self::main_waits) says so.
    ///
    /// # Errors
    /// As [`SyncBarrier::main_flush`] and [`SyncBarrier::main_eos`].
    pub fn main(&mut self, mark: Mark, received: u64, now: Duration) -> Result<(), SyncError> {
        let completed = self.barrier.completed();
        let progress = match mark {
            Mark::Flush => self.barrier.main_flush(),
            Mark::Eos => self.barrier.main_eos(),
        }?;
        self.main = (progress == Progress::Wait).then_some(Wait { completed, until: now + PATIENCE, received });
        Ok(())
    }

    /// Until when the main channel waits, if it does. Bytes on a page channel give it more time.
    ///
    /// # Errors
    /// The first error of any reader; [`SyncError::TimedOut`] if nothing has come for too long.
    pub fn main_waits(&mut self, received: u64, now: Duration) -> Result<Option<Duration>, SyncError> {
        self.barrier.healthy()?;
        let Some(wait) = &mut self.main else { return Ok(None) };
        if self.barrier.completed() != wait.completed {
            self.main = None;
            return Ok(None);
        }
        if now >= wait.until {
            if received == wait.received {
                return Err(self.barrier.timed_out());
            }
            (wait.received, wait.until) = (received, now + PATIENCE);
        }
        Ok(Some(wait.until))
    }

    /// The guest's memory is complete.
    ///
    /// # Errors
    /// As [`SyncBarrier::main_end`].
    pub fn main_end(&mut self) -> Result<(), SyncError> {
        self.barrier.main_end()
    }

    /// A page channel met a SYNC packet, whose pages are in their places. It must not be read while
    /// [`channel_waits`](Self::channel_waits). How long is up to the main channel, which may be waiting for its
    /// source's rate limit.
    ///
    /// # Errors
    /// As [`SyncBarrier::channel_sync`].
    pub fn channel_sync(&mut self, channel: u8) -> Result<(), SyncError> {
        self.barrier.channel_sync(channel).map(|_| ())
    }

    /// Whether a page channel waits for the others.
    ///
    /// # Errors
    /// The first error of any reader.
    pub fn channel_waits(&self, channel: u8) -> Result<bool, SyncError> {
        self.barrier.healthy()?;
        Ok(self.barrier.channel_waits(channel))
    }

    /// A page channel was closed at the end of a packet.
    ///
    /// # Errors
    /// As [`SyncBarrier::channel_end`].
    pub fn channel_end(&mut self, channel: u8) -> Result<(), SyncError> {
        self.barrier.channel_end(channel)
    }

    /// A reader has given up for this reason: all that wait for it do so, too.
    pub fn abandon(&mut self, reason: impl Into<String>) {
        self.barrier.abort(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_multifd::Waiting;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_main_channel_waits_as_long_as_bytes_come() {
        let mut sync = Synchronisation::new(2);
        sync.main(Mark::Flush, 0, SECOND).unwrap();
        assert_eq!(sync.main_waits(0, SECOND).unwrap(), Some(61 * SECOND));
        sync.channel_sync(1).unwrap();
        assert!(sync.channel_waits(1).unwrap() && !sync.channel_waits(0).unwrap());
        // Bytes have come: as long again.
        assert_eq!(sync.main_waits(5, 61 * SECOND).unwrap(), Some(121 * SECOND));
        let mut slow = sync.clone();
        let error = slow.main_waits(5, 121 * SECOND).unwrap_err();
        assert_eq!(error, SyncError::TimedOut { waiting: Waiting::Channels(vec![0]) });
        assert_eq!(slow.channel_waits(1), Err(error), "a reader that waits learns of it");
        sync.channel_sync(0).unwrap();
        assert_eq!(sync.main_waits(5, 121 * SECOND).unwrap(), None);
        assert!(!sync.channel_waits(0).unwrap() && !sync.channel_waits(1).unwrap());
    }

    #[test]
    fn no_thread_waits_for_a_reader_that_has_given_up() {
        let mut sync = Synchronisation::new(1);
        sync.main(Mark::Eos, 0, SECOND).unwrap();
        sync.abandon("cut");
        assert!(sync.main_waits(0, SECOND).is_err() && sync.channel_sync(0).is_err());
    }
}
