//! The thread of a device: it waits for what the model is interested in on the host's side, and lets it work; it does
//! what takes its time at the host, a disk's requests; and it goes on with what was too much for one notification of
//! the guest's. Between two turns the device is free for others, and when the machine is to stop there is no further
//! turn.

use super::transport::Transport;
use super::wake::Wake;
use crate::error::{Error, Result};
use parking_lot::Mutex;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Starts the thread of a device. It ends with [`Transport::end`]. `may_run` says whether the machine runs, and is not
/// about to stop.
pub(crate) fn start(
    transport: &Arc<Mutex<Transport>>,
    may_run: impl Fn() -> bool + Send + 'static,
) -> Result<JoinHandle<()>> {
    let failed = |cause| Error::Host { what: "start the thread of a virtio device", cause };
    let wake = Wake::new().map_err(failed)?;
    transport.lock().set_wake(wake.clone());
    let transport = Arc::clone(transport);
    thread::Builder::new().name("virtio".into()).spawn(move || pump(&transport, &wake, may_run)).map_err(failed)
}

fn pump(transport: &Mutex<Transport>, wake: &Wake, may_run: impl Fn() -> bool) {
    loop {
        let mut device = transport.lock();
        let Some(interest) = device.interest() else { return };
        let left = device.has_left() && may_run();
        let task = device.next_task();
        drop(device);
        let ready = wait(&interest, wake, !left && task.is_none());
        if !ready.is_empty() {
            transport.lock().pump(&ready);
        }
        if left && may_run() {
            transport.lock().process_left();
        }
        if let Some(task) = task {
            let result = task.run();
            transport.lock().finish_task(result);
        }
    }
}

/// Waits for one of the events, or to be woken; or only looks.
fn wait(interest: &[(RawFd, i16)], wake: &Wake, patient: bool) -> Vec<(RawFd, i16)> {
    let timeout = if patient { -1 } else { 0 };
    let entry = |fd: RawFd, events: i16| libc::pollfd { fd, events, revents: 0 };
    let mut list: Vec<libc::pollfd> = interest.iter().map(|(fd, events)| entry(*fd, *events)).collect();
    list.push(entry(wake.descriptor(), libc::POLLIN));
    // SAFETY: the list has as many entries as it says.
    if unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, timeout) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            tracing::error!(%error, "cannot wait for the host's side of a virtio device");
        }
        return Vec::new();
    }
    wake.awake();
    list.pop();
    list.iter().filter(|entry| entry.revents != 0).map(|entry| (entry.fd, entry.revents)).collect()
}
