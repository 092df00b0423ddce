//! Where frames go and come from: QEMU's `-netdev`.

use crate::error::{Error, Result};
use qevm_migration::private;
use rustix::fs::{OFlags, fcntl_setfl};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

/// Largest frame, with what offloads make of it.
pub(crate) const MAX_FRAME: usize = 65_550;
/// Largest header that a tap device puts before a frame.
pub(crate) const MAX_HEADER: usize = 12;

const TUN_DEVICE: &str = "/dev/net/tun";

/// What to open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetdevOptions {
    /// A tap interface, which is there or can be made.
    Tap {
        /// Its name.
        ifname: String,
    },
    /// Datagrams over UNIX sockets, a frame each.
    Dgram {
        /// Where frames come in.
        local: PathBuf,
        /// Where they go.
        remote: PathBuf,
    },
    /// A UNIX stream: each frame is preceded by its length, 32 bits in network order.
    Stream {
        /// The socket.
        path: PathBuf,
        /// Wait for a peer there, and do not connect.
        server: bool,
    },
}

/// An open network backend. Frames that cannot be taken are dropped, as on a wire.
#[derive(Debug)]
pub struct Netdev(End);

#[derive(Debug)]
enum End {
    Tap(File),
    Dgram { socket: UnixDatagram, remote: PathBuf, local: PathBuf, connected: bool },
    Stream(Box<Stream>),
}

#[derive(Debug, Default)]
struct Stream {
    listener: Option<UnixListener>,
    stream: Option<UnixStream>,
    dead: bool,
    /// What came and is no whole frame yet.
    inbox: Vec<u8>,
    /// The rest of a frame that was sent in part.
    outbox: Vec<u8>,
}

mod ioctl {
    vmm_sys_util::ioctl_iow_nr!(TUNSETIFF, b'T' as u32, 202, i32);
    vmm_sys_util::ioctl_iow_nr!(TUNSETOFFLOAD, b'T' as u32, 208, u32);
    vmm_sys_util::ioctl_iow_nr!(TUNSETVNETHDRSZ, b'T' as u32, 216, i32);
}

impl Netdev {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Config`] naming what cannot be opened.
    pub fn open(options: &NetdevOptions) -> Result<Netdev> {
        let failed = |what: String| move |cause: io::Error| Error::Config(format!("cannot {what}: {cause}"));
        Ok(Netdev(match options {
            NetdevOptions::Tap { ifname } => {
                End::Tap(open_tap(ifname).map_err(failed(format!("use the tap interface {ifname}")))?)
            }
            NetdevOptions::Dgram { local, remote } => {
                let open = || -> io::Result<UnixDatagram> {
                    let _ = std::fs::remove_file(local);
                    let socket = private::datagram(local)?;
                    socket.set_nonblocking(true)?;
                    Ok(socket)
                };
                let socket = open().map_err(failed(format!("use the socket {}", local.display())))?;
                End::Dgram { socket, remote: remote.clone(), local: local.clone(), connected: false }
            }
            NetdevOptions::Stream { path, server } => {
                let open = || -> io::Result<Stream> {
                    if *server {
                        let _ = std::fs::remove_file(path);
                        let listener = private::listener(path)?;
                        listener.set_nonblocking(true)?;
                        return Ok(Stream { listener: Some(listener), ..Stream::default() });
                    }
                    let stream = UnixStream::connect(path)?;
                    stream.set_nonblocking(true)?;
                    Ok(Stream { stream: Some(stream), ..Stream::default() })
                };
                End::Stream(Box::new(open().map_err(failed(format!("use the socket {}", path.display())))?))
            }
        }))
    }

    /// Whether frames carry a virtio header on the host's side.
    pub(crate) fn has_header(&self) -> bool {
        matches!(self.0, End::Tap(_))
    }

    /// Says how long that header is, and what frames from the host may be left to the guest (`TUN_F_*`).
    pub(crate) fn set_up(&self, header: usize, offloads: u32) {
        let End::Tap(file) = &self.0 else { return };
        let header = header as i32;
        // SAFETY: the descriptor is a tap interface's; the kernel reads an integer, and takes the second argument as it
        // is.
        let done = unsafe {
            libc::ioctl(file.as_raw_fd(), ioctl::TUNSETVNETHDRSZ(), &raw const header) >= 0
                && libc::ioctl(file.as_raw_fd(), ioctl::TUNSETOFFLOAD(), libc::c_ulong::from(offloads)) >= 0
        };
        if !done {
            tracing::warn!(error = %io::Error::last_os_error(), "the tap interface does not do what the guest asks for");
        }
    }

    /// Sends a frame, with the header if there is one. False: not now, it is to be sent again.
    pub(crate) fn send(&mut self, frame: &[u8]) -> bool {
        match &mut self.0 {
            End::Tap(file) => !matches!(file.write(frame), Err(error) if error.kind() == io::ErrorKind::WouldBlock),
            End::Dgram { socket, remote, connected, .. } => {
                // The second time after the peer has been another one.
                for _ in 0..2 {
                    *connected = *connected || socket.connect(&remote).is_ok();
                    match socket.send(frame) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                        Err(_) if *connected => *connected = false,
                        _ => return true,
                    }
                }
                true
            }
            End::Stream(stream) => stream.send(frame),
        }
    }

    /// Receives a frame; 0 bytes when there is none for now.
    pub(crate) fn receive(&mut self, into: &mut [u8]) -> usize {
        match &mut self.0 {
            End::Tap(file) => file.read(into).unwrap_or(0),
            End::Dgram { socket, .. } => socket.recv(into).unwrap_or(0),
            End::Stream(stream) => stream.receive(into),
        }
    }

    /// What to poll it for, when frames are wanted and when one waits to be sent.
    pub(crate) fn interest(&self, frames_wanted: bool, frame_waits: bool) -> Vec<(RawFd, i16)> {
        let mut events = 0;
        events |= if frames_wanted { libc::POLLIN } else { 0 };
        events |= if frame_waits { libc::POLLOUT } else { 0 };
        match &self.0 {
            End::Tap(file) => vec![(file.as_raw_fd(), events)],
            End::Dgram { socket, .. } => vec![(socket.as_raw_fd(), events)],
            End::Stream(stream) => match (&stream.stream, &stream.listener) {
                (Some(open), _) => {
                    let unsent = if stream.outbox.is_empty() { 0 } else { libc::POLLOUT };
                    vec![(open.as_raw_fd(), events | unsent)]
                }
                (None, Some(listener)) => vec![(listener.as_raw_fd(), libc::POLLIN)],
                (None, None) => Vec::new(),
            },
        }
    }

    /// After a poll: takes a peer, and drops one that is gone.
    pub(crate) fn settle(&mut self, ready: &[(RawFd, i16)]) {
        if let End::Stream(stream) = &mut self.0 {
            stream.settle(ready);
        }
    }
}

impl Drop for Netdev {
    fn drop(&mut self) {
        if let End::Dgram { local, .. } = &self.0 {
            let _ = std::fs::remove_file(local);
        }
    }
}

impl Stream {
    /// True if nothing is left to be sent.
    fn flush(&mut self) -> bool {
        while !self.outbox.is_empty()
            && !self.dead
            && let Some(stream) = &mut self.stream
        {
            match stream.write(&self.outbox) {
                Ok(count) => drop(self.outbox.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.dead = true,
            }
        }
        true
    }

    fn send(&mut self, frame: &[u8]) -> bool {
        if !self.flush() {
            return false;
        }
        if self.stream.is_some() && !self.dead {
            self.outbox.extend((frame.len() as u32).to_be_bytes());
            self.outbox.extend(frame);
            self.flush();
        }
        true
    }

    fn receive(&mut self, into: &mut [u8]) -> usize {
        const LENGTH: usize = 4;
        loop {
            if let Some(length) = self.inbox.first_chunk::<LENGTH>() {
                let length = u32::from_be_bytes(*length) as usize;
                if length > MAX_FRAME || length > into.len() {
                    tracing::error!(length, "a frame of the network's peer is too long; the connection is of no use");
                    self.dead = true;
                    self.inbox.clear();
                    return 0;
                }
                if self.inbox.len() >= LENGTH + length {
                    into[..length].copy_from_slice(&self.inbox[LENGTH..LENGTH + length]);
                    self.inbox.drain(..LENGTH + length);
                    return length;
                }
            }
            let Some(stream) = self.stream.as_mut().filter(|_| !self.dead) else { return 0 };
            let mut bytes = [0; 4096];
            match stream.read(&mut bytes) {
                Ok(count) if count > 0 => self.inbox.extend(&bytes[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return 0;
                }
                _ => {
                    self.dead = true;
                    return 0;
                }
            }
        }
    }

    fn settle(&mut self, ready: &[(RawFd, i16)]) {
        self.flush();
        let gone = |fd: RawFd| {
            let end = libc::POLLERR | libc::POLLHUP;
            ready.iter().any(|(other, events)| *other == fd && events & end != 0 && events & libc::POLLIN == 0)
        };
        if self.stream.as_ref().is_some_and(|stream| self.dead || gone(stream.as_raw_fd())) {
            let listener = self.listener.take();
            *self = Stream { listener, ..Stream::default() };
        }
        if let (Some(listener), None) = (&self.listener, &self.stream)
            && let Ok((peer, _)) = listener.accept()
            && peer.set_nonblocking(true).is_ok()
        {
            self.stream = Some(peer);
        }
    }
}

fn open_tap(ifname: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(TUN_DEVICE)?;
    let ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags };
    let mut request = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru };
    if ifname.is_empty() || ifname.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no name of an interface"));
    }
    request.ifr_name.iter_mut().zip(ifname.bytes()).for_each(|(into, byte)| *into = byte as libc::c_char);
    // SAFETY: the kernel reads and writes the request, which is as long as it has to be.
    if unsafe { libc::ioctl(file.as_raw_fd(), ioctl::TUNSETIFF(), &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    fcntl_setfl(&file, OFlags::NONBLOCK)?;
    Ok(file)
}
