//! A page server: gives the bytes of a mapped-ram file, which is never written, to any number of clients at once
//! (network block device protocol).
//!
//! A client costs a thread, and a buffer of 256 KiB once it reads. It gets an answer to one request before the next is
//! read, so that no client has more work under way than that, and who does not take an answer is dropped after some
//! time. Clients share nothing but the file, which the operating system keeps in its page cache once for all of them.

use crate::socket::{Listener, Peer, Socket};
use qevm_inspect::failure::{Failure, printable};
use qevm_inspect::rewrite::mapped_file::MappedFile;
use qevm_nbd::number::{MAX_READ, command, errno, handshake};
use qevm_nbd::{Chunk, ClientDecoder, ClientEvent, Content, Export, Negotiation, Outcome, Request, ServerEvent};
use qevm_wire::{Driver, Writer};
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of a file that are read and sent at a time.
const PIECE: u64 = 256 << 10;
/// Fewer zeroes than this are sent as they are.
const LEAST_HOLE: u64 = 4096;
/// How long a client may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Options that a client may ask for. QEMU's ask for four.
const MOST_OPTIONS: usize = 32;
/// Stack of a client's thread.
const STACK: usize = 256 << 10;

/// A page server of one file.
#[derive(Debug)]
pub struct Server {
    file: MappedFile,
    export: Export,
    limits: Limits,
    clients: AtomicUsize,
    totals: Totals,
}

/// What clients may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Clients at a time.
    pub clients: usize,
    /// How long a client may take no byte of an answer.
    pub patience: Duration,
}

/// What was done so far.
#[derive(Debug, Default)]
pub struct Totals {
    /// Clients that have come.
    pub clients: AtomicU64,
    /// Reads that were answered.
    pub reads: AtomicU64,
    /// Bytes of the file that were given, zeroes included.
    pub bytes: AtomicU64,
}

/// Why a connection is over that was not ended in order.
#[derive(Debug)]
enum Gone {
    /// It broke, or the client did not take its answer, or said nothing for too long.
    Io(io::Error),
    /// The client does not speak the protocol.
    Protocol(String),
}

impl Gone {
    /// As with a client that was killed.
    fn is_usual(&self) -> bool {
        matches!(self, Gone::Io(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset))
    }
}

impl From<io::Error> for Gone {
    fn from(error: io::Error) -> Self {
        Gone::Io(error)
    }
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gone::Io(error) if error.kind() == ErrorKind::WouldBlock => {
                f.write_str("it has taken too long to say what it wants, or to take an answer")
            }
            Gone::Io(error) => error.fmt(f),
            Gone::Protocol(why) => f.write_str(why),
        }
    }
}

impl Server {
    /// Serves `file`, which is described to people as `description`.
    pub fn new(file: MappedFile, description: String, limits: Limits) -> Arc<Server> {
        let export = Export { description, len: file.len() };
        Arc::new(Server { file, export, limits, clients: AtomicUsize::new(0), totals: Totals::default() })
    }

    /// The file.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    /// What was done so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Takes every connection that waits at `listener`. Those beyond the limit are dropped.
    ///
    /// # Errors
    /// What the operating system says, above all that it has no room for more; it is worth another try.
    pub fn accept(self: &Arc<Self>, listener: &Listener) -> io::Result<()> {
        while let Some((socket, peer)) = listener.accept()? {
            if self.clients.fetch_add(1, Ordering::Relaxed) >= self.limits.clients {
                self.clients.fetch_sub(1, Ordering::Relaxed);
                say(format_args!(
                    "a client from {peer} is dropped: there are {} already (--max-clients)",
                    self.limits.clients
                ));
                continue;
            }
            let client =
                Client { server: self.clone(), number: self.totals.clients.fetch_add(1, Ordering::Relaxed) + 1 };
            // The number of clients goes down again with `client`, whatever happens.
            thread::Builder::new()
                .name("client".into())
                .stack_size(STACK)
                .spawn(move || client.serve(&socket, peer))?;
        }
        Ok(())
    }
}

/// One connection.
struct Client {
    server: Arc<Server>,
    number: u64,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.server.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

type Input<'s> = Driver<&'s Socket, ClientDecoder>;

impl Client {
    fn serve(self, socket: &Socket, peer: Peer) {
        if let Err(gone) = self.session(socket)
            && !gone.is_usual()
        {
            say(format_args!("client {} from {peer} is dropped: {gone}", self.number));
        }
        // There is room for another one as soon as this one knows.
        drop(self);
        socket.close();
    }

    fn session(&self, socket: &Socket) -> Result<(), Gone> {
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(self.server.limits.patience))?;
        socket.keep_alive()?;
        let mut input = Driver::new(socket, ClientDecoder::default());
        let Some(negotiation) = self.handshake(socket, &mut input)? else { return Ok(()) };
        // A guest need not touch a page for as long as it likes.
        socket.set_read_timeout(None)?;
        self.requests(socket, &mut input, negotiation)
    }

    /// Agrees on how it goes on; `None` if it does not.
    fn handshake(&self, mut socket: &Socket, input: &mut Input<'_>) -> Result<Option<Negotiation>, Gone> {
        let begun = Instant::now();
        let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        socket.write_all(&encoded(&ServerEvent::Hello(flags)))?;
        let mut negotiation = Negotiation::default();
        for _ in 0..=MOST_OPTIONS {
            let left = HANDSHAKE.saturating_sub(begun.elapsed());
            socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut answer = Writer::new();
            let outcome = match next(input)? {
                None => return Ok(None),
                Some(ClientEvent::Flags(found)) if found & !u32::from(flags) != 0 => {
                    return Err(Gone::Protocol(format!("handshake flags {found:#x}, expected some of {flags:#x}")));
                }
                Some(ClientEvent::Flags(found)) => {
                    negotiation.no_zeroes = found & u32::from(handshake::NO_ZEROES) != 0;
                    Outcome::Continue
                }
                Some(ClientEvent::Option { option, data }) => {
                    negotiation.option(&self.server.export, option, data, &mut answer)
                }
                Some(_) => Outcome::Close,
            };
            if outcome == Outcome::Begin {
                // A client that has the answer may send a request.
                input.decoder_mut().begin();
            }
            socket.write_all(answer.as_bytes())?;
            match outcome {
                Outcome::Continue => {}
                Outcome::Begin => return Ok(Some(negotiation)),
                Outcome::Close => return Ok(None),
            }
        }
        Err(Gone::Protocol(format!("more than {MOST_OPTIONS} options")))
    }

    fn requests(&self, socket: &Socket, input: &mut Input<'_>, negotiation: Negotiation) -> Result<(), Gone> {
        let mut answer =
            Answer { socket, structured: negotiation.structured, bytes: Vec::new(), told: false, client: self };
        while let Some(event) = next(input)? {
            let ClientEvent::Request(request) = event else { return Ok(()) };
            match request.command {
                command::DISCONNECT => return Ok(()),
                _ if request.flags != 0 => answer.refuse(&request, errno::EINVAL, "no flag was offered")?,
                command::READ => self.read(&request, &mut answer)?,
                command::WRITE => answer.refuse(&request, errno::EPERM, "the export is read-only")?,
                _ => answer.refuse(&request, errno::EINVAL, "this server only reads")?,
            }
        }
        Ok(())
    }

    fn read(&self, request: &Request, answer: &mut Answer<'_>) -> Result<(), Gone> {
        let Request { offset, len, .. } = *request;
        let end = offset.checked_add(len.into()).filter(|end| *end <= self.server.export.len);
        let Some(end) = end else {
            let why = format!("{len} bytes from byte {offset}, beyond the end at {}", self.server.export.len);
            return answer.refuse(request, errno::EINVAL, &why);
        };
        if len > MAX_READ {
            return answer.refuse(
                request,
                errno::EOVERFLOW,
                &format!("{len} bytes at once, expected at most {MAX_READ}"),
            );
        }
        let (file, mut at) = (&self.server.file, offset);
        if len == 0 {
            answer.nothing(request)?;
        }
        while at < end {
            let zeroes = if answer.structured { file.zeroes_at(at, end - at) } else { 0 };
            if zeroes >= LEAST_HOLE.min(end - at) {
                answer.hole(request, at, zeroes, at + zeroes == end)?;
                at += zeroes;
                continue;
            }
            let piece = PIECE.min(end - at);
            let header = answer.header(request, at, piece, at + piece == end);
            answer.bytes.resize(header + piece as usize, 0);
            if let Err(failure) = file.read_at(&mut answer.bytes[header..], at) {
                return answer.fail(request, at, &failure);
            }
            answer.send()?;
            at += piece;
        }
        self.server.totals.reads.fetch_add(1, Ordering::Relaxed);
        self.server.totals.bytes.fetch_add(len.into(), Ordering::Relaxed);
        Ok(())
    }
}

/// What goes to a client.
struct Answer<'a> {
    socket: &'a Socket,
    structured: bool,
    /// What is sent next.
    bytes: Vec<u8>,
    /// A failure was printed.
    told: bool,
    client: &'a Client,
}

impl Answer<'_> {
    fn send(&mut self) -> Result<(), Gone> {
        let mut socket = self.socket;
        Ok(socket.write_all(&self.bytes)?)
    }

    fn put(&mut self, event: &ServerEvent<'_>) {
        self.bytes.clear();
        self.bytes.extend(encoded(event));
    }

    fn chunk(&mut self, request: &Request, done: bool, content: Content<'_>) {
        self.put(&ServerEvent::Chunk(Chunk { done, cookie: request.cookie, content }));
    }

    /// Puts what comes before `len` bytes from `offset` on, and says how much that is.
    fn header(&mut self, request: &Request, offset: u64, len: u64, done: bool) -> usize {
        match self.structured {
            true => self.chunk(request, done, Content::Data { offset, len: len as u32 }),
            // The one reply comes before the first piece.
            false if offset == request.offset => self.put(&ServerEvent::Simple { error: 0, cookie: request.cookie }),
            false => self.bytes.clear(),
        }
        self.bytes.len()
    }

    fn hole(&mut self, request: &Request, offset: u64, len: u64, done: bool) -> Result<(), Gone> {
        self.chunk(request, done, Content::Hole { offset, len: len as u32 });
        self.send()
    }

    fn nothing(&mut self, request: &Request) -> Result<(), Gone> {
        match self.structured {
            true => self.chunk(request, true, Content::None),
            false => self.put(&ServerEvent::Simple { error: 0, cookie: request.cookie }),
        }
        self.send()
    }

    fn refuse(&mut self, request: &Request, error: u32, why: &str) -> Result<(), Gone> {
        match self.structured {
            true => {
                let content = Content::Error { error, message: shortened(why).as_bytes(), offset: None };
                self.chunk(request, true, content);
            }
            false => self.put(&ServerEvent::Simple { error, cookie: request.cookie }),
        }
        self.send()
    }

    /// The bytes from `offset` on cannot be read.
    fn fail(&mut self, request: &Request, offset: u64, failure: &Failure) -> Result<(), Gone> {
        let why = failure.to_string();
        if !self.told {
            self.told = true;
            say(format_args!("client {} asked for what cannot be read: {why}", self.client.number));
        }
        match self.structured {
            true => {
                let message = shortened(&why).as_bytes();
                self.chunk(request, true, Content::Error { error: errno::EIO, message, offset: Some(offset) });
            }
            false if offset == request.offset => {
                self.put(&ServerEvent::Simple { error: errno::EIO, cookie: request.cookie })
            }
            // It has been told that all is well.
            false => return Err(Gone::Protocol("what was promised cannot be read".into())),
        }
        self.send()
    }
}

/// As long as a text of the protocol may be.
fn shortened(text: &str) -> &str {
    let most = qevm_nbd::number::MAX_STRING.min(text.len());
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

fn encoded(event: &ServerEvent<'_>) -> Vec<u8> {
    let mut writer = Writer::new();
    event.encode(&mut writer);
    writer.into_bytes()
}

fn next<'d>(input: &'d mut Input<'_>) -> Result<Option<ClientEvent<'d>>, Gone> {
    input.next().map_err(|error| match error {
        qevm_wire::DriveError::Io(error) => Gone::Io(error),
        error => Gone::Protocol(error.to_string()),
    })
}

/// Says something, if there is a reader.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "qevm: {}", printable(&line.to_string()));
}
