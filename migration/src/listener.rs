//! Sockets that wait for a source, and who has connected to them.

use super::socket::{Socket, abstract_path};
use super::{Address, Channel, MigrationError, TcpOptions, private};
use rustix::net::listen;
use socket2::{Domain, SockAddr, Type};
use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

/// Connections that may wait to be accepted: the main channel and 255 page channels, which a source opens at once,
/// after as many others as the system allows.
const BACKLOG: i32 = 4096;

/// Who has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// From that address.
    Tcp(SocketAddr),
    /// Over a UNIX socket.
    Unix,
}

impl Caller {
    /// Whether both are of the same host, as far as their addresses tell.
    pub(crate) fn is_of_host(&self, other: &Caller) -> bool {
        match (self, other) {
            (Caller::Tcp(one), Caller::Tcp(other)) => one.ip() == other.ip(),
            (one, other) => one == other,
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::Tcp(address) => address.fmt(f),
            Caller::Unix => f.write_str("a process of this host"),
        }
    }
}

/// A socket that waits for a source. Clones are the same socket, which is closed with the last of them.
#[derive(Debug, Clone)]
pub struct Listener {
    bound: Arc<Bound>,
}

#[derive(Debug)]
struct Bound {
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
        // A second call only changes the length of its queue.
        listen(listener.as_fd(), BACKLOG).map_err(|error| failed(error.into()))?;
        Ok(listener)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.bound.socket {
            Listening::Tcp(socket) => socket.as_fd(),
            Listening::Unix(socket) => socket.as_fd(),
        }
    }

    fn open(address: &Address) -> io::Result<Self> {
        let (socket, address) = match address {
            Address::Tcp { host, port, options } => {
                let socket = bind(host, *port, options)?;
                options.keep_alive.apply(&socket)?;
                let port = socket.local_addr()?.port();
                (Listening::Tcp(socket), Address::Tcp { host: host.clone(), port, options: *options })
            }
            Address::Abstract { name, tight } => {
                let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
                socket.bind(&SockAddr::unix(abstract_path(name, *tight)?)?)?;
                (Listening::Unix(OwnedFd::from(socket).into()), address.clone())
            }
            Address::Unix(path) => {
                if UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                    fs::remove_file(path)?;
                }
                let socket = private::listener(path)?;
                (Listening::Unix(socket), address.clone())
            }
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(Listener { bound: Arc::new(Bound { socket, address }) })
    }

    /// Where this listens, with the port that was chosen if none was given.
    pub fn address(&self) -> &Address {
        &self.bound.address
    }

    /// Waits for a source.
    ///
    /// # Errors
    /// [`MigrationError::Listen`] with the system's reason.
    pub fn accept(&self) -> Result<Arc<dyn Channel>, MigrationError> {
        loop {
            match self.try_accept() {
                Ok(Some((socket, _))) => {
                    socket.prepare().map_err(|error| self.failed(error))?;
                    return Ok(Arc::new(socket));
                }
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed(source)),
            }
        }
    }

    /// Makes it give nothing at once when none waits to be accepted.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match &self.bound.socket {
            Listening::Tcp(socket) => socket.set_nonblocking(true),
            Listening::Unix(socket) => socket.set_nonblocking(true),
        }
    }

    /// The next connection, which is to be [prepared](Socket::prepare), if one waits to be accepted.
    ///
    /// # Errors
    /// As `accept(2)`.
    pub(crate) fn try_accept(&self) -> io::Result<Option<(Socket, Caller)>> {
        let accepted = match &self.bound.socket {
            Listening::Tcp(socket) => {
                socket.accept().map(|(stream, caller)| (Socket::Tcp(stream), Caller::Tcp(caller)))
            }
            Listening::Unix(socket) => socket.accept().map(|(stream, _)| (Socket::Unix(stream), Caller::Unix)),
        };
        match accepted {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            accepted => accepted.map(Some),
        }
    }

    pub(crate) fn failed(&self, source: io::Error) -> MigrationError {
        MigrationError::Listen { address: self.address().clone(), source }
    }
}

/// A socket at the first address and port that can be had.
fn bind(host: &str, port: u16, options: &TcpOptions) -> io::Result<TcpListener> {
    let places: Vec<SocketAddr> = match host {
        // Every interface; without IPv6, those that a host has then.
        "" => vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()],
        host => (host, port).to_socket_addrs()?.collect(),
    };
    let host = if host.is_empty() { "::" } else { host };
    let places = options.choose(host, places)?;
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "Failed to create a socket");
    for port in port..=options.to.unwrap_or(port) {
        for mut place in places.iter().copied() {
            place.set_port(port);
            match listener(place, options) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        if last.kind() != io::ErrorKind::AddrInUse {
            return Err(last);
        }
    }
    match options.to {
        Some(_) if last.kind() == io::ErrorKind::AddrInUse => {
            let why = format!("Failed to find an available port: {}", crate::reason::reason(&last));
            Err(io::Error::new(last.kind(), why))
        }
        _ => Err(last),
    }
}

fn listener(place: SocketAddr, options: &TcpOptions) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(Domain::for_address(place), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if place.is_ipv6() {
        socket.set_only_v6(!options.takes_both())?;
    }
    socket.bind(&place.into())?;
    // `listen` tells of a port that is taken, as `bind` does.
    socket.listen(BACKLOG)?;
    Ok(OwnedFd::from(socket).into())
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // It may have been removed already.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{WriteSlice, write_all};

    #[test]
    fn abstract_sockets_have_no_file() {
        let name = format!("qevm-test-{}", std::process::id());
        let at = |tight| Address::Abstract { name: name.clone(), tight };
        let (tight, loose) = (Listener::bind(&at(true)).unwrap(), Listener::bind(&at(false)).unwrap());
        assert!(matches!(Listener::bind(&at(true)), Err(MigrationError::Listen { .. })), "in use");
        for (listener, tight) in [(tight, true), (loose, false)] {
            let here = Socket::connect(&at(tight)).unwrap();
            write_all(&*here, &mut [WriteSlice::bytes(b"x")]).unwrap();
            let (there, _) = listener.try_accept().unwrap().unwrap();
            assert_eq!(there.receive(&mut [0]).unwrap(), 1);
        }
        let long = Address::Abstract { name: "a".repeat(108), tight: true };
        let error = Listener::bind(&long).unwrap_err().to_string();
        assert!(error.ends_with("is too long"), "{error}");
        Listener::bind(&Address::Abstract { name: "a".repeat(107), tight: true }).unwrap();
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
