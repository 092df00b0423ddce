//! A TLS session that a caller begins, without waiting for it.

use super::credentials::Side;
use super::{Endpoint, LOOK, Tls, TlsChannel, TlsError};
use crate::{Channel, Socket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ServerConnection;
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that are taken from the socket at once: until it is known who calls there is no more to read than a handshake.
const READ: usize = 16 << 10;
/// Most reads in one turn: a peer that sends without pause does not keep the others waiting. What it has sent is still
/// there then.
const READS: usize = 8;
/// First bytes that are kept, to name what is no TLS.
const FIRST: usize = 16;

/// The server's side of a session in its handshake, over a socket that does not block.
pub(crate) struct Accepting {
    session: ServerConnection,
    tls: Tls,
    authorized: bool,
    /// What the session has for the peer, and the socket has not taken.
    answers: Vec<u8>,
    /// What the peer began with.
    first: Vec<u8>,
    /// What has come, and the session has not taken.
    left: Vec<u8>,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// Nothing more has come.
    Nothing,
    /// This many bytes were written to the caller's buffer.
    Bytes(usize),
    /// The peer has closed.
    Closed,
}

impl Accepting {
    /// # Errors
    /// [`TlsError::Endpoint`] for a client's credentials.
    pub(crate) fn new(tls: &Tls) -> Result<Self, TlsError> {
        let Side::Server(config) = tls.credentials.side() else {
            return Err(TlsError::Endpoint { expected: Endpoint::Server });
        };
        let session = ServerConnection::new(config.clone()).map_err(TlsError::Handshake)?;
        let (answers, first, left) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Accepting { session, tls: tls.clone(), authorized: false, answers, first, left })
    }

    /// What the peer began with, sealed or not.
    pub(crate) fn first(&self) -> &[u8] {
        &self.first
    }

    /// Whether the socket has to take something before the peer goes on.
    pub(crate) fn wants_write(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Goes on with the handshake; when that is over, and the peer allowed, reads what it says.
    ///
    /// # Errors
    /// [`TlsError`], of which the peer was told.
    pub(crate) fn hear(&mut self, socket: &Socket, bytes: &mut [u8]) -> Result<Received, TlsError> {
        let mut reads = 0;
        loop {
            self.answer(socket);
            if !self.session.is_handshaking() {
                if !self.authorized {
                    let certificate = self.session.peer_certificates().and_then(<[_]>::first);
                    self.tls.authorize(certificate.map(AsRef::as_ref))?;
                    self.authorized = true;
                }
                match self.session.reader().read(bytes) {
                    Ok(0) => return Ok(Received::Closed),
                    Ok(count) => return Ok(Received::Bytes(count)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return Ok(Received::Closed),
                }
            }
            if self.left.is_empty() {
                reads += 1;
                if reads > READS {
                    return Ok(Received::Nothing);
                }
                let mut read = [0; READ];
                match socket.receive(&mut read) {
                    Ok(0) => return Ok(Received::Closed),
                    Ok(count) => self.left.extend_from_slice(&read[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
                    Err(_) => return Ok(Received::Closed),
                }
                let missing = FIRST.saturating_sub(self.first.len()).min(self.left.len());
                self.first.extend_from_slice(&self.left[..missing]);
            }
            let mut rest = self.left.as_slice();
            // It takes some, or is full of what is read above.
            let _ = self.session.read_tls(&mut rest);
            let used = self.left.len() - rest.len();
            self.left.drain(..used);
            let done = self.session.process_new_packets();
            self.answer(socket);
            done.map_err(TlsError::Handshake)?;
        }
    }

    /// Waits for the first byte that a peer says in its session, for as long as `patience` says then. The rest comes on
    /// `inner`, which is this socket.
    pub(crate) fn first_byte(
        mut self,
        socket: &Socket,
        inner: Arc<dyn Channel>,
        patience: &dyn Fn() -> Duration,
    ) -> io::Result<(u8, TlsChannel)> {
        let since = Instant::now();
        socket.set_nonblocking(true)?;
        let mut byte = [0];
        loop {
            match self.hear(socket, &mut byte).map_err(io::Error::other)? {
                Received::Bytes(_) => break,
                Received::Closed => return Err(io::Error::other("it was closed at once")),
                Received::Nothing if since.elapsed() >= patience() => return Err(io::ErrorKind::TimedOut.into()),
                Received::Nothing => {}
            }
            let events = if self.wants_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let left = patience().saturating_sub(since.elapsed()).min(LOOK);
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let _ = poll(&mut [PollFd::from_borrowed_fd(socket.as_fd(), events)], Some(&left));
        }
        socket.set_nonblocking(false)?;
        Ok((byte[0], self.into_channel(inner)))
    }

    /// Sends what the session has for the peer, as far as the socket takes it.
    fn answer(&mut self, socket: &Socket) {
        while self.session.wants_write() {
            if self.session.write_tls(&mut self.answers).is_err() {
                break;
            }
        }
        while !self.answers.is_empty() {
            match socket.send(&self.answers) {
                Ok(count) => drop(self.answers.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Later, or never: then the peer is gone, which reading tells.
                Err(_) => break,
            }
        }
    }

    /// The channel, when the peer has said what it is.
    pub(crate) fn into_channel(self, inner: Arc<dyn Channel>) -> TlsChannel {
        TlsChannel::new(inner, self.session.into(), self.left)
    }
}

impl fmt::Debug for Accepting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepting").field("authorized", &self.authorized).finish_non_exhaustive()
    }
}
