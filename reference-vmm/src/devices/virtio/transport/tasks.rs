//! Work of a device that may take as long as the host's disk does: its thread does it without the device's lock, and
//! the guest's memory is touched under the lock and while the machine runs, only.

use super::{Phase, Transport};
use crate::devices::virtio::model::Task;
use parking_lot::Mutex;
use std::io;
use std::time::Instant;

impl Transport {
    /// What the device's thread is to do next. It says with [`finish_task`](Transport::finish_task) that it has.
    pub(in super::super) fn next_task(&mut self) -> Option<Task> {
        let mut task = None;
        if self.phase == Phase::Paused || self.broken {
            task = self.model.flush_task();
        } else {
            self.work(|model, access| {
                task = model.task(access)?;
                Ok(())
            });
        }
        self.busy = task.is_some();
        self.idle.notify_all();
        task
    }

    /// The task is done. What it was for is done as well, unless the machine has stopped meanwhile: then it is begun
    /// anew when the guest goes on, here or elsewhere.
    pub(in super::super) fn finish_task(&mut self, result: io::Result<Vec<u8>>) {
        self.busy = false;
        if self.phase == Phase::Paused || self.broken {
            self.model.give_up(result);
        } else {
            self.work(|model, access| model.done(result, access));
        }
        self.idle.notify_all();
    }

    /// Nothing is under way at the host, and nothing is to be flushed.
    fn is_settled(&self) -> bool {
        !self.busy && !self.model.must_flush()
    }
}

/// The machine has stopped: lets the device finish what it has begun, until the deadline. What is not done then stays
/// undone; the guest sees no more of it in any case when this returns.
pub(crate) fn drain(device: &Mutex<Transport>, deadline: Instant) {
    let mut device = device.lock();
    if device.phase == Phase::Running {
        device.phase = Phase::Draining;
        device.model.drain();
        device.wake();
        let drained = |device: &Transport| device.is_settled() && (device.broken || device.model.is_idle());
        device = wait_until(device, deadline, drained);
    }
    device.pause();
}

/// Waits until nothing of the device is under way at the host, so that another machine can have its guest. False: it
/// still was at the deadline.
pub(crate) fn settle(device: &Mutex<Transport>, deadline: Instant) -> bool {
    wait_until(device.lock(), deadline, Transport::is_settled).is_settled()
}

type Guard<'a> = parking_lot::MutexGuard<'a, Transport>;

/// A device without a thread does nothing that could be waited for.
fn wait_until(mut device: Guard<'_>, deadline: Instant, happened: impl Fn(&Transport) -> bool) -> Guard<'_> {
    let idle = device.idle.clone();
    while device.wake.is_some() && !happened(&device) {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
        idle.wait_for(&mut device, left);
    }
    device
}
