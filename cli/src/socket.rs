//! Addresses and sockets of live migrations.

use crate::failure::Stop;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC};
use qevm_migration::{BadAddress, TcpOptions, Tls, TlsSocket};
use qevm_wire::Located;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, fchmod};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::sockopt::{Timeout, set_socket_keepalive, set_socket_timeout, socket_error};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, listen, shutdown, socket_with,
};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Connections that may wait to be accepted, as std has it.
const BACKLOG: i32 = 128;

/// Where to listen or connect, as QEMU's `migrate` command writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`
    Tcp(String),
    /// `unix:PATH`
    Unix(PathBuf),
}

impl Address {
    /// Reads `tcp:HOST:PORT` or `unix:PATH`.
    ///
    /// ```
    /// use qevm::socket::Address;
    /// assert_eq!(Address::parse("tcp:[::1]:4444").unwrap(), Address::Tcp("[::1]:4444".into()));
    /// assert!(Address::parse("exec:cat").is_err());
    /// let Err(qevm::failure::Stop::Usage(why)) = Address::parse("tcp:host:http") else { panic!() };
    /// assert_eq!(why, "address 'tcp:host:http': expected a port, 0 to 65535 at byte 9 of tcp:HOST:PORT");
    /// ```
    ///
    /// # Errors
    /// [`Stop::Usage`] that says what was expected.
    pub fn parse(text: &str) -> Result<Self, Stop> {
        let expected = match text.parse() {
            Ok(qevm_migration::Address::Unix(path)) => return Ok(Address::Unix(path)),
            Ok(qevm_migration::Address::Tcp { host, port, options }) if options == TcpOptions::default() => {
                return Ok(Address::Tcp(match host.as_str() {
                    // QEMU takes an empty host for all interfaces.
                    "" => format!("0.0.0.0:{port}"),
                    host if host.contains(':') => format!("[{host}]:{port}"),
                    host => format!("{host}:{port}"),
                }));
            }
            Err(Located { kind: BadAddress::HostPort { expected, .. }, offset, .. }) => {
                format!("{expected} at byte {offset} of tcp:HOST:PORT")
            }
            _ => "tcp:HOST:PORT or unix:PATH".into(),
        };
        Err(Stop::Usage(format!("address '{text}': expected {expected}")))
    }
}

/// What stands in a URI as it is.
const URI: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A listening socket. A UNIX socket's file is removed when it is dropped.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// UNIX, with its file.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Starts to listen.
    ///
    /// # Errors
    /// What the operating system says, e.g. that the address is in use.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let listener = match address {
            Address::Tcp(place) => Listener::Tcp(TcpListener::bind(place)?),
            Address::Unix(path) => Listener::Unix(listener(path)?, path.clone()),
        };
        match &listener {
            Listener::Tcp(listener) => listener.set_nonblocking(true)?,
            Listener::Unix(listener, _) => listener.set_nonblocking(true)?,
        }
        Ok(listener)
    }

    /// The address as it can be given to `migrate`; with the port chosen if it was asked for port 0.
    pub fn address(&self) -> String {
        match self {
            Listener::Tcp(listener) => listener.local_addr().map_or("tcp:?".into(), |a| format!("tcp:{a}")),
            Listener::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }

    /// The address as clients of the network block device protocol take it, for the export with the empty name.
    pub fn nbd_uri(&self) -> String {
        match self {
            Listener::Tcp(listener) => listener.local_addr().map_or("nbd:?".into(), |a| format!("nbd://{a}")),
            Listener::Unix(_, path) => {
                let path = percent_encoding::percent_encode(path.as_os_str().as_bytes(), URI);
                format!("nbd+unix:///?socket={path}")
            }
        }
    }

    /// A connection, if one is waiting, and who it comes from. Its reads and writes do not wait.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn accept(&self) -> io::Result<Option<(Socket, Peer)>> {
        let accepted = match self {
            Listener::Tcp(listener) => {
                listener.accept().map(|(socket, address)| (Socket::Tcp(socket), Peer(Some(address))))
            }
            Listener::Unix(listener, _) => listener.accept().map(|(socket, _)| (Socket::Unix(socket), Peer(None))),
        };
        match accepted {
            Ok((socket, peer)) => {
                socket.set_nonblocking(true)?;
                if let Socket::Tcp(socket) = &socket {
                    socket.set_nodelay(true)?;
                }
                Ok(Some((socket, peer)))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A socket at `path` to which only its owner can connect, whatever the umask is.
fn listener(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file takes over the mode that the socket has now: it never has another.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener, _) => listener.as_fd(),
        }
    }
}

/// Who a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(Option<SocketAddr>);

impl Peer {
    /// True if both come from one host, as far as can be told.
    pub fn same_host(&self, other: &Peer) -> bool {
        self.0.map(|address| address.ip()) == other.0.map(|address| address.ip())
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("this host"),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // Nothing can be done about a file that another process removed.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A connection.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// UNIX.
    Unix(UnixStream),
    /// Either of them, in a TLS session.
    Tls(Box<TlsSocket>),
}

impl Socket {
    /// Connects to `address`.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn connect(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Tcp(place) => Socket::Tcp(TcpStream::connect(place)?),
            Address::Unix(path) => Socket::Unix(UnixStream::connect(path)?),
        })
    }

    /// Connects to `address`, which may take `limit` at most: a UNIX socket whose listener accepts no more would
    /// be waited for for ever.
    ///
    /// # Errors
    /// `TimedOut`, and what the operating system says.
    pub fn connect_within(address: &Address, limit: Duration) -> io::Result<Self> {
        let (sender, connected) = mpsc::channel();
        let address = address.clone();
        // The thread of a connection that never comes ends with the program.
        thread::Builder::new().spawn(move || sender.send(Socket::connect(&address)))?;
        connected.recv_timeout(limit).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// The same connection in a TLS session, which `begin` begins.
    ///
    /// # Errors
    /// Those of `begin`.
    fn sealed<E>(self, begin: impl FnOnce(qevm_migration::Socket) -> Result<TlsSocket, E>) -> Result<Self, E> {
        let socket = match self {
            Socket::Tcp(socket) => qevm_migration::Socket::Tcp(socket),
            Socket::Unix(socket) => qevm_migration::Socket::Unix(socket),
            sealed => return Ok(sealed),
        };
        Ok(Socket::Tls(Box::new(begin(socket)?)))
    }

    /// Begins a TLS session with the destination at `address`, in whose certificate its host has to be, if nothing else
    /// was said.
    ///
    /// # Errors
    /// What the operating system says, and why there is no session.
    pub fn seal(self, tls: &Tls, address: &Address, patience: Duration) -> io::Result<Self> {
        let host = match address {
            Address::Tcp(place) => place.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']'])),
            Address::Unix(_) => None,
        };
        self.sealed(|socket| TlsSocket::connect(socket, tls, host, patience))
    }

    /// Waits for a TLS session that the source on the other end begins: what is read goes on with it.
    ///
    /// # Errors
    /// The credentials are none of a destination.
    pub fn unseal(self, tls: &Tls) -> io::Result<Self> {
        self.sealed(|socket| TlsSocket::accept(socket, tls)).map_err(io::Error::other)
    }

    /// What the other end began with, if that is no TLS and should be.
    pub fn not_tls(&self) -> Vec<u8> {
        match self {
            Socket::Tls(socket) => socket.first(),
            Socket::Tcp(_) | Socket::Unix(_) => Vec::new(),
        }
    }

    /// Why the other end has ended the session of a connection that has broken, if it said so; `None` without TLS.
    pub fn refusal(&self) -> Option<Option<String>> {
        let Socket::Tls(socket) = self else { return None };
        self.set_nonblocking(true).ok()?;
        let said = (&mut &**socket).read(&mut [0]);
        Some(said.err().filter(|error| error.kind() == io::ErrorKind::InvalidData).map(|error| error.to_string()))
    }

    /// Tells the other end that nothing more comes, where there are words for that.
    pub fn say_end(&self) {
        if let Socket::Tls(socket) = self {
            socket.say_end();
        }
    }

    /// Ends the connection for all that use it.
    pub fn close(&self) {
        // A connection that is already gone needs no closing.
        let _ = shutdown(self, rustix::net::Shutdown::Both);
    }

    /// Makes reads end; answers can still be written.
    pub fn stop_reading(&self) {
        let _ = shutdown(self, rustix::net::Shutdown::Read);
    }

    /// True if the other end has closed or reset the connection, and all that it had sent was read.
    pub fn is_closed(&self) -> bool {
        if let Socket::Tls(_) = self {
            // What has come may be the end of the session.
            let flags = PollFlags::RDHUP;
            return poll(&mut [PollFd::new(self, flags)], Some(&Timespec::default())) != Ok(0);
        }
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self, &mut [0u8; 1], flags) {
            Ok((read, _)) => read == 0,
            Err(error) => !matches!(error, Errno::AGAIN | Errno::INTR),
        }
    }

    /// True if the connection breaks within `limit`. A UNIX socket does not: there the last write has failed.
    pub fn is_reset_within(&self, limit: Duration) -> bool {
        let tcp = match self {
            Socket::Tcp(_) => true,
            Socket::Unix(_) => false,
            Socket::Tls(socket) => matches!(socket.socket(), qevm_migration::Socket::Tcp(_)),
        };
        if !tcp {
            return false;
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        // Nothing is asked for, so that only errors are told.
        let broken = poll(&mut [PollFd::new(self, PollFlags::empty())], Some(&limit));
        broken != Ok(0) || !matches!(socket_error(self), Ok(Ok(())))
    }

    /// A write that takes longer fails with `WouldBlock` or `TimedOut`; `None` waits for ever.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(self, Timeout::Send, timeout)?)
    }

    /// A read that takes longer fails with `WouldBlock` or `TimedOut`; `None` waits for ever.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(self, Timeout::Recv, timeout)?)
    }

    /// Makes the system find out that the other end's host is gone. A UNIX socket's is this one.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn keep_alive(&self) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => Ok(set_socket_keepalive(socket, true)?),
            Socket::Unix(_) | Socket::Tls(_) => Ok(()),
        }
    }

    /// Whether reads and writes that would wait fail with `WouldBlock` instead.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        Ok(ioctl_fionbio(self, nonblocking)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tls(socket) => socket.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => (&mut &*socket).read(buffer),
            Socket::Unix(socket) => (&mut &*socket).read(buffer),
            Socket::Tls(socket) => (&mut &**socket).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => (&mut &*socket).write(bytes),
            Socket::Unix(socket) => (&mut &*socket).write(bytes),
            Socket::Tls(socket) => (&mut &**socket).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
