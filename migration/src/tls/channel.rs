//! A channel in a TLS session.

use super::credentials::Side;
use super::{Credentials, Endpoint, LOOK, Tls, TlsError, server_name};
use crate::channel::write_all;
use crate::{Channel, ReadSlice, WriteSlice};
use parking_lot::Mutex;
use rustls::{ClientConnection, Connection};
use std::fmt;
use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a write that are sealed and sent at once.
const WRITE: usize = 256 << 10;
/// Bytes that are taken from the connection at once.
const READ: usize = 128 << 10;
/// How long a handshake may take by default.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A [`Channel`] that carries its bytes in a TLS session over another.
pub struct TlsChannel {
    inner: Arc<dyn Channel>,
    session: Mutex<Connection>,
    writing: Mutex<Writing>,
    reading: Mutex<Reading>,
}

#[derive(Default)]
struct Writing {
    /// Room for what is sealed next: guest memory may change any time, and has to be the same all through.
    plain: Vec<u8>,
    sealed: Vec<u8>,
    ended: bool,
}

#[derive(Default)]
struct Reading {
    /// Room for what comes.
    sealed: Vec<u8>,
    /// How many bytes of it have come, and how many of those were given to the session.
    filled: usize,
    used: usize,
    /// The peer has closed the connection.
    closed: bool,
    /// It was said that it has done so without `close_notify`.
    told: bool,
}

impl TlsChannel {
    /// Begins a session with the destination that `inner` leads to, whose certificate has to name `host` if nothing
    /// else was said ([`Tls::with_hostname`]).
    ///
    /// # Errors
    /// The system's; [`TlsError`] as its source where the handshake fails.
    pub fn connect(inner: Arc<dyn Channel>, tls: &Tls, host: Option<&str>) -> io::Result<Self> {
        Self::connect_within(inner, tls, host, &|| Some(HANDSHAKE))
    }

    /// The same, with a handshake that may take as long as `patience` says then.
    pub(crate) fn connect_within(
        inner: Arc<dyn Channel>,
        tls: &Tls,
        host: Option<&str>,
        patience: &dyn Fn() -> Option<Duration>,
    ) -> io::Result<Self> {
        let session = client(&tls.credentials, tls, host).map_err(io::Error::other)?;
        let channel = Self::new(inner, session.into(), Vec::new());
        channel.inner.limit_silence(Some(LOOK))?;
        let done = channel.shake_hands(patience);
        channel.inner.limit_silence(None)?;
        done?;
        Ok(channel)
    }

    /// A session whose handshake is done, and what has come of it that the session has not seen.
    pub(super) fn new(inner: Arc<dyn Channel>, mut session: Connection, sealed: Vec<u8>) -> Self {
        session.set_buffer_limit(None);
        let reading = Reading { filled: sealed.len(), sealed, ..Reading::default() };
        TlsChannel { inner, session: Mutex::new(session), writing: Mutex::default(), reading: Mutex::new(reading) }
    }

    fn shake_hands(&self, patience: &dyn Fn() -> Option<Duration>) -> io::Result<()> {
        let since = Instant::now();
        while self.session.lock().is_handshaking() {
            if patience().is_some_and(|patience| since.elapsed() > patience) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut writing = self.writing.lock();
            self.collect(&mut writing)?;
            self.flush(&mut writing)?;
            drop(writing);
            if self.session.lock().is_handshaking() {
                let mut reading = self.reading.lock();
                match self.receive(&mut reading) {
                    // Of a socket, and of one that is watched over.
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                        continue;
                    }
                    received => received?,
                }
                if reading.closed {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer closed the connection in the TLS handshake",
                    ));
                }
                self.open(&mut reading)?;
            }
        }
        let mut writing = self.writing.lock();
        self.collect(&mut writing)?;
        self.flush(&mut writing)
    }

    /// Takes what the session has for the peer.
    fn collect(&self, writing: &mut Writing) -> io::Result<()> {
        let mut session = self.session.lock();
        while session.wants_write() {
            session.write_tls(&mut writing.sealed)?;
        }
        Ok(())
    }

    /// Sends what was sealed. If that fails, the session is over: the peer cannot make sense of what would come next.
    fn flush(&self, writing: &mut Writing) -> io::Result<()> {
        let sealed = std::mem::take(&mut writing.sealed);
        let sent = write_all(&*self.inner, &mut [WriteSlice::bytes(&sealed)]);
        writing.sealed = sealed;
        writing.sealed.clear();
        sent
    }

    /// Waits for more of what the peer sends.
    fn receive(&self, reading: &mut Reading) -> io::Result<()> {
        (reading.filled, reading.used) = (0, 0);
        reading.sealed.resize(READ, 0);
        reading.filled = self.inner.read(&mut [ReadSlice::bytes(&mut reading.sealed)])?;
        reading.closed = reading.filled == 0;
        Ok(())
    }

    /// Gives what has come to the session, until that has bytes for us or has seen all.
    fn open(&self, reading: &mut Reading) -> io::Result<()> {
        let mut session = self.session.lock();
        let mut rest = reading.sealed.get(reading.used..reading.filled).unwrap_or_default();
        // It takes 4 KiB each time, and looks then for a whole record, of up to 16 KiB: it gets as much as it has room
        // for.
        let mut taken = session.read_tls(&mut rest)?;
        while taken > 0 && !rest.is_empty() {
            match session.read_tls(&mut rest) {
                Ok(0) | Err(_) => break,
                Ok(count) => taken += count,
            }
        }
        reading.used += taken;
        let opened = session.process_new_packets();
        let answers = session.wants_write();
        drop(session);
        // Another thread that is writing sends the answer with its own bytes.
        if answers && let Some(mut writing) = self.writing.try_lock() {
            self.collect(&mut writing)?;
            let sent = self.flush(&mut writing);
            if opened.is_ok() {
                sent?;
            }
        }
        opened.map(drop).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, TlsError::Handshake(error)))
    }

    /// Moves bytes that the session has for us. `None` if it has none now; 0 when the peer has ended the session.
    fn take(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<Option<usize>> {
        let mut session = self.session.lock();
        let mut reader = session.reader();
        let mut total = 0;
        for part in parts {
            let mut part = part.part();
            while !part.is_empty() {
                let bytes = match reader.fill_buf() {
                    Ok(bytes) => bytes,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok((total > 0).then_some(total));
                    }
                    // The connection has ended without the session: `read` tells that.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Ok((total > 0).then_some(total));
                    }
                    Err(error) => return Err(error),
                };
                if bytes.is_empty() {
                    return Ok(Some(total));
                }
                let count = bytes.len().min(part.len());
                part.fill(&bytes[..count]);
                part.advance(count);
                reader.consume(count);
                total += count;
            }
        }
        Ok(Some(total))
    }
}

fn client(credentials: &Credentials, tls: &Tls, host: Option<&str>) -> Result<ClientConnection, TlsError> {
    let Side::Client(config) = credentials.side() else {
        return Err(TlsError::Endpoint { expected: Endpoint::Client });
    };
    let name = match (&tls.hostname, host) {
        (Some(name), _) => name.clone(),
        (None, Some(host)) => server_name(host)?,
        (None, None) => return Err(TlsError::NoHostname),
    };
    ClientConnection::new(config.clone(), name).map_err(TlsError::Handshake)
}

impl Channel for TlsChannel {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        let mut writing = self.writing.lock();
        let mut len = 0;
        for part in parts {
            let part = part.first(WRITE - len);
            let end = len + part.len();
            if writing.plain.len() < end {
                writing.plain.resize(end, 0);
            }
            part.copy_to(&mut writing.plain[len..end]);
            len = end;
        }
        self.session.lock().writer().write_all(&writing.plain[..len])?;
        self.collect(&mut writing)?;
        self.flush(&mut writing)?;
        Ok(len)
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let mut reading = self.reading.lock();
        loop {
            if let Some(count) = self.take(parts)? {
                return Ok(count);
            }
            if reading.used < reading.filled {
                self.open(&mut reading)?;
                continue;
            }
            if reading.closed {
                if !std::mem::replace(&mut reading.told, true) {
                    // A stream, a page channel and a return path say themselves where they end, so that nothing is lost
                    // by that.
                    tracing::debug!("a peer has closed {:?} without TLS's close_notify", self.inner);
                }
                return Ok(0);
            }
            self.receive(&mut reading)?;
        }
    }

    fn backlog(&self) -> io::Result<u64> {
        self.inner.backlog()
    }

    fn is_open(&self) -> io::Result<bool> {
        self.inner.is_open()
    }

    fn limit_silence(&self, limit: Option<Duration>) -> io::Result<()> {
        self.inner.limit_silence(limit)
    }

    fn settle(&self) -> io::Result<()> {
        self.finish_writing();
        self.inner.settle()
    }

    fn say_end(&self) {
        let mut writing = self.writing.lock();
        if !std::mem::replace(&mut writing.ended, true) {
            self.session.lock().send_close_notify();
            // A peer that does not get the end reports a cut.
            let _ = self.collect(&mut writing).and_then(|()| self.flush(&mut writing));
        }
    }

    fn finish_writing(&self) {
        self.say_end();
        self.inner.finish_writing();
    }

    fn stop_reading(&self) {
        self.inner.stop_reading();
    }

    fn close(&self) {
        self.inner.close();
    }
}

impl fmt::Debug for TlsChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsChannel").field("inner", &self.inner).finish_non_exhaustive()
    }
}
