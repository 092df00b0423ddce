//! The thread of a device that hears from the host: it waits for what the model is interested in, and lets it work.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::lock;
use super::transport::Transport;
use crate::error::{Error, Result};

/// Makes the thread ask anew what the model is interested in.
#[derive(Clone, Debug)]
pub(super) struct Wake(Arc<EventFd>);

impl Wake {
    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = self.0.write(1);
    }
}

/// Starts the thread for a device that needs one. It ends with [`Transport::end`].
pub(crate) fn start(transport: &Arc<Mutex<Transport>>) -> Result<Option<JoinHandle<()>>> {
    let failed = |cause| Error::Host { what: "start the thread of a virtio device", cause };
    if !lock(transport).has_events() {
        return Ok(None);
    }
    let wake = Wake(Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?));
    lock(transport).set_wake(wake.clone());
    let transport = Arc::clone(transport);
    let thread = thread::Builder::new().name("virtio".into()).spawn(move || pump(&transport, &wake)).map_err(failed)?;
    Ok(Some(thread))
}

fn pump(transport: &Mutex<Transport>, wake: &Wake) {
    loop {
        let Some(interest) = lock(transport).interest() else { return };
        let ready = wait(&interest, wake);
        if !ready.is_empty() {
            lock(transport).pump(&ready);
        }
    }
}

/// Waits for one of the events, or to be woken.
fn wait(interest: &[(RawFd, i16)], wake: &Wake) -> Vec<(RawFd, i16)> {
    let entry = |fd: RawFd, events: i16| libc::pollfd { fd, events, revents: 0 };
    let mut list: Vec<libc::pollfd> = interest.iter().map(|(fd, events)| entry(*fd, *events)).collect();
    list.push(entry(wake.0.as_raw_fd(), libc::POLLIN));
    // SAFETY: the list has as many entries as it says.
    if unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, -1) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            tracing::error!(%error, "cannot wait for the host's side of a virtio device");
        }
        return Vec::new();
    }
    // Another thread may have been faster.
    let _ = wake.0.read();
    list.pop();
    list.iter().filter(|entry| entry.revents != 0).map(|entry| (entry.fd, entry.revents)).collect()
}
