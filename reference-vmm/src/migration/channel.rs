//! Byte channels to a peer: sockets, with vectored transfers straight from and into guest memory.

use super::{Address, MigrationError};
use std::{
    fmt, fs, io,
    io::{IoSlice, IoSliceMut},
    marker::PhantomData,
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::Duration,
};
use vm_memory::VolatileSlice;

/// One part of a vectored write: bytes of ours, or guest memory that vCPUs may be changing meanwhile.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Source<'a>(libc::iovec, PhantomData<&'a [u8]>);

/// One part of a vectored read.
#[repr(transparent)]
pub struct Target<'a>(libc::iovec, PhantomData<&'a mut [u8]>);

impl<'a> Source<'a> {
    /// Bytes that nobody changes.
    pub fn bytes(bytes: &'a [u8]) -> Self {
        Source(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// Guest memory, of which the kernel takes a copy when it writes.
    pub fn guest(memory: &VolatileSlice<'a>) -> Self {
        Source(
            libc::iovec { iov_base: memory.ptr_guard().as_ptr().cast_mut().cast(), iov_len: memory.len() },
            PhantomData,
        )
    }

    /// Copies the first bytes into `bytes`, which is at most as long, for channels that are no system calls.
    ///
    /// # Panics
    /// Never: bytes beyond the part are left as they are.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let count = bytes.len().min(self.len());
        // SAFETY: the part is readable for its lifetime; `bytes` is exclusively ours, so they do not overlap.
        unsafe { std::ptr::copy(self.0.iov_base.cast::<u8>(), bytes.as_mut_ptr(), count) };
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Without the first `count` bytes (at most all of them).
    #[must_use]
    pub fn skip(self, count: usize) -> Self {
        let count = count.min(self.len());
        let iov_base = self.0.iov_base.cast::<u8>().wrapping_add(count).cast();
        Source(libc::iovec { iov_base, iov_len: self.len() - count }, PhantomData)
    }

    /// Only the first `count` bytes (at most all of them).
    #[must_use]
    pub fn first(self, count: usize) -> Self {
        Source(libc::iovec { iov_len: count.min(self.len()), ..self.0 }, PhantomData)
    }
}

impl<'a> Target<'a> {
    /// A buffer of ours.
    pub fn bytes(bytes: &'a mut [u8]) -> Self {
        Target(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// Guest memory.
    pub fn guest(memory: &VolatileSlice<'a>) -> Self {
        Target(libc::iovec { iov_base: memory.ptr_guard_mut().as_ptr().cast(), iov_len: memory.len() }, PhantomData)
    }

    /// Copies `bytes` to the start, as many as there is room for: for channels that are no system calls.
    pub fn fill(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(self.len());
        // SAFETY: the part is writable for its lifetime and no slice overlaps it.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.0.iov_base.cast::<u8>(), count) };
    }

    /// Takes the first `count` bytes (at most all of them) away.
    fn advance(&mut self, count: usize) {
        let count = count.min(self.len());
        self.0.iov_base = self.0.iov_base.cast::<u8>().wrapping_add(count).cast();
        self.0.iov_len -= count;
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// True if there is no room.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A connected, bidirectional, blocking byte channel, shared by the threads that use it.
pub trait Channel: Send + Sync + fmt::Debug {
    /// Writes some of `parts`, in order, and says how many bytes.
    ///
    /// # Errors
    /// As `writev(2)`; [`io::ErrorKind::Interrupted`] is for the caller to repeat.
    fn write(&self, parts: &[Source<'_>]) -> io::Result<usize>;

    /// Reads into `parts`, in order, and says how many bytes; 0 when the peer has closed.
    ///
    /// # Errors
    /// As `readv(2)`; [`io::ErrorKind::Interrupted`] is for the caller to repeat.
    fn read(&self, parts: &mut [Target<'_>]) -> io::Result<usize>;

    /// Ends the writing direction: the peer reads to the end of what was written.
    fn finish_writing(&self);

    /// Ends the reading direction: whoever is blocked in a read, or reads later, is told that the peer has closed.
    fn stop_reading(&self);

    /// Ends both directions at once, which wakes every thread that is blocked here.
    fn close(&self);
}

/// Most parts that one vectored call takes (`IOV_MAX` of Linux).
pub(crate) const MAX_PARTS: usize = 1024;

/// Writes all of `parts`. They are used up as they go.
pub(crate) fn write_all(channel: &dyn Channel, mut parts: &mut [Source<'_>]) -> io::Result<()> {
    while !parts.is_empty() {
        if parts[0].is_empty() {
            parts = &mut parts[1..];
            continue;
        }
        let upto = parts.len().min(MAX_PARTS);
        match channel.write(&parts[..upto]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(mut written) => {
                while written > 0 {
                    let step = written.min(parts[0].len());
                    parts[0] = parts[0].skip(step);
                    written -= step;
                    if parts[0].is_empty() {
                        parts = &mut parts[1..];
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads until the first `at_least` bytes of `parts` are there, and as much behind them as has come by then. Says how many bytes
/// that were: fewer than `at_least` if the peer has closed.
pub(crate) fn read_at_least(channel: &dyn Channel, mut parts: &mut [Target<'_>], at_least: usize) -> io::Result<usize> {
    let mut total = 0;
    while total < at_least {
        while parts.first().is_some_and(Target::is_empty) {
            parts = &mut parts[1..];
        }
        let upto = parts.len().min(MAX_PARTS);
        match channel.read(&mut parts[..upto]) {
            Ok(0) => break,
            Ok(mut count) => {
                total += count;
                while count > 0 {
                    let step = count.min(parts[0].len());
                    parts[0].advance(step);
                    count -= step;
                    if parts[0].is_empty() {
                        parts = &mut parts[1..];
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP, with Nagle's delay off: the last bytes of a migration are on the critical path of the downtime.
    Tcp(TcpStream),
    /// AF_UNIX.
    Unix(UnixStream),
}

impl Socket {
    /// Connects to a destination.
    ///
    /// # Errors
    /// [`MigrationError::Connect`] with the system's reason.
    pub fn connect(address: &Address) -> Result<Arc<dyn Channel>, MigrationError> {
        let connected = match address {
            Address::Tcp { host, port } => {
                let host = if host.is_empty() { "localhost" } else { host };
                TcpStream::connect((host, *port)).and_then(Socket::tcp)
            }
            Address::Unix(path) => UnixStream::connect(path).map(Socket::Unix),
        };
        match connected {
            Ok(socket) => Ok(Arc::new(socket)),
            Err(source) => Err(MigrationError::Connect { address: address.clone(), source }),
        }
    }

    fn tcp(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nodelay(true)?;
        if stream.peer_addr()?.ip() == stream.local_addr()?.ip() {
            shorten(&stream)?;
        }
        Ok(Socket::Tcp(stream))
    }

    pub(crate) fn fd(&self) -> RawFd {
        match self {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // A socket that the peer has closed already cannot be shut down, which is as well.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}

/// Bytes that a sender may have on the way to a peer on its own host.
static LOCAL_BUFFER: libc::c_int = 64 << 10;

/// Keeps little on the way to a peer on the same host, so that what the sender has copied is still in the processor's cache when
/// the receiver copies it. Between hosts the kernel sizes the buffer to the link.
fn shorten(stream: &TcpStream) -> io::Result<()> {
    let len = size_of_val(&LOCAL_BUFFER) as libc::socklen_t;
    let value = (&raw const LOCAL_BUFFER).cast();
    // SAFETY: the value is an int of that length, which the kernel reads.
    match unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, value, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Channel for Socket {
    fn write(&self, parts: &[Source<'_>]) -> io::Result<usize> {
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: parts.as_ptr().cast_mut().cast(),
            msg_iovlen: parts.len().min(MAX_PARTS),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        // SAFETY: `Source` is a transparent iovec whose memory lives as long as its lifetime says; the kernel only
        // reads it. A peer that is gone gives EPIPE instead of a signal.
        let written = unsafe { libc::sendmsg(self.fd(), &message, libc::MSG_NOSIGNAL) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    fn read(&self, parts: &mut [Target<'_>]) -> io::Result<usize> {
        let count = parts.len().min(MAX_PARTS) as libc::c_int;
        // SAFETY: `Target` is a transparent iovec over memory that is writable as long as its lifetime says, borrowed
        // exclusively or, for guest memory, open to changes at any time.
        let read = unsafe { libc::readv(self.fd(), parts.as_mut_ptr().cast(), count) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    fn finish_writing(&self) {
        self.shutdown(Shutdown::Write);
    }

    fn stop_reading(&self) {
        self.shutdown(Shutdown::Read);
    }

    fn close(&self) {
        self.shutdown(Shutdown::Both);
    }
}

/// Waits until some of these can be read or accepted from, and says for each whether it can; nothing if the time is over.
pub(crate) fn wait_readable(
    descriptors: impl IntoIterator<Item = RawFd>,
    left: Option<Duration>,
) -> io::Result<Vec<bool>> {
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut entries: Vec<_> = descriptors.into_iter().map(entry).collect();
    let timeout = left.map_or(-1, |left| i32::try_from(left.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: the entries are valid for writing, and as many as is said.
    match unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, timeout) } {
        0 => Ok(Vec::new()),
        -1 => match io::Error::last_os_error() {
            // A signal: everybody is looked at again.
            error if error.kind() == io::ErrorKind::Interrupted => Ok(vec![false; entries.len()]),
            error => Err(error),
        },
        _ => Ok(entries.iter().map(|entry| entry.revents != 0).collect()),
    }
}

/// Connections that may wait to be accepted: the main channel and 255 page channels, which a source opens at once.
const BACKLOG: libc::c_int = 256;

/// A socket that waits for a source.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    address: Address,
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens at `address`. A UNIX socket left behind by a process that is gone is replaced.
    ///
    /// # Errors
    /// [`MigrationError::Listen`] with the system's reason.
    pub fn bind(address: &Address) -> Result<Self, MigrationError> {
        let failed = |source| MigrationError::Listen { address: address.clone(), source };
        let listener = Self::open(address).map_err(failed)?;
        // SAFETY: the descriptor is a listening socket of ours; a second call only changes the length of its queue.
        match unsafe { libc::listen(listener.fd(), BACKLOG) } {
            0 => Ok(listener),
            _ => Err(failed(io::Error::last_os_error())),
        }
    }

    pub(crate) fn fd(&self) -> RawFd {
        match &self.socket {
            Listening::Tcp(socket) => socket.as_raw_fd(),
            Listening::Unix(socket) => socket.as_raw_fd(),
        }
    }

    fn open(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp { host, port } => {
                let any = if host.is_empty() { "::" } else { host };
                let socket = match TcpListener::bind((any, *port)) {
                    // A host without IPv6.
                    Err(_) if host.is_empty() => TcpListener::bind(("0.0.0.0", *port))?,
                    socket => socket?,
                };
                let port = socket.local_addr()?.port();
                Ok(Listener { socket: Listening::Tcp(socket), address: Address::Tcp { host: host.clone(), port } })
            }
            Address::Unix(path) => {
                if UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                    fs::remove_file(path)?;
                }
                let socket = UnixListener::bind(path)?;
                Ok(Listener { socket: Listening::Unix(socket), address: address.clone() })
            }
        }
    }

    /// Where this listens, with the port that was chosen if none was given.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a source.
    ///
    /// # Errors
    /// [`MigrationError::Listen`] with the system's reason.
    pub fn accept(&self) -> Result<Arc<dyn Channel>, MigrationError> {
        Ok(Arc::new(self.accept_socket()?))
    }

    /// Waits until `socket` has something to read, and says whether somebody else waits to be accepted then.
    pub(crate) fn has_more_callers(&self, socket: &Socket) -> Result<bool, MigrationError> {
        let heard = wait_readable([socket.fd()], None);
        let calling = heard.and_then(|_| wait_readable([self.fd()], Some(Duration::ZERO)));
        calling
            .map(|ready| ready.first() == Some(&true))
            .map_err(|source| MigrationError::Listen { address: self.address.clone(), source })
    }

    pub(crate) fn accept_socket(&self) -> Result<Socket, MigrationError> {
        loop {
            let accepted = match &self.socket {
                Listening::Tcp(socket) => socket.accept().and_then(|(stream, _)| Socket::tcp(stream)),
                Listening::Unix(socket) => socket.accept().map(|(stream, _)| Socket::Unix(stream)),
            };
            match accepted {
                Ok(socket) => return Ok(socket),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(MigrationError::Listen { address: self.address.clone(), source }),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Somebody may have removed it already.
            let _ = fs::remove_file(path);
        }
    }
}

// `Source` and `Target` are read and written as arrays of iovec, the layout that these two types promise as well.
const _: () = assert!(size_of::<Source<'_>>() == size_of::<IoSlice<'_>>());
const _: () = assert!(size_of::<Target<'_>>() == size_of::<IoSliceMut<'_>>());

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes at most three bytes at a time, and is interrupted before each.
    #[derive(Debug, Default)]
    struct Trickle(std::sync::Mutex<(Vec<u8>, bool)>);

    impl Channel for Trickle {
        fn write(&self, parts: &[Source<'_>]) -> io::Result<usize> {
            let mut state = self.0.lock().unwrap();
            state.1 = !state.1;
            if state.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let mut left = 3;
            for part in parts {
                let mut bytes = vec![0; part.first(left).len()];
                part.copy_to(&mut bytes);
                state.0.extend(&bytes);
                left -= bytes.len();
            }
            Ok(3 - left)
        }
        fn read(&self, _: &mut [Target<'_>]) -> io::Result<usize> {
            Ok(0)
        }
        fn finish_writing(&self) {}
        fn stop_reading(&self) {}
        fn close(&self) {}
    }

    #[test]
    fn short_and_interrupted_writes_lose_nothing() {
        let channel = Trickle::default();
        let mut parts = [&b"ab"[..], b"", b"cdefgh", b"i", b""].map(Source::bytes);
        write_all(&channel, &mut parts).unwrap();
        assert_eq!(channel.0.lock().unwrap().0, b"abcdefghi");
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_no_signal() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        let error = write_all(&Socket::Unix(a), &mut [Source::bytes(b"x")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_listener_tells_its_port_and_replaces_a_dead_unix_socket() {
        let tcp = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(matches!(tcp.address(), Address::Tcp { port, .. } if *port != 0));
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("in.sock"));
        // Dropped without removing its file, as by a process that was killed.
        drop(UnixListener::bind(directory.path().join("in.sock")).unwrap());
        let listener = Listener::bind(&address).unwrap();
        assert!(matches!(Listener::bind(&address), Err(MigrationError::Listen { .. })), "in use");
        let channel = Socket::connect(&address).unwrap();
        listener.accept().unwrap();
        drop(channel);
        drop(listener);
        assert!(matches!(Socket::connect(&address), Err(MigrationError::Connect { .. })));
    }
}
