//! Channels that are sockets: TCP and AF_UNIX.

mod in_place;

use super::channel::{MAX_PARTS, ReadSlice, WriteSlice};
use super::{Address, Channel, MigrationError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_user_timeout;
use rustix::net::{AddressFamily, getpeername, getsockname};
use socket2::{Domain, SockAddr, SockRef, Type};
use std::ffi::OsString;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How long is waited for a word of the kernel that it has sent memory in place.
const IN_PLACE_TICK: Duration = Duration::from_millis(250);

/// The longest TCP_USER_TIMEOUT that the system takes, ms.
const MAX_USER_TIMEOUT: u128 = i32::MAX as u128;

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
        let connected = Socket::look_up(address).and_then(|found| Socket::connect_to(address, &found, &|| true));
        match connected {
            Ok(socket) => Ok(Arc::new(socket)),
            Err(source) => Err(MigrationError::Connect { address: address.clone(), source }),
        }
    }

    /// Where the host of a TCP address is; of others nothing has to be looked up.
    pub(crate) fn look_up(address: &Address) -> io::Result<Vec<SocketAddr>> {
        match address {
            Address::Tcp { host, port, options } => {
                let host = if host.is_empty() { "localhost" } else { host };
                options.choose(host, (host, *port).to_socket_addrs()?.collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Connects to `address`, which was [found](Self::look_up) there, for as long as `wanted` says so: a connection
    /// that comes too late would be taken for a source that has left.
    pub(crate) fn connect_to(address: &Address, found: &[SocketAddr], wanted: &dyn Fn() -> bool) -> io::Result<Socket> {
        match address {
            Address::Tcp { options, .. } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
                for place in found {
                    match connect(&(*place).into(), Domain::for_address(*place), wanted) {
                        Ok(socket) => {
                            options.keep_alive.apply(&socket)?;
                            return Socket::tcp(TcpStream::from(socket));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
            Address::Unix(path) => unix(&SockAddr::unix(path)?, wanted),
            Address::Abstract { name, tight } => unix(&SockAddr::unix(abstract_path(name, *tight)?)?, wanted),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Takes over a connected socket that the caller has opened.
    ///
    /// # Errors
    /// The system's: it is not connected, for example.
    pub(crate) fn adopt(fd: OwnedFd) -> io::Result<Socket> {
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false)?;
        // Only a connected socket has a peer.
        getpeername(&stream)?;
        match getsockname(&stream)?.address_family() {
            AddressFamily::INET | AddressFamily::INET6 => Socket::tcp(TcpStream::from(OwnedFd::from(stream))),
            _ => Ok(Socket::Unix(stream)),
        }
    }

    fn tcp(stream: TcpStream) -> io::Result<Socket> {
        let socket = Socket::Tcp(stream);
        socket.prepare()?;
        Ok(socket)
    }

    /// Sets a connected socket up for a migration.
    ///
    /// # Errors
    /// The system's: it is not connected any more, for example.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        let Socket::Tcp(stream) = self else { return Ok(()) };
        stream.set_nodelay(true)?;
        if stream.peer_addr()?.ip() == stream.local_addr()?.ip() {
            stay_within_host(stream);
        }
        Ok(())
    }

    pub(crate) fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_nonblocking(on),
            Socket::Unix(stream) => stream.set_nonblocking(on),
        }
    }

    /// Reads into bytes of ours; as [`Channel::read`].
    pub(crate) fn receive(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).read(bytes),
            Socket::Unix(stream) => (&*stream).read(bytes),
        }
    }

    /// Writes bytes of ours; as [`Channel::write`].
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Channel::write(self, &[WriteSlice::bytes(bytes)])
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }

    fn fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }

    fn shutdown(&self, how: Shutdown) {
        // A socket that the peer has closed already cannot be shut down, which is as well.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}

fn unix(place: &SockAddr, wanted: &dyn Fn() -> bool) -> io::Result<Socket> {
    Ok(Socket::Unix(UnixStream::from(OwnedFd::from(connect(place, Domain::UNIX, wanted)?))))
}

/// Bytes of the longest path of a UNIX socket.
const MAX_PATH: usize = 108;

/// What the system calls an abstract UNIX socket: a zero byte and its name; if it is not `tight`, as many zero bytes as
/// there is room for.
pub(crate) fn abstract_path(name: &str, tight: bool) -> io::Result<PathBuf> {
    let mut path = [b"\0", name.as_bytes()].concat();
    if path.len() > MAX_PATH {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("UNIX socket path '{name}' is too long")));
    }
    if !tight {
        path.resize(MAX_PATH, 0);
    }
    Ok(OsString::from_vec(path).into())
}

/// How often who connects looks whether that is still wanted.
const CONNECT_POLL: Duration = Duration::from_millis(20);

/// Connects a socket, and closes it as soon as it is not wanted any more.
fn connect(place: &SockAddr, domain: Domain, wanted: &dyn Fn() -> bool) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(domain, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    loop {
        match socket.connect(place) {
            Ok(()) => break,
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                while !is_connected(&socket)? {
                    still(wanted)?;
                }
                break;
            }
            // A UNIX socket whose queue is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(CONNECT_POLL),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        still(wanted)?;
    }
    socket.set_nonblocking(false)?;
    Ok(socket)
}

fn still(wanted: &dyn Fn() -> bool) -> io::Result<()> {
    if wanted() { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
}

/// Waits a moment for a connection that is being made.
fn is_connected(socket: &socket2::Socket) -> io::Result<bool> {
    let mut entries = [PollFd::new(socket, PollFlags::OUT)];
    let moment = Timespec { tv_sec: 0, tv_nsec: CONNECT_POLL.subsec_nanos().into() };
    match poll(&mut entries, Some(&moment)) {
        Err(Errno::INTR) => Ok(false),
        polled => {
            polled?;
            match socket.take_error()? {
                Some(error) => Err(error),
                None => Ok(!entries[0].revents().is_empty()),
            }
        }
    }
}

/// The congestion control that every Linux has and lets every user choose.
const NO_PACING: &[u8] = b"reno";
/// The kernel takes more bytes only after it has sent all that it has.
const NOTHING_UNSENT: u32 = 1;

/// Sets up a connection to a peer on the same host, which no network limits: the receiver alone says how much is on the
/// way (ADR 6). Between hosts the kernel knows the link.
fn stay_within_host(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    // BBR, the default of many hosts, paces segments by timers and by estimates of a link that is not there.
    let unpaced = socket.set_tcp_congestion(NO_PACING);
    // What waits in the send buffer has left the processor's cache when the receiver copies it.
    let unqueued = socket.set_tcp_notsent_lowat(NOTHING_UNSENT);
    // Without them it is slower, and works as well.
    if let Err(error) = unpaced.and(unqueued) {
        tracing::debug!(%error, "a connection within this host keeps the system's settings");
    }
}

impl Socket {
    fn send_message(&self, parts: &[WriteSlice<'_>], flags: libc::c_int) -> io::Result<usize> {
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: parts.as_ptr().cast_mut().cast(),
            msg_iovlen: parts.len().min(MAX_PARTS),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        // SAFETY: `WriteSlice` is a transparent iovec whose memory lives as long as its lifetime says; the kernel only
        // reads it. With MSG_ZEROCOPY it goes on doing so, from pages that it holds itself until then. A peer that is
        // gone gives EPIPE instead of a signal.
        let written = unsafe { libc::sendmsg(self.fd(), &message, libc::MSG_NOSIGNAL | flags) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

impl Channel for Socket {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        self.send_message(parts, 0)
    }

    fn send_in_place(&self) -> io::Result<()> {
        in_place::turn_on(self.as_fd())
    }

    fn write_in_place(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        self.send_message(parts, libc::MSG_ZEROCOPY)
    }

    fn sent_in_place(&self) -> io::Result<(u32, bool)> {
        in_place::completed(self.as_fd(), IN_PLACE_TICK)
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let count = parts.len().min(MAX_PARTS) as libc::c_int;
        // SAFETY: `ReadSlice` is a transparent iovec over memory that is writable as long as its lifetime says,
        // borrowed exclusively or, for guest memory, open to changes at any time.
        let read = unsafe { libc::readv(self.fd(), parts.as_mut_ptr().cast(), count) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    fn backlog(&self) -> io::Result<u64> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the call writes an int where it is told to.
        match unsafe { libc::ioctl(self.fd(), libc::TIOCOUTQ, &raw mut bytes) } {
            0 => Ok(u64::try_from(bytes).unwrap_or(0)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn is_open(&self) -> io::Result<bool> {
        let error = match self {
            Socket::Tcp(stream) => stream.take_error(),
            Socket::Unix(stream) => stream.take_error(),
        };
        if let Some(error) = error? {
            return Err(error);
        }
        let mut entries = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::RDHUP)];
        poll(&mut entries, Some(&Timespec::default()))?;
        Ok(entries[0].revents().is_empty())
    }

    fn limit_silence(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_read_timeout(limit),
            Socket::Unix(stream) => stream.set_read_timeout(limit),
        }
    }

    fn limit_waits(&self, each: Duration, unacknowledged: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => {
                stream.set_read_timeout(Some(each))?;
                stream.set_write_timeout(Some(each))?;
                let milliseconds = unacknowledged.map_or(0, |time| time.as_millis().min(MAX_USER_TIMEOUT));
                let milliseconds = u32::try_from(milliseconds).unwrap_or(0);
                Ok(set_tcp_user_timeout(stream, milliseconds)?)
            }
            Socket::Unix(stream) => {
                stream.set_read_timeout(Some(each))?;
                stream.set_write_timeout(Some(each))
            }
        }
    }

    fn settle(&self) -> io::Result<()> {
        self.finish_writing();
        let mut answer = [0; 512];
        loop {
            match self.read(&mut [ReadSlice::bytes(&mut answer)]) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // That is what a peer's end of a UNIX socket does which is closed before it was read to its end.
                Err(error) if matches!(self, Socket::Unix(_)) && error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Err(error) => return Err(error),
            }
        }
        match self.backlog()? {
            0 => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer has closed before it had everything")),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Listener;
    use crate::channel::write_all;
    use rustix::net::listen;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_no_signal() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        let error = write_all(&Socket::Unix(a), &mut [WriteSlice::bytes(b"x")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_backlog_is_what_the_peer_has_not_got() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Socket::Unix(a), Socket::Unix(b));
        assert_eq!(a.backlog().unwrap(), 0);
        write_all(&a, &mut [WriteSlice::bytes(&[1; 10_000])]).unwrap();
        assert!(a.backlog().unwrap() >= 10_000);
        let mut read = [0; 10_000];
        assert_eq!(b.read(&mut [ReadSlice::bytes(&mut read)]).unwrap(), 10_000);
        assert_eq!(a.backlog().unwrap(), 0);
    }

    #[test]
    fn within_a_host_nothing_is_paced_and_nothing_waits_to_be_sent() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let Address::Tcp { port, .. } = *listener.address() else { panic!("{:?}", listener.address()) };
        let socket = Socket::tcp(TcpStream::connect(("127.0.0.1", port)).unwrap()).unwrap();
        let Socket::Tcp(stream) = &socket else { panic!("{socket:?}") };
        let options = SockRef::from(stream);
        assert!(options.tcp_congestion().unwrap().starts_with(b"reno\0"));
        assert_eq!(options.tcp_notsent_lowat().unwrap(), 1);
        assert!(options.tcp_nodelay().unwrap());
    }

    /// A connection that comes when it is not wanted any more would be taken for a source that has left.
    #[test]
    fn a_connection_that_is_not_wanted_any_more_does_not_come() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("in.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, 0).unwrap();
        let address = Address::Unix(path);
        let _first = Socket::connect_to(&address, &[], &|| true).unwrap();
        // The queue has no more room.
        let asked = std::cell::Cell::new(0);
        let wanted = || asked.replace(asked.get() + 1) < 3;
        let error = Socket::connect_to(&address, &[], &wanted).unwrap_err();
        assert_eq!((error.kind(), asked.get()), (io::ErrorKind::Interrupted, 4));
        listener.accept().unwrap();
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().map(drop).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_limit_beyond_what_the_system_takes_is_the_longest() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Socket::Tcp(stream);
        socket.limit_waits(Duration::from_secs(1), Some(Duration::from_millis(u64::MAX))).unwrap();
        let Socket::Tcp(stream) = &socket else { panic!("{socket:?}") };
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(stream).unwrap(), i32::MAX as u32);
    }
}
