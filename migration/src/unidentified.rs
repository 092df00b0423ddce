//! Connections that are not identified yet.
//!
//! Any program that finds the port of a destination can connect to it: a scanner, a browser, a source with other
//! settings, an attacker. A connection counts for nothing until its first bytes are those of a source. Until then it
//! costs one descriptor and a few bytes, and the number of such connections is limited; it has a few seconds; and
//! nothing waits for it.

use super::listener::Caller;
use super::patience::Patience;
use super::tls::{self, Accepting};
use super::watch::{Brings, Watched};
use super::{Address, Channel, ChannelName, Listener, MigrationError, Socket, Tls, TlsError};
use qevm_multifd::Init;
use qevm_multifd::layout::INIT_LEN;
use qevm_savevm::container::FileKind;
use qevm_savevm::first_bytes::FirstBytes;
use qevm_savevm::framing::{MAGIC, VERSION};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Resource, getrlimit};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections that may be unidentified at a time, beside those that a source opens; fewer where the process may have
/// few descriptors.
const ROOM: usize = 256;
/// Connections that are accepted before those that are here are read.
const ACCEPTED_AT_ONCE: usize = 64;
/// How long not to accept when the system could not.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes that begin a main channel: magic and version. A source sends more along with them; a peer that stops there is
/// none.
const HEADER_LEN: usize = 8;
/// Bytes of a magic.
const MAGIC_LEN: usize = 4;

/// The connections that are not identified, the oldest first.
pub(crate) struct UnidentifiedConns {
    waiting: VecDeque<UnidentifiedConn>,
    room: usize,
    /// How long they have, and what watches over those that are identified.
    patience: Patience,
    /// The system has no descriptor or no memory for another connection; it is asked again then.
    paused_until: Option<Instant>,
    /// A caller has to begin a TLS session.
    tls: Option<Tls>,
    /// The address that they connect to.
    address: Address,
    /// Page channels may be kept waiting for the main channel that tells what they are about, but are none of this
    /// migration's.
    page_channels: bool,
}

struct UnidentifiedConn {
    socket: Socket,
    session: Option<Accepting>,
    caller: Caller,
    since: Instant,
    prefix: Vec<u8>,
    /// It is a page channel, and there are none in this migration.
    unwanted: bool,
}

/// A connection that has sent nothing yet, with its TLS session if it is to have one.
pub(crate) type SilentConn = (Socket, Option<Accepting>, Caller);

/// A connection whose first bytes are right.
pub(crate) struct IdentifiedConn {
    pub(crate) socket: Arc<Socket>,
    /// What to read and write: the socket, or a session over it.
    pub(crate) channel: Arc<dyn Channel>,
    pub(crate) caller: Caller,
    pub(crate) role: Role,
}

/// What a connection is.
pub(crate) enum Role {
    /// The main channel, from which these bytes were read already.
    Main(Vec<u8>),
    /// A page channel that began so.
    Page(Box<[u8; INIT_LEN]>),
}

/// What happened to a connection that is no part of the migration.
#[derive(Debug)]
pub(crate) struct Dropped {
    pub(crate) caller: Caller,
    pub(crate) why: Reason,
}

/// Why a connection was dropped.
#[derive(Debug)]
pub(crate) enum Reason {
    /// It sent nothing that identifies it within this time.
    Silent(FirstBytes, Duration),
    /// It was closed before it had sent enough to be identified.
    Closed(FirstBytes),
    /// Not a fault of the peer: this host could not set it up.
    SetUp(io::Error),
    /// It is not a source.
    Wrong(FirstBytes),
    /// It has no TLS session, and needs one: what it began with, and why.
    Tls(FirstBytes, TlsError),
    /// It was the oldest of too many unidentified ones.
    Crowded(FirstBytes),
    /// A stream of another version.
    Version(u32),
    /// A page channel that does not fit, and why.
    Page(String),
    /// A page channel, and there are none in this migration.
    MultifdOff,
    /// A source was here already.
    Second(&'static str),
    /// It was a channel of a source, and was closed before the others had come.
    Left,
    /// It was a channel of a source whose others did not come.
    Incomplete,
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const EXPECTED: &str = "expected a migration stream (QEVM)";
        write!(f, "dropped a connection from {}: ", self.caller)?;
        match &self.why {
            Reason::Silent(FirstBytes::File(FileKind::Stream), after) => {
                write!(f, "it sent the start of a migration stream and nothing more in {} s", after.as_secs())
            }
            Reason::Closed(FirstBytes::File(FileKind::Stream)) => {
                f.write_str("it sent the start of a migration stream and was closed")
            }
            Reason::SetUp(error) => {
                write!(f, "it could not be set up here, which is not its fault: {}", crate::reason::reason(error))
            }
            Reason::Silent(prefix, after) => write!(f, "it sent {prefix} in {} s, {EXPECTED}", after.as_secs()),
            Reason::Closed(prefix) => write!(f, "it sent {prefix} and was closed, {EXPECTED}"),
            Reason::Wrong(FirstBytes::Tls) => {
                write!(
                    f,
                    "it sent {}, {EXPECTED}; TLS is off here (set 'tls-creds' at both sides, or at neither)",
                    FirstBytes::Tls
                )
            }
            Reason::Wrong(prefix) => write!(f, "it sent {prefix}, {EXPECTED}"),
            Reason::Tls(FirstBytes::Tls, error) => error.fmt(f),
            Reason::Tls(prefix, _) => {
                write!(f, "it sent {prefix}, expected TLS (set 'tls-creds' at both sides, or at neither)")
            }
            Reason::Crowded(prefix) => {
                write!(f, "it had sent {prefix} when too many others came that did not say what they are")
            }
            Reason::Version(found) => write!(f, "it sent a migration stream of version {found}, expected {VERSION}"),
            Reason::Page(error) => write!(f, "it is a page channel that does not fit: {error}"),
            Reason::MultifdOff => {
                f.write_str("it is a page channel: capability 'multifd' is on at the source and off here")
            }
            Reason::Second(what) => write!(f, "it is {what}, and there is one already"),
            Reason::Left => f.write_str("it was closed before all channels of its source had come"),
            Reason::Incomplete => f.write_str("the other channels of its source did not come"),
        }
    }
}

impl Reason {
    /// Why a connection that began so could not be made ready for use.
    fn of(error: io::Error, first: FirstBytes) -> Reason {
        match error.kind() {
            io::ErrorKind::NotConnected | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Reason::Closed(first)
            }
            _ => Reason::SetUp(error),
        }
    }
}

/// What the bytes read so far say of a connection.
enum Outcome {
    More,
    Main,
    Page,
    Drop(Reason),
}

impl UnidentifiedConns {
    /// For a migration in which a source opens `page_channels` beside the main channel, or none. `patience` says how
    /// long each has to identify itself; with `tls` it has to do so in a TLS session. They connect to `address`.
    pub(crate) fn new(page_channels: Option<u8>, tls: Option<Tls>, patience: Patience, address: Address) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
        let room = descriptors.map_or(ROOM, |limit| ROOM.min(limit / 4)) + 1 + usize::from(page_channels.unwrap_or(0));
        UnidentifiedConns {
            waiting: VecDeque::new(),
            room,
            patience,
            paused_until: None,
            tls,
            address,
            page_channels: page_channels.is_some(),
        }
    }

    /// Whether the queue of the listener is to be looked at now.
    pub(crate) fn accepts(&mut self, now: Instant) -> bool {
        self.paused_until = self.paused_until.filter(|until| *until > now);
        self.paused_until.is_none()
    }

    /// When the oldest has had its time, or the queue is to be looked at again.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let oldest = self.waiting.front().map(|conn| conn.since + self.patience.silence());
        [oldest, self.paused_until].into_iter().flatten().min()
    }

    /// What to wait for, one for each connection.
    pub(crate) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.waiting.iter().map(|conn| {
            // An unwanted one is identified, and would be readable all the time.
            let events = match &conn.session {
                _ if conn.unwanted => PollFlags::RDHUP,
                Some(session) if session.wants_write() => PollFlags::IN | PollFlags::OUT,
                _ => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(conn.socket.as_fd(), events)
        })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many page channels have called that are none of this migration's.
    pub(crate) fn unwanted(&self) -> usize {
        self.waiting.iter().filter(|conn| conn.unwanted).count()
    }

    /// Those that have sent nothing at all.
    pub(crate) fn into_silent(self) -> impl Iterator<Item = SilentConn> {
        let silent = |conn: &UnidentifiedConn| conn.prefix.is_empty();
        self.waiting.into_iter().filter(silent).map(|conn| (conn.socket, conn.session, conn.caller))
    }

    /// For each connection, whether to read from it.
    pub(crate) fn may_read(&self) -> Vec<bool> {
        self.waiting.iter().map(|conn| !conn.unwanted).collect()
    }

    /// Accepts what is in the listener's queue.
    ///
    /// # Errors
    /// [`MigrationError::Listen`] for a listener that is of no more use; not for a connection that cannot be accepted,
    /// nor when there are no descriptors.
    pub(crate) fn accept(
        &mut self,
        listener: &Listener,
        dropped: &mut dyn FnMut(Dropped),
    ) -> Result<(), MigrationError> {
        // None is dropped for another before it was read from.
        for _ in 0..ACCEPTED_AT_ONCE.min(self.room.div_ceil(2)) {
            match listener.try_accept() {
                Ok(None) => return Ok(()),
                Ok(Some((socket, caller))) => {
                    if self.waiting.len() >= self.room {
                        self.drop_oldest(dropped);
                    }
                    // One that cannot be set up is gone already, and shows so when it is read from.
                    let _ = socket.set_nonblocking(true);
                    let session = match self.tls.as_ref().map(Accepting::new).transpose() {
                        Ok(session) => session,
                        Err(error) => {
                            dropped(Dropped { caller, why: Reason::Tls(FirstBytes::Nothing, error) });
                            continue;
                        }
                    };
                    let (since, prefix) = (Instant::now(), Vec::new());
                    self.waiting.push_back(UnidentifiedConn {
                        socket,
                        session,
                        caller,
                        since,
                        prefix,
                        unwanted: false,
                    });
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    Some(libc::EBADF | libc::EFAULT | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) => {
                        return Err(listener.failed(error));
                    }
                    // An unidentified one makes room for one that may be a source.
                    Some(libc::EMFILE) if !self.waiting.is_empty() => self.drop_oldest(dropped),
                    _ => {
                        tracing::warn!("cannot accept a connection at {}, and try again: {error}", listener.address());
                        self.paused_until = Some(Instant::now() + PAUSE);
                        return Ok(());
                    }
                },
            }
        }
        Ok(())
    }

    /// Reads from those connections that are `ready`, in the order of [`polled`](UnidentifiedConns::polled), and drops
    /// those that have had their time.
    pub(crate) fn read_prefixes(&mut self, ready: &[bool], dropped: &mut dyn FnMut(Dropped)) -> Vec<IdentifiedConn> {
        let (mut known, now, silence) = (Vec::new(), Instant::now(), self.patience.silence());
        for (index, mut conn) in std::mem::take(&mut self.waiting).into_iter().enumerate() {
            let outcome = match ready.get(index) {
                Some(true) if conn.unwanted => Outcome::Drop(Reason::MultifdOff),
                Some(true) => conn.read_prefix(),
                _ => Outcome::More,
            };
            let UnidentifiedConn { caller, .. } = conn;
            let why = match outcome {
                Outcome::Page if !self.page_channels => {
                    conn.unwanted = true;
                    self.waiting.push_back(conn);
                    continue;
                }
                Outcome::Main | Outcome::Page => {
                    let first = conn.first();
                    match conn.known().and_then(|role| self.watched(conn, role)) {
                        Ok(new) => {
                            known.push(new);
                            continue;
                        }
                        Err(error) => Reason::of(error, first),
                    }
                }
                Outcome::Drop(why) => why,
                Outcome::More if now.saturating_duration_since(conn.since) < silence => {
                    self.waiting.push_back(conn);
                    continue;
                }
                Outcome::More if conn.unwanted => Reason::MultifdOff,
                Outcome::More => Reason::Silent(conn.first(), silence),
            };
            dropped(Dropped { caller, why });
        }
        known
    }

    /// A connection whose role is known, as a channel.
    fn watched(&self, conn: UnidentifiedConn, role: Role) -> io::Result<IdentifiedConn> {
        let UnidentifiedConn { socket, session, caller, .. } = conn;
        let name = match &role {
            Role::Main(_) => ChannelName::Main,
            // It was decoded before.
            Role::Page(first) => ChannelName::Page(Init::decode(&**first).map_or(0, |init| init.channel)),
        };
        let socket = Arc::new(socket);
        let channel = Watched::new(socket.clone(), name, &self.patience.watch, Brings::Guest, Some(&self.address))?;
        let channel: Arc<dyn Channel> = match session {
            Some(session) => Arc::new(session.into_channel(Arc::new(channel))),
            None => Arc::new(channel),
        };
        Ok(IdentifiedConn { socket, channel, caller, role })
    }

    fn drop_oldest(&mut self, dropped: &mut dyn FnMut(Dropped)) {
        if let Some(conn) = self.waiting.pop_front() {
            dropped(Dropped { caller: conn.caller, why: Reason::Crowded(conn.first()) });
        }
    }
}

impl UnidentifiedConn {
    /// Reads what has come, without waiting for more and no more than identifies the connection.
    fn read_prefix(&mut self) -> Outcome {
        let mut bytes = [0; INIT_LEN];
        loop {
            let room = &mut bytes[..INIT_LEN - self.prefix.len()];
            let outcome = match &mut self.session {
                None => plain(&self.socket, room),
                Some(session) => match session.hear(&self.socket, room) {
                    Ok(outcome) => outcome,
                    Err(error) => return Outcome::Drop(Reason::Tls(self.first(), error)),
                },
            };
            match outcome {
                tls::Received::Nothing => return Outcome::More,
                tls::Received::Closed => return Outcome::Drop(Reason::Closed(self.first())),
                tls::Received::Bytes(count) => self.prefix.extend_from_slice(&bytes[..count]),
            }
            match self.what() {
                Outcome::More => {}
                outcome => return outcome,
            }
        }
    }

    /// What the connection began with.
    fn first(&self) -> FirstBytes {
        FirstBytes::of(match &self.session {
            Some(session) if self.prefix.is_empty() => session.first(),
            _ => &self.prefix,
        })
    }

    fn what(&self) -> Outcome {
        if self.prefix.len() < MAGIC_LEN {
            return Outcome::More;
        }
        match FirstBytes::of(&self.prefix) {
            FirstBytes::File(FileKind::Stream) => match self.prefix.get(MAGIC_LEN..HEADER_LEN) {
                None => Outcome::More,
                Some(version) if version == VERSION.to_be_bytes() => match self.prefix.len() {
                    HEADER_LEN => Outcome::More,
                    _ => Outcome::Main,
                },
                Some(version) => {
                    let found = version.iter().fold(0, |found, byte| found << 8 | u32::from(*byte));
                    Outcome::Drop(Reason::Version(found))
                }
            },
            FirstBytes::File(FileKind::MultifdChannel) if self.prefix.len() < INIT_LEN => Outcome::More,
            FirstBytes::File(FileKind::MultifdChannel) => match Init::decode(&self.prefix) {
                Ok(_) => Outcome::Page,
                Err(error) => Outcome::Drop(Reason::Page(error.to_string())),
            },
            other => Outcome::Drop(Reason::Wrong(other)),
        }
    }

    /// What the connection is, made ready for use.
    fn known(&mut self) -> io::Result<Role> {
        self.socket.set_nonblocking(false)?;
        self.socket.prepare()?;
        let prefix = std::mem::take(&mut self.prefix);
        match prefix.as_slice().try_into() {
            Ok(first) if !prefix.starts_with(&MAGIC.to_be_bytes()) => Ok(Role::Page(Box::new(first))),
            _ => Ok(Role::Main(prefix)),
        }
    }
}

/// Reads what has come on a socket that does not block.
fn plain(socket: &Socket, room: &mut [u8]) -> tls::Received {
    loop {
        return match socket.receive(room) {
            Ok(0) => tls::Received::Closed,
            Ok(count) => tls::Received::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tls::Received::Nothing,
            Err(_) => tls::Received::Closed,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    /// What the system refuses to set up is not a peer that has closed.
    #[test]
    fn a_connection_that_cannot_be_set_up_here_is_no_fault_of_its_peer() {
        let conns = UnidentifiedConns::new(None, None, Patience::default(), Address::tcp("", 0));
        let conn = |fd: OwnedFd| UnidentifiedConn {
            socket: Socket::Unix(UnixStream::from(fd)),
            session: None,
            caller: Caller::Unix,
            since: Instant::now(),
            prefix: Vec::new(),
            unwanted: false,
        };
        let (reader, _writer) = std::io::pipe().unwrap();
        let Err(error) = conns.watched(conn(reader.into()), Role::Main(Vec::new())) else {
            panic!("options of a socket were set on a pipe")
        };
        let why = Reason::of(error, FirstBytes::Nothing);
        assert!(matches!(&why, Reason::SetUp(error) if error.raw_os_error() == Some(libc::ENOTSOCK)), "{why:?}");
        let text = Dropped { caller: Caller::Unix, why }.to_string();
        assert!(
            text.ends_with("it could not be set up here, which is not its fault: Socket operation on non-socket"),
            "{text}"
        );

        let gone = Reason::of(io::ErrorKind::NotConnected.into(), FirstBytes::Nothing);
        assert!(matches!(gone, Reason::Closed(FirstBytes::Nothing)));
        let (here, _there) = UnixStream::pair().unwrap();
        assert!(conns.watched(conn(here.into()), Role::Main(Vec::new())).is_ok());
    }
}
