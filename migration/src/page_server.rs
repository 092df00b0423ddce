//! Files at a page server (network block device protocol): reading at any place, over two connections, so that a guest
//! that waits for a page does not wait for what is read ahead of it.

use super::channel::{ReadSlice, WriteSlice, write_all};
use super::{Address, Channel, Socket};
use parking_lot::{Mutex, MutexGuard};
use qevm_nbd::number::{MAX_READ, command, handshake, info, option, reply};
use qevm_nbd::{Chunk, ClientEvent, Content, ExportQuery, Request, ServerDecoder, ServerEvent};
use qevm_wire::{DriveError, Driver, Writer};
use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Connections to a server.
const CONNECTIONS: usize = 2;
/// How long a server may say nothing when it is asked for something.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that the stream is read by.
const STREAM_READ: usize = 64 << 10;
/// Answers to one option that are read. Servers give one for each thing that they tell of an export.
const MOST_REPLIES: usize = 64;

/// A file at a page server, which is connected to when it is first read.
pub(crate) struct PageServer {
    /// The server's own address.
    address: Address,
    export: String,
    /// Where the stream is in the file.
    position: AtomicU64,
    opening: Mutex<()>,
    /// They are opened together, and never again: another server at the same address may have another file.
    connections: OnceLock<Vec<Mutex<Connection>>>,
}

impl fmt::Debug for PageServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl PageServer {
    /// The export of this name at a socket's address.
    pub(crate) fn new(address: Address, export: String) -> Self {
        let (opening, connections) = (Mutex::new(()), OnceLock::new());
        PageServer { address, export, position: AtomicU64::new(0), opening, connections }
    }

    /// Where the stream is in the file.
    pub(crate) fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Lets the stream go on there.
    pub(crate) fn seek(&self, position: u64) {
        self.position.store(position, Ordering::Relaxed);
    }

    /// Length of the file in bytes.
    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.connection()?.len)
    }

    /// Fills `bytes` from the file.
    pub(crate) fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let mut connection = self.connection()?;
        let pieces = bytes.chunks_mut(MAX_READ as usize);
        (at..).step_by(MAX_READ as usize).zip(pieces).try_for_each(|(at, piece)| connection.read(piece, at))
    }

    /// A connection that is not in use, if there is one.
    fn connection(&self) -> io::Result<MutexGuard<'_, Connection>> {
        let connections = match self.connections.get() {
            Some(connections) => connections,
            None => {
                let opening = self.opening.lock();
                if self.connections.get().is_none() {
                    let opened =
                        (0..CONNECTIONS).map(|_| Connection::open(&self.address, &self.export).map(Mutex::new));
                    // Only who has the lock sets it.
                    let _ = self.connections.set(opened.collect::<io::Result<_>>()?);
                }
                drop(opening);
                self.connections.get().ok_or(ErrorKind::NotConnected)?
            }
        };
        if let Some(unused) = connections.iter().find_map(Mutex::try_lock) {
            return Ok(unused);
        }
        let last = connections.last().ok_or(ErrorKind::NotConnected)?;
        Ok(last.lock())
    }
}

/// The reading end of a socket.
struct Input(Arc<dyn Channel>);

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(&mut [ReadSlice::bytes(bytes)])
    }
}

struct Connection {
    channel: Arc<dyn Channel>,
    input: Driver<Input, ServerDecoder>,
    /// Length of the export.
    len: u64,
    /// The last request's.
    cookie: u64,
    /// It broke.
    lost: bool,
}

impl Connection {
    fn open(address: &Address, export: &str) -> io::Result<Self> {
        let channel = Socket::connect(address).map_err(io::Error::other)?;
        channel.limit_silence(Some(PATIENCE))?;
        let input = Driver::new(Input(channel.clone()), ServerDecoder::default());
        let mut connection = Connection { channel, input, len: 0, cookie: 0, lost: false };
        let ServerEvent::Hello(flags) = connection.next()? else { return Err(unexpected("first words")) };
        if flags & handshake::FIXED_NEWSTYLE == 0 {
            return Err(unexpected("handshake flags, older than 2010,"));
        }
        connection.send(&ClientEvent::Flags((flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES)).into()))?;
        // With them the server says why something cannot be read. Without them it does not.
        connection.option(option::STRUCTURED_REPLY, &[])?.ok();
        let mut query = Writer::new();
        ExportQuery { name: export.as_bytes(), wanted: &[] }.encode(&mut query);
        connection.option(option::GO, query.as_bytes())?.map_err(io::Error::other)?;
        connection.input.decoder_mut().begin();
        Ok(connection)
    }

    /// Asks for something; gives the server's text if it refuses. What it tells of the export is noted.
    fn option(&mut self, asked: u32, data: &[u8]) -> io::Result<Result<(), String>> {
        self.send(&ClientEvent::Option { option: asked, data })?;
        for _ in 0..MOST_REPLIES {
            let ServerEvent::OptionReply { option, reply, data } = self.next()? else { break };
            match reply {
                _ if option != asked => break,
                reply::ACK => return Ok(Ok(())),
                reply::INFO => {
                    let size = data.strip_prefix(&info::EXPORT.to_be_bytes()).and_then(|rest| rest.first_chunk());
                    if let Some(size) = size {
                        self.len = u64::from_be_bytes(*size);
                    }
                }
                reply if reply & reply::ERROR != 0 => {
                    let text = String::from_utf8_lossy(data);
                    return Ok(Err(format!("the page server refuses (error {}): {text}", reply - reply::ERROR)));
                }
                _ => break,
            }
        }
        Err(unexpected("reply to an option"))
    }

    fn read(&mut self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        if self.lost {
            return Err(io::Error::new(ErrorKind::NotConnected, "the connection to the page server is lost"));
        }
        let len = bytes.len() as u32;
        if at.checked_add(len.into()).is_none_or(|end| end > self.len) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.cookie += 1;
        // Until all of the reply was read.
        self.lost = true;
        self.input.decoder_mut().expect(self.cookie, at, len);
        let request = Request { flags: 0, command: command::READ, cookie: self.cookie, offset: at, len };
        self.send(&ClientEvent::Request(request))?;
        let refused = self.reply(bytes, at)?;
        self.lost = false;
        refused.map_or(Ok(()), |why| Err(io::Error::other(why)))
    }

    /// Reads the reply to a request; gives the server's reason if it has failed.
    fn reply(&mut self, bytes: &mut [u8], at: u64) -> io::Result<Option<String>> {
        let (mut filled, mut refused) = (0, None);
        loop {
            let chunk = match self.next()? {
                ServerEvent::Simple { error: 0, .. } => {
                    self.input.payload().read_exact(bytes).map_err(explained)?;
                    return Ok(None);
                }
                ServerEvent::Simple { error, .. } => return Ok(Some(reason(error, b""))),
                ServerEvent::Chunk(chunk) => chunk,
                _ => return Err(unexpected("reply to a request")),
            };
            let Chunk { done, content, .. } = chunk;
            match content {
                Content::Data { offset, len } | Content::Hole { offset, len } => {
                    // The decoder has checked that it was asked for. What was not filled would be taken for zeroes.
                    if offset - at != filled as u64 {
                        return Err(unexpected("order of chunks"));
                    }
                    let place = &mut bytes[filled..filled + len as usize];
                    match content {
                        Content::Data { .. } => self.input.payload().read_exact(place).map_err(explained)?,
                        _ => place.fill(0),
                    }
                    filled += len as usize;
                }
                Content::Error { error, message, .. } => {
                    refused.get_or_insert_with(|| reason(error, message));
                }
                _ => {}
            }
            match refused {
                _ if !done => {}
                None if filled < bytes.len() => return Err(unexpected("end of a reply, in which bytes are missing,")),
                refused => return Ok(refused),
            }
        }
    }

    fn next(&mut self) -> io::Result<ServerEvent<'_>> {
        match self.input.next() {
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err(closed()),
            Err(DriveError::Io(error)) => Err(explained(error)),
            Err(DriveError::Stream(error)) if error.is_truncated() => Err(closed()),
            Err(error) => Err(io::Error::new(ErrorKind::InvalidData, format!("the page server: {error}"))),
        }
    }

    fn send(&self, event: &ClientEvent<'_>) -> io::Result<()> {
        let mut writer = Writer::new();
        event.encode(&mut writer);
        write_all(&*self.channel, &mut [WriteSlice::bytes(writer.as_bytes())]).map_err(explained)
    }
}

fn unexpected(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the page server has sent another {what} than was expected"))
}

fn closed() -> io::Error {
    io::Error::new(ErrorKind::ConnectionAborted, "the page server has closed the connection")
}

fn explained(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            let seconds = PATIENCE.as_secs();
            io::Error::new(ErrorKind::TimedOut, format!("the page server has not answered for {seconds} seconds"))
        }
        ErrorKind::UnexpectedEof => closed(),
        kind => io::Error::new(kind, format!("the connection to the page server is lost: {error}")),
    }
}

fn reason(error: u32, message: &[u8]) -> String {
    match message {
        [] => format!("the page server cannot read it (error {error})"),
        message => {
            let text = String::from_utf8_lossy(message).replace(char::is_control, " ");
            format!("the page server cannot read it: {text}")
        }
    }
}

/// The stream in a file at a page server, from where that [is](PageServer::position).
#[derive(Debug)]
pub(crate) struct ServedStream(pub(crate) Arc<PageServer>);

impl Channel for ServedStream {
    fn write(&self, _: &[WriteSlice<'_>]) -> io::Result<usize> {
        Err(ErrorKind::Unsupported.into())
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let position = self.0.position();
        let room: usize = parts.iter().map(ReadSlice::len).sum();
        let left = usize::try_from(self.0.len()?.saturating_sub(position)).unwrap_or(usize::MAX);
        let count = room.min(left).min(STREAM_READ);
        let mut bytes = vec![0; count];
        self.0.read_at(&mut bytes, position)?;
        let mut rest = bytes.as_slice();
        for part in parts {
            let (head, tail) = rest.split_at(rest.len().min(part.len()));
            part.fill(head);
            rest = tail;
        }
        self.0.seek(position + count as u64);
        Ok(count)
    }

    fn answers(&self) -> bool {
        false
    }

    // Pages are read after the stream, over the same connections.
    fn finish_writing(&self) {}

    fn stop_reading(&self) {}

    fn close(&self) {}
}

#[cfg(test)]
mod tests;
