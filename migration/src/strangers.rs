//! Connections that have not said yet what they are.
//!
//! Whoever finds the port of a destination can connect to it: a scanner, a browser, a source with other settings,
//! somebody who wants to be in the way. A connection is nobody until its first bytes are those of a source. Until then
//! it costs one descriptor and a few bytes, of which there are only so many; it has a few seconds; and nobody waits for
//! it.

use super::{
    Address, Channel, ChannelName, Listener, MigrationError, Socket, Tls, TlsError,
    listener::Caller,
    patience::Patience,
    tls::{self, Accepting},
    watch::{Brings, Watched},
};
use qevm_multifd::{Init, layout::INIT_LEN};
use qevm_savevm::{
    container::FileKind,
    first_bytes::FirstBytes,
    framing::{MAGIC, VERSION},
};
use rustix::{
    event::{PollFd, PollFlags},
    process::{Resource, getrlimit},
};
use std::{
    collections::VecDeque,
    fmt, io,
    sync::Arc,
    time::{Duration, Instant},
};

/// Connections that may be unknown at a time, beside those that a source opens; fewer where the process may have few
/// descriptors.
const ROOM: usize = 256;
/// Connections that are accepted before those that are here are heard.
const ACCEPTED_AT_ONCE: usize = 64;
/// How long not to accept when the system could not.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes that begin a main channel: magic and version. A source says more along with them; whoever stops there is none.
const HEADER_LEN: usize = 8;
/// Bytes of a magic.
const MAGIC_LEN: usize = 4;

/// The connections that are not known, the oldest first.
pub(crate) struct Strangers {
    waiting: VecDeque<Stranger>,
    room: usize,
    /// How long they have, and who watches over those that are known.
    patience: Patience,
    /// The system has no descriptor or no memory for another connection; it is asked again then.
    paused_until: Option<Instant>,
    /// Whoever calls has to begin a TLS session.
    tls: Option<Tls>,
    /// Where they come to.
    address: Address,
    /// Page channels may be kept waiting for the main channel that tells what they are about, but are none of this
    /// migration's.
    page_channels: bool,
}

struct Stranger {
    socket: Socket,
    session: Option<Accepting>,
    caller: Caller,
    since: Instant,
    said: Vec<u8>,
    /// It is a page channel, and there are none in this migration.
    unwanted: bool,
}

/// A connection that has said nothing yet, with its TLS session if it is to have one.
pub(crate) type Silent = (Socket, Option<Accepting>, Caller);

/// A connection whose first bytes are right.
pub(crate) struct Known {
    pub(crate) socket: Arc<Socket>,
    /// What it says and hears: the socket, or a session over it.
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
    /// It said nothing that tells what it is within this many seconds.
    Silent(FirstBytes, Duration),
    /// It was closed before it had said what it is.
    Closed(FirstBytes),
    /// It is none of the peer's faults: this host did not set it up.
    SetUp(io::Error),
    /// It is none of a source's.
    Wrong(FirstBytes),
    /// It has no TLS session, and needs one: what it began with, and why.
    Tls(FirstBytes, TlsError),
    /// It was the oldest of too many that had not said what they are.
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
            Reason::Silent(said, after) => write!(f, "it sent {said} in {} s, {EXPECTED}", after.as_secs()),
            Reason::Closed(said) => write!(f, "it sent {said} and was closed, {EXPECTED}"),
            Reason::Wrong(FirstBytes::Tls) => {
                write!(
                    f,
                    "it sent {}, {EXPECTED}; TLS is off here (set 'tls-creds' at both sides, or at neither)",
                    FirstBytes::Tls
                )
            }
            Reason::Wrong(said) => write!(f, "it sent {said}, {EXPECTED}"),
            Reason::Tls(FirstBytes::Tls, error) => error.fmt(f),
            Reason::Tls(said, _) => {
                write!(f, "it sent {said}, expected TLS (set 'tls-creds' at both sides, or at neither)")
            }
            Reason::Crowded(said) => {
                write!(f, "it had sent {said} when too many others came that did not say what they are")
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

/// What came of listening to a connection.
enum Heard {
    More,
    Main,
    Page,
    Drop(Reason),
}

impl Strangers {
    /// For a migration in which a source opens `page_channels` beside the main channel, or none. `patience` says how
    /// long each has to say what it is; with `tls` it has to do so in a TLS session. Those that are known come to
    /// `address`.
    pub(crate) fn new(page_channels: Option<u8>, tls: Option<Tls>, patience: Patience, address: Address) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
        let room = descriptors.map_or(ROOM, |limit| ROOM.min(limit / 4)) + 1 + usize::from(page_channels.unwrap_or(0));
        Strangers {
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

    /// When somebody has had time enough, or the queue is to be looked at again.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let oldest = self.waiting.front().map(|stranger| stranger.since + self.patience.silence());
        [oldest, self.paused_until].into_iter().flatten().min()
    }

    /// What to wait for, one for each connection.
    pub(crate) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.waiting.iter().map(|stranger| {
            // An unwanted one has said what it is, and would be readable all the time.
            let events = match &stranger.session {
                _ if stranger.unwanted => PollFlags::RDHUP,
                Some(session) if session.wants_write() => PollFlags::IN | PollFlags::OUT,
                _ => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(stranger.socket.as_fd(), events)
        })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many page channels have called that are none of this migration's.
    pub(crate) fn unwanted(&self) -> usize {
        self.waiting.iter().filter(|stranger| stranger.unwanted).count()
    }

    /// Those that have said nothing at all.
    pub(crate) fn into_silent(self) -> impl Iterator<Item = Silent> {
        let silent = |stranger: &Stranger| stranger.said.is_empty();
        self.waiting.into_iter().filter(silent).map(|stranger| (stranger.socket, stranger.session, stranger.caller))
    }

    /// For each connection, whether it may have more to say.
    pub(crate) fn unheard(&self) -> Vec<bool> {
        self.waiting.iter().map(|stranger| !stranger.unwanted).collect()
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
        // Nobody makes room who has not been heard.
        for _ in 0..ACCEPTED_AT_ONCE.min(self.room.div_ceil(2)) {
            match listener.try_accept() {
                Ok(None) => return Ok(()),
                Ok(Some((socket, caller))) => {
                    if self.waiting.len() >= self.room {
                        self.drop_oldest(dropped);
                    }
                    // One that cannot be set up is gone already, and says so when it is listened to.
                    let _ = socket.set_nonblocking(true);
                    let session = match self.tls.as_ref().map(Accepting::new).transpose() {
                        Ok(session) => session,
                        Err(error) => {
                            dropped(Dropped { caller, why: Reason::Tls(FirstBytes::Nothing, error) });
                            continue;
                        }
                    };
                    let (since, said) = (Instant::now(), Vec::new());
                    self.waiting.push_back(Stranger { socket, session, caller, since, said, unwanted: false });
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    Some(libc::EBADF | libc::EFAULT | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) => {
                        return Err(listener.failed(error));
                    }
                    // One that is nobody makes room for one that may be a source.
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

    /// Listens to those connections that are `ready`, in the order of [`polled`](Strangers::polled), and drops those
    /// that have had their time.
    pub(crate) fn hear(&mut self, ready: &[bool], dropped: &mut dyn FnMut(Dropped)) -> Vec<Known> {
        let (mut known, now, silence) = (Vec::new(), Instant::now(), self.patience.silence());
        for (index, mut stranger) in std::mem::take(&mut self.waiting).into_iter().enumerate() {
            let heard = match ready.get(index) {
                Some(true) if stranger.unwanted => Heard::Drop(Reason::MultifdOff),
                Some(true) => stranger.hear(),
                _ => Heard::More,
            };
            let Stranger { caller, .. } = stranger;
            let why = match heard {
                Heard::Page if !self.page_channels => {
                    stranger.unwanted = true;
                    self.waiting.push_back(stranger);
                    continue;
                }
                Heard::Main | Heard::Page => {
                    let first = stranger.first();
                    match stranger.known().and_then(|role| self.watched(stranger, role)) {
                        Ok(new) => {
                            known.push(new);
                            continue;
                        }
                        Err(error) => Reason::of(error, first),
                    }
                }
                Heard::Drop(why) => why,
                Heard::More if now.saturating_duration_since(stranger.since) < silence => {
                    self.waiting.push_back(stranger);
                    continue;
                }
                Heard::More if stranger.unwanted => Reason::MultifdOff,
                Heard::More => Reason::Silent(stranger.first(), silence),
            };
            dropped(Dropped { caller, why });
        }
        known
    }

    /// Somebody whose role is known, as a channel.
    fn watched(&self, stranger: Stranger, role: Role) -> io::Result<Known> {
        let Stranger { socket, session, caller, .. } = stranger;
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
        Ok(Known { socket, channel, caller, role })
    }

    fn drop_oldest(&mut self, dropped: &mut dyn FnMut(Dropped)) {
        if let Some(stranger) = self.waiting.pop_front() {
            dropped(Dropped { caller: stranger.caller, why: Reason::Crowded(stranger.first()) });
        }
    }
}

impl Stranger {
    /// Takes in what has come, without waiting for more and without taking more than tells what the connection is.
    fn hear(&mut self) -> Heard {
        let mut bytes = [0; INIT_LEN];
        loop {
            let room = &mut bytes[..INIT_LEN - self.said.len()];
            let heard = match &mut self.session {
                None => plain(&self.socket, room),
                Some(session) => match session.hear(&self.socket, room) {
                    Ok(heard) => heard,
                    Err(error) => return Heard::Drop(Reason::Tls(self.first(), error)),
                },
            };
            match heard {
                tls::Heard::Nothing => return Heard::More,
                tls::Heard::Closed => return Heard::Drop(Reason::Closed(self.first())),
                tls::Heard::Bytes(count) => self.said.extend_from_slice(&bytes[..count]),
            }
            match self.what() {
                Heard::More => {}
                heard => return heard,
            }
        }
    }

    /// What the connection began with.
    fn first(&self) -> FirstBytes {
        FirstBytes::of(match &self.session {
            Some(session) if self.said.is_empty() => session.first(),
            _ => &self.said,
        })
    }

    fn what(&self) -> Heard {
        if self.said.len() < MAGIC_LEN {
            return Heard::More;
        }
        match FirstBytes::of(&self.said) {
            FirstBytes::File(FileKind::Stream) => match self.said.get(MAGIC_LEN..HEADER_LEN) {
                None => Heard::More,
                Some(version) if version == VERSION.to_be_bytes() => match self.said.len() {
                    HEADER_LEN => Heard::More,
                    _ => Heard::Main,
                },
                Some(version) => {
                    let found = version.iter().fold(0, |found, byte| found << 8 | u32::from(*byte));
                    Heard::Drop(Reason::Version(found))
                }
            },
            FirstBytes::File(FileKind::MultifdChannel) if self.said.len() < INIT_LEN => Heard::More,
            FirstBytes::File(FileKind::MultifdChannel) => match Init::decode(&self.said) {
                Ok(_) => Heard::Page,
                Err(error) => Heard::Drop(Reason::Page(error.to_string())),
            },
            other => Heard::Drop(Reason::Wrong(other)),
        }
    }

    /// What the connection is, made ready for use.
    fn known(&mut self) -> io::Result<Role> {
        self.socket.set_nonblocking(false)?;
        self.socket.prepare()?;
        let said = std::mem::take(&mut self.said);
        match said.as_slice().try_into() {
            Ok(first) if !said.starts_with(&MAGIC.to_be_bytes()) => Ok(Role::Page(Box::new(first))),
            _ => Ok(Role::Main(said)),
        }
    }
}

/// Reads what has come on a socket that does not block.
fn plain(socket: &Socket, room: &mut [u8]) -> tls::Heard {
    loop {
        return match socket.receive(room) {
            Ok(0) => tls::Heard::Closed,
            Ok(count) => tls::Heard::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tls::Heard::Nothing,
            Err(_) => tls::Heard::Closed,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::{fd::OwnedFd, unix::net::UnixStream};

    /// What the system refuses to set up is not a peer that has closed.
    #[test]
    fn a_connection_that_cannot_be_set_up_here_is_no_fault_of_its_peer() {
        let strangers = Strangers::new(None, None, Patience::default(), Address::tcp("", 0));
        let stranger = |fd: OwnedFd| Stranger {
            socket: Socket::Unix(UnixStream::from(fd)),
            session: None,
            caller: Caller::Unix,
            since: Instant::now(),
            said: Vec::new(),
            unwanted: false,
        };
        let (reader, _writer) = std::io::pipe().unwrap();
        let Err(error) = strangers.watched(stranger(reader.into()), Role::Main(Vec::new())) else {
            panic!("options of a socket were set on a pipe")
        };
        let why = Reason::of(error, FirstBytes::Nothing);
        assert!(matches!(&why, Reason::SetUp(error) if error.raw_os_error() == Some(libc::ENOTSOCK)), "{why:?}");
        let said = Dropped { caller: Caller::Unix, why }.to_string();
        assert!(
            said.ends_with("it could not be set up here, which is not its fault: Socket operation on non-socket"),
            "{said}"
        );

        let gone = Reason::of(io::ErrorKind::NotConnected.into(), FirstBytes::Nothing);
        assert!(matches!(gone, Reason::Closed(FirstBytes::Nothing)));
        let (here, _there) = UnixStream::pair().unwrap();
        assert!(strangers.watched(stranger(here.into()), Role::Main(Vec::new())).is_ok());
    }
}
