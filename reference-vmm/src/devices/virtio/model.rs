//! What a device is to the transport that it is on, and what the transport gives it to work with.

use super::chain::Chain;
use super::queue::{Queue, RingError};
use crate::error::Result;
use crate::memory::GuestMemory;
use qevm_microvm::state::VirtioDeviceState;
use std::io;
use std::os::fd::RawFd;

/// Interrupt status: a queue was used; the configuration has changed.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A device behind a transport.
pub(crate) trait Model: Send {
    /// Device number of the virtio specification.
    fn id(&self) -> u32;
    /// Features that it offers: those of QEMU 7.2 to 11.1.
    fn features(&self) -> u64;
    /// The sizes of its queues: what 11.1 gives the guest as QueueNumMax.
    fn queues(&self) -> Vec<u32>;
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// The guest writes to the configuration space.
    fn write_config(&mut self, _offset: usize, _data: &[u8], _features: u64) {}
    /// The guest accepts features.
    fn accepted(&mut self, _features: u64) {}
    /// The guest may have added chains to a queue.
    fn process(&mut self, queue: usize, access: &mut Access<'_>) -> Result<(), RingError>;
    /// The machine goes on: with what a source of migration left undone.
    fn resume(&mut self, _access: &mut Access<'_>) -> Result<(), RingError> {
        Ok(())
    }
    /// The network is to learn where the guest is now.
    fn announce(&mut self, _access: &mut Access<'_>) {}
    /// The machine has stopped, and the device is to finish what it has begun.
    fn drain(&mut self) {}
    /// The machine has stopped, and the device does no more.
    fn pause(&mut self) {}
    /// What is to be done next that may take its time.
    fn task(&mut self, _access: &mut Access<'_>) -> Result<Option<Task>, RingError> {
        Ok(None)
    }
    /// The task is done.
    fn done(&mut self, _result: io::Result<Vec<u8>>, _access: &mut Access<'_>) -> Result<(), RingError> {
        Ok(())
    }
    /// The task is done, too late: what it was for is to be begun anew.
    fn give_up(&mut self, _result: io::Result<Vec<u8>>) {}
    /// A task of a paused machine, which leaves the guest as it is.
    fn flush_task(&mut self) -> Option<Task> {
        None
    }
    /// Whether nothing is left to do for the guest.
    fn is_idle(&self) -> bool {
        true
    }
    /// Whether something is to be flushed before another machine may have the guest.
    fn must_flush(&self) -> bool {
        false
    }
    /// The guest is this machine's from now on: what it uses of the host is claimed.
    ///
    /// # Errors
    /// Another process uses it.
    fn activate(&mut self) -> Result<()> {
        Ok(())
    }
    /// The stopped guest may be another machine's from now on.
    fn inactivate(&mut self) {}
    /// What to wait for: descriptors, which only [`pump`](Model::pump) may close, and the events of `poll`.
    fn interest(&mut self, _access: &mut Access<'_>) -> Result<Vec<(RawFd, i16)>, RingError> {
        Ok(Vec::new())
    }
    /// Some of that has happened.
    fn pump(&mut self, _ready: &[(RawFd, i16)], _access: &mut Access<'_>) -> Result<(), RingError> {
        Ok(())
    }
    /// The guest resets it.
    fn reset(&mut self);
    /// What it has beside the transport.
    fn save(&self) -> VirtioDeviceState;
    /// Takes that over.
    ///
    /// # Errors
    /// Says what does not fit.
    fn load(&mut self, state: &VirtioDeviceState) -> Result<(), String>;
}

/// What a model works with.
pub(crate) struct Access<'a> {
    pub(crate) memory: &'a GuestMemory,
    /// Features that the guest accepted.
    pub(crate) features: u64,
    pub(super) queues: &'a mut [Queue],
    /// Bits of the interrupt status.
    pub(super) raise: u8,
}

impl Access<'_> {
    /// Takes the next chain of a queue; after as many as the queue has entries, none in this turn, and the device's
    /// thread sees to the rest.
    pub(crate) fn pop(&mut self, queue: usize) -> Result<Option<Chain>, RingError> {
        match self.queues.get_mut(queue) {
            Some(queue) => queue.pop(self.memory, self.features),
            None => Ok(None),
        }
    }

    /// Takes the next chain of a queue, whatever was taken in this turn: for replies, whose number is limited.
    pub(crate) fn pop_for_reply(&mut self, queue: usize) -> Result<Option<Chain>, RingError> {
        self.queues.get_mut(queue).into_iter().for_each(Queue::refill);
        self.pop(queue)
    }

    /// The chain that [`pop`](Access::pop) would take.
    pub(crate) fn peek(&self, queue: usize) -> Result<Option<Chain>, RingError> {
        self.peek_at(queue, 0)
    }

    /// The chain that `ahead` more would take.
    pub(crate) fn peek_at(&self, queue: usize, ahead: u16) -> Result<Option<Chain>, RingError> {
        match self.queues.get(queue) {
            Some(queue) => queue.peek(self.memory, ahead),
            None => Ok(None),
        }
    }

    /// The guest is to look at the configuration space.
    pub(crate) fn config_changed(&mut self) {
        self.raise |= ISR_CONFIG;
    }

    /// Gives a chain back, `written` bytes of which were written.
    pub(crate) fn push(&mut self, queue: usize, head: u16, written: u32) -> Result<(), RingError> {
        let Some(queue) = self.queues.get_mut(queue) else { return Ok(()) };
        if queue.push(self.memory, self.features, head, written)? {
            self.raise |= ISR_QUEUE;
        }
        Ok(())
    }
}

/// Something that takes its time, and what comes of it.
pub(crate) struct Task(Box<dyn FnOnce() -> io::Result<Vec<u8>> + Send>);

impl Task {
    pub(crate) fn new(work: impl FnOnce() -> io::Result<Vec<u8>> + Send + 'static) -> Task {
        Task(Box::new(work))
    }

    pub(crate) fn run(self) -> io::Result<Vec<u8>> {
        (self.0)()
    }
}
