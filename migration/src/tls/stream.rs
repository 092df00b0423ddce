//! A socket in a TLS session, for programs that read, write and wait for it by themselves.

use super::{Accepting, Received, Tls, TlsChannel, TlsError};
use crate::{Channel, ReadSlice, Socket, WriteSlice};
use parking_lot::Mutex;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// A socket in a TLS session, with the reads and writes of [`std::io`].
///
/// Where the socket does not block, or has a time-out, a read fails with [`io::ErrorKind::WouldBlock`] instead of
/// waiting, and can be repeated. Read until it does before polling the socket: decrypted bytes are buffered here, where
/// a poll does not see them. A failed write ends the session. Dropping the session tells the peer that no more comes.
pub struct TlsSocket {
    socket: Arc<Socket>,
    /// The server's side, until the peer has said something.
    handshake: Mutex<Option<Accepting>>,
    channel: OnceLock<TlsChannel>,
}

impl TlsSocket {
    /// Begins a session with the destination that `socket` leads to, whose certificate has to name `host` if nothing
    /// else was said ([`Tls::with_hostname`]). The handshake may take `patience`.
    ///
    /// # Errors
    /// The system's; [`TlsError`] as its source where the handshake fails.
    pub fn connect(socket: Socket, tls: &Tls, host: Option<&str>, patience: Duration) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let channel = TlsChannel::connect_within(socket.clone(), tls, host, &|| Some(patience))?;
        Ok(TlsSocket { socket, handshake: Mutex::default(), channel: channel.into() })
    }

    /// A session with a source that has connected by `socket`. Reads go on with the handshake, and give what the source
    /// says after it; until then the socket must not block.
    ///
    /// # Errors
    /// [`TlsError::Endpoint`] for a client's credentials.
    pub fn accept(socket: Socket, tls: &Tls) -> Result<Self, TlsError> {
        let handshake = Mutex::new(Some(Accepting::new(tls)?));
        Ok(TlsSocket { socket: Arc::new(socket), handshake, channel: OnceLock::new() })
    }

    /// The socket below, for its settings.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// What the peer began with, sealed or not, while it has said nothing in the session.
    pub fn first(&self) -> Vec<u8> {
        let handshake = self.handshake.lock();
        handshake.as_ref().map(|handshake| handshake.first().to_vec()).unwrap_or_default()
    }

    /// Tells the peer that nothing more comes (`close_notify`).
    pub fn say_end(&self) {
        if let Some(channel) = self.channel.get() {
            channel.say_end();
        }
    }
}

impl Drop for TlsSocket {
    fn drop(&mut self) {
        self.say_end();
    }
}

impl Read for &TlsSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(channel) = self.channel.get() {
            return channel.read(&mut [ReadSlice::bytes(buffer)]);
        }
        let mut handshake = self.handshake.lock();
        let Some(accepting) = handshake.as_mut() else { return Ok(0) };
        match accepting.hear(&self.socket, buffer).map_err(io::Error::other)? {
            Received::Nothing => Err(io::ErrorKind::WouldBlock.into()),
            Received::Closed => Ok(0),
            Received::Bytes(count) => {
                if let Some(accepting) = handshake.take() {
                    self.channel.get_or_init(|| accepting.into_channel(self.socket.clone()));
                }
                Ok(count)
            }
        }
    }
}

impl Write for &TlsSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let channel = self.channel.get().ok_or(io::ErrorKind::NotConnected)?;
        channel.write(&[WriteSlice::bytes(bytes)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for TlsSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for TlsSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSocket").field("socket", &self.socket).finish_non_exhaustive()
    }
}
