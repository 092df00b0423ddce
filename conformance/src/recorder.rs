//! Records what a migrating QEMU says on every channel, at a dead end or on the way to a second QEMU.
//!
//! A [`Recorder`] listens like a destination. Each connection gets a file of its own with what the source sent; towards
//! a second QEMU it also forwards, and records what came back.

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const BUFFER: usize = 256 * 1024;
const POLL: Duration = Duration::from_millis(2);

/// A recording listener.
#[derive(Debug)]
pub struct Recorder {
    uri: String,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// One recorded connection.
#[derive(Debug, Clone)]
pub struct Channel {
    /// What the source sent.
    pub forward: PathBuf,
    /// What the destination answered; an empty file at a dead end.
    pub back: PathBuf,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    /// The second QEMU's socket; none at a dead end.
    upstream: Option<PathBuf>,
    stop: AtomicBool,
    forwarded: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    channels: Vec<Channel>,
    sockets: Vec<Socket>,
    workers: Vec<JoinHandle<()>>,
    failure: Option<String>,
}

impl Recorder {
    /// Listens on a UNIX socket in `folder`, with `prefix` in front of each file's name. With `upstream`, every
    /// connection is forwarded to that UNIX socket.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn unix(folder: &Path, prefix: &str, upstream: Option<&Path>) -> Result<Recorder> {
        let path = folder.join(format!("{prefix}.sock"));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).with_context(|| format!("binding {}", path.display()))?;
        listener.set_nonblocking(true)?;
        let uri = format!("unix:{}", path.display());
        Ok(Recorder::start(uri, folder, prefix, upstream, move || listener.accept().map(|(s, _)| Socket::Unix(s))))
    }

    /// Listens on a free TCP port of the loopback interface; a dead end.
    ///
    /// # Errors
    /// No port can be bound.
    pub fn tcp(folder: &Path, prefix: &str) -> Result<Recorder> {
        let listener = TcpListener::bind("127.0.0.1:0").context("binding a TCP port")?;
        listener.set_nonblocking(true)?;
        let uri = format!("tcp:{}", listener.local_addr()?);
        Ok(Recorder::start(uri, folder, prefix, None, move || listener.accept().map(|(s, _)| Socket::Tcp(s))))
    }

    fn start(
        uri: String,
        folder: &Path,
        prefix: &str,
        upstream: Option<&Path>,
        mut accept: impl FnMut() -> std::io::Result<Socket> + Send + 'static,
    ) -> Recorder {
        let shared = Arc::new(Shared {
            folder: folder.to_path_buf(),
            upstream: upstream.map(Path::to_path_buf),
            stop: AtomicBool::new(false),
            forwarded: AtomicU64::new(0),
            state: Mutex::new(State::default()),
        });
        let (theirs, prefix) = (Arc::clone(&shared), prefix.to_string());
        let acceptor = thread::spawn(move || {
            while !theirs.stop.load(Ordering::Relaxed) {
                match accept() {
                    Ok(socket) => {
                        if let Err(e) = connect(&theirs, &prefix, socket) {
                            theirs.fail(format!("{e:#}"));
                        }
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => thread::sleep(POLL),
                    Err(e) => {
                        theirs.fail(format!("accept: {e}"));
                        break;
                    }
                }
            }
        });
        Recorder { uri, shared, acceptor: Some(acceptor) }
    }

    /// What `migrate` takes as `uri`.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Bytes that sources have sent so far on all connections.
    pub fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(Ordering::Relaxed)
    }

    /// Cuts every connection, as a broken network does.
    pub fn cut(&self) {
        self.shared.state.lock().sockets.drain(..).for_each(|s| s.shut(Shutdown::Both));
    }

    /// Waits until every connection has ended and gives the channels in the order of their arrival.
    ///
    /// # Errors
    /// A connection is still open after `limit` (it is cut then), or could not be forwarded or written.
    pub fn finish(mut self, limit: Duration) -> Result<Vec<Channel>> {
        let deadline = Instant::now() + limit;
        while !self.shared.idle() {
            if Instant::now() > deadline {
                self.cut();
                bail!("a channel of {} is still open after {} s", self.uri, limit.as_secs());
            }
            thread::sleep(POLL);
        }
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let mut state = self.shared.state.lock();
        match state.failure.take() {
            Some(failure) => bail!("recording {}: {failure}", self.uri),
            None => Ok(std::mem::take(&mut state.channels)),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.cut();
    }
}

impl Shared {
    fn fail(&self, why: String) {
        self.state.lock().failure.get_or_insert(why);
    }

    fn idle(&self) -> bool {
        self.state.lock().workers.iter().all(JoinHandle::is_finished)
    }
}

/// Starts recording one accepted connection.
fn connect(shared: &Arc<Shared>, prefix: &str, source: Socket) -> Result<()> {
    source.set_blocking()?;
    let number = shared.state.lock().channels.len();
    let channel = Channel {
        forward: shared.folder.join(format!("{prefix}-{number}.forward")),
        back: shared.folder.join(format!("{prefix}-{number}.back")),
    };
    let (forward, back) = (File::create(&channel.forward)?, File::create(&channel.back)?);
    let upstream = match &shared.upstream {
        Some(path) => Some(Socket::Unix(UnixStream::connect(path).context("connecting to the second QEMU")?)),
        None => None,
    };
    let mut workers = Vec::new();
    let mut sockets = vec![source.duplicate()?];
    if let Some(upstream) = &upstream {
        sockets.push(upstream.duplicate()?);
        let (from, to, theirs) = (upstream.duplicate()?, source.duplicate()?, Arc::clone(shared));
        workers.push(thread::spawn(move || {
            if let Err(e) = copy(from, Some(to), back, |_| {}) {
                theirs.fail(format!("return path: {e}"));
            }
        }));
    }
    let theirs = Arc::clone(shared);
    workers.push(thread::spawn(move || {
        let count = |n| {
            theirs.forwarded.fetch_add(n, Ordering::Relaxed);
        };
        if let Err(e) = copy(source, upstream, forward, count) {
            theirs.fail(format!("channel {number}: {e}"));
        }
    }));
    let mut state = shared.state.lock();
    state.channels.push(channel);
    state.sockets.append(&mut sockets);
    state.workers.append(&mut workers);
    Ok(())
}

/// Copies until the end; a peer that goes away ends the copy, only the recording itself can fail.
fn copy(mut from: Socket, mut to: Option<Socket>, mut file: File, count: impl Fn(u64)) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        file.write_all(&buffer[..n])?;
        count(n as u64);
        if let Some(peer) = &mut to
            && peer.write_all(&buffer[..n]).is_err()
        {
            to = None;
        }
    }
    if let Some(to) = to {
        to.shut(Shutdown::Write);
    }
    Ok(())
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn set_blocking(&self) -> std::io::Result<()> {
        match self {
            Socket::Unix(s) => s.set_nonblocking(false),
            Socket::Tcp(s) => s.set_nonblocking(false),
        }
    }

    fn duplicate(&self) -> std::io::Result<Socket> {
        match self {
            Socket::Unix(s) => s.try_clone().map(Socket::Unix),
            Socket::Tcp(s) => s.try_clone().map(Socket::Tcp),
        }
    }

    fn shut(&self, how: Shutdown) {
        // A connection that has already ended needs no shutting.
        let _ = match self {
            Socket::Unix(s) => s.shutdown(how),
            Socket::Tcp(s) => s.shutdown(how),
        };
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Socket::Unix(s) => s.read(buffer),
            Socket::Tcp(s) => s.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Socket::Unix(s) => s.write(bytes),
            Socket::Tcp(s) => s.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::PATIENCE;

    #[test]
    fn every_connection_has_a_file_and_the_answer_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let peer = folder.path().join("peer.sock");
        let listener = UnixListener::bind(&peer).unwrap();
        let answering = thread::spawn(move || {
            for _ in 0..2 {
                let (mut socket, _) = listener.accept().unwrap();
                let mut all = Vec::new();
                socket.read_to_end(&mut all).unwrap();
                socket.write_all(b"pong ").unwrap();
                socket.write_all(&all).unwrap();
            }
        });
        let recorder = Recorder::unix(folder.path(), "t", Some(&peer)).unwrap();
        for said in ["one", "two"] {
            let mut source = UnixStream::connect(recorder.uri().strip_prefix("unix:").unwrap()).unwrap();
            source.write_all(said.as_bytes()).unwrap();
            source.shutdown(Shutdown::Write).unwrap();
            let mut back = String::new();
            source.read_to_string(&mut back).unwrap();
            assert_eq!(back, format!("pong {said}"));
        }
        answering.join().unwrap();
        assert_eq!(recorder.forwarded(), 6);
        let channels = recorder.finish(PATIENCE).unwrap();
        assert_eq!(fs::read(&channels[1].forward).unwrap(), b"two");
        assert_eq!(fs::read(&channels[1].back).unwrap(), b"pong two");
    }

    #[test]
    fn an_open_connection_is_an_error_not_a_hang() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::tcp(folder.path(), "t").unwrap();
        let _open = TcpStream::connect(recorder.uri().strip_prefix("tcp:").unwrap()).unwrap();
        while recorder.shared.state.lock().channels.is_empty() {
            thread::sleep(POLL);
        }
        assert!(recorder.finish(Duration::from_millis(50)).is_err());
    }
}
