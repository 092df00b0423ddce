//! What the thread that looks for dirty pages hands to the threads that send them.

use crate::MigrationError;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;

/// Pages of one RAM block for one packet.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Number of the block in [`Guest::ram`](crate::Guest::ram).
    pub(crate) block: usize,
    /// Offsets of the pages in the block, in bytes.
    pub(crate) pages: Vec<u64>,
}

/// What a sending thread is to do next.
#[derive(Debug)]
pub(crate) enum Work {
    /// Send these pages.
    Pages(Batch),
    /// Send a SYNC packet.
    Sync,
    /// Send the next piece of the state of a device: that of this transfer.
    Transfer(usize),
    /// End: the migration is over or has failed.
    End,
}

/// Counts of what the channels have sent since they were last asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) bytes: u64,
    pub(crate) normal: u64,
    pub(crate) zero: u64,
    /// Synchronisations of a channel before which all of its pages were copied, though they were to be sent in place.
    pub(crate) copied: u64,
}

/// A bounded queue of batches, from which whichever channel is free takes the next.
///
/// One batch for each channel waits here at most: the sending thread sleeps until there is room. A synchronisation
/// returns when every channel has sent all its pages and its SYNC packet, so no page of a later round overtakes one of
/// an earlier round on its own channel.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// For the filling thread: room, a SYNC packet sent, a failure.
    progress: Condvar,
    /// For the sending threads: work.
    work: Condvar,
    channels: usize,
}

#[derive(Debug, Default)]
struct State {
    batches: VecDeque<Batch>,
    /// Synchronisations asked for.
    wanted: u64,
    /// SYNC packets sent for the last of them.
    synced: usize,
    /// Transfers of devices' state that are not over; who takes one puts it back to the end.
    transfers: VecDeque<usize>,
    /// Pieces that are being sent.
    in_hand: usize,
    ended: bool,
    failure: Option<MigrationError>,
    counts: Counts,
}

impl Queue {
    pub(crate) fn new(channels: u8) -> Self {
        Queue {
            state: Mutex::default(),
            progress: Condvar::new(),
            work: Condvar::new(),
            channels: usize::from(channels).max(1),
        }
    }

    /// Hands over a batch, when there is room for it.
    ///
    /// # Errors
    /// What ended a channel.
    pub(crate) fn push(&self, batch: Batch) -> Result<(), MigrationError> {
        let full = |state: &mut State| state.batches.len() >= self.channels && !state.ended;
        let mut state = self.lock();
        self.progress.wait_while(&mut state, full);
        state.check()?;
        state.batches.push_back(batch);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Synchronises the channels: returns when all have sent what was queued, and a SYNC packet after it.
    ///
    /// # Errors
    /// What ended a channel.
    pub(crate) fn synchronise(&self) -> Result<(), MigrationError> {
        let mut state = self.lock();
        state.check()?;
        state.wanted += 1;
        state.synced = 0;
        self.work.notify_all();
        let waiting = |state: &mut State| state.synced < self.channels && !state.ended;
        self.progress.wait_while(&mut state, waiting);
        state.check()
    }

    /// Lets the channels send the state of this many devices whenever they have nothing else to do.
    pub(crate) fn begin_transfers(&self, count: usize) {
        self.lock().transfers = (0..count).collect();
        self.work.notify_all();
    }

    /// Returns when all of it was sent.
    ///
    /// # Errors
    /// What ended a channel.
    pub(crate) fn finish_transfers(&self) -> Result<(), MigrationError> {
        let busy = |state: &mut State| !state.ended && (!state.transfers.is_empty() || state.in_hand > 0);
        let mut state = self.lock();
        self.progress.wait_while(&mut state, busy);
        state.check()
    }

    /// Counts since the last call.
    pub(crate) fn take_counts(&self) -> Counts {
        std::mem::take(&mut self.lock().counts)
    }

    /// Lets all threads end.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.work.notify_all();
        self.progress.notify_all();
    }

    /// Waits for work for a channel that has sent `synced` SYNC packets so far.
    pub(super) fn next(&self, synced: u64) -> Work {
        let idle = |state: &mut State| {
            !state.ended && state.batches.is_empty() && state.wanted == synced && state.transfers.is_empty()
        };
        let mut state = self.lock();
        self.work.wait_while(&mut state, idle);
        if state.ended {
            return Work::End;
        }
        match state.batches.pop_front() {
            Some(batch) => {
                drop(state);
                self.progress.notify_one();
                Work::Pages(batch)
            }
            None if state.wanted != synced => Work::Sync,
            // Only now: a channel that has sent its SYNC packet must not have something of before it in hand.
            None => match state.transfers.pop_front() {
                Some(transfer) => {
                    state.transfers.push_back(transfer);
                    state.in_hand += 1;
                    Work::Transfer(transfer)
                }
                None => Work::End,
            },
        }
    }

    /// A piece of a transfer was sent, the last one or not.
    pub(super) fn transferred(&self, transfer: usize, over: bool) {
        let mut state = self.lock();
        state.in_hand -= 1;
        if over {
            state.transfers.retain(|other| *other != transfer);
        }
        drop(state);
        self.progress.notify_one();
    }

    /// A channel has sent something.
    pub(super) fn sent(&self, counts: Counts) {
        let mut state = self.lock();
        state.counts.bytes += counts.bytes;
        state.counts.normal += counts.normal;
        state.counts.zero += counts.zero;
        state.counts.copied += counts.copied;
    }

    /// A channel has sent its SYNC packet.
    pub(super) fn synced(&self) {
        self.lock().synced += 1;
        self.progress.notify_one();
    }

    /// A channel is broken. The first failure is the one that is reported.
    pub(super) fn fail(&self, error: MigrationError) {
        self.lock().failure.get_or_insert(error);
        self.end();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    /// The failure is given once; who asks again is told that the channels have ended.
    fn check(&mut self) -> Result<(), MigrationError> {
        match self.failure.take() {
            Some(error) => Err(error),
            None if self.ended => Err(MigrationError::ChannelsEnded),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    fn batch(page: u64) -> Batch {
        Batch { block: 0, pages: vec![page] }
    }

    #[test]
    fn everything_is_sent_once_and_before_the_sync() {
        let (queue, sent) = (Queue::new(3), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut synced = 0;
                    loop {
                        match queue.next(synced) {
                            Work::Pages(batch) => sent.lock().extend(batch.pages),
                            Work::Sync => {
                                synced += 1;
                                queue.synced();
                            }
                            Work::Transfer(_) | Work::End => break,
                        }
                    }
                });
            }
            for round in 0..20 {
                for page in 0..50 {
                    queue.push(batch(page)).unwrap();
                }
                queue.synchronise().unwrap();
                let mut pages = std::mem::take(&mut *sent.lock());
                pages.sort_unstable();
                assert_eq!(pages, (0..50).collect::<Vec<_>>(), "round {round}");
            }
            queue.end();
        });
    }

    #[test]
    fn a_full_queue_holds_back_until_there_is_room() {
        let (queue, pushed) = (Queue::new(2), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                for page in 0..5 {
                    queue.push(batch(page)).unwrap();
                    pushed.fetch_add(1, Ordering::SeqCst);
                }
            });
            while pushed.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(50));
            assert_eq!(pushed.load(Ordering::SeqCst), 2, "there is no room");
            for _ in 0..5 {
                assert!(matches!(queue.next(0), Work::Pages(_)));
            }
        });
        assert_eq!(pushed.load(Ordering::SeqCst), 5);
    }

    #[test]
    fn a_broken_channel_wakes_every_thread_that_waits() {
        let queue = Queue::new(1);
        queue.push(batch(0)).unwrap();
        thread::scope(|scope| {
            let pushing = scope.spawn(|| queue.push(batch(1)));
            thread::sleep(Duration::from_millis(20));
            queue.fail(MigrationError::Cancelled);
            assert!(matches!(pushing.join().unwrap(), Err(MigrationError::Cancelled)));
        });
        assert!(matches!(queue.synchronise(), Err(MigrationError::ChannelsEnded)));
        assert!(matches!(queue.next(0), Work::End));
    }
}
