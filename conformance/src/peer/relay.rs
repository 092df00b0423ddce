//! A way between two monitors that breaks when the judge says so, and can be used again.

use anyhow::{Context, Result};
use parking_lot::{Mutex, MutexGuard};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const POLL: Duration = Duration::from_millis(2);

/// When all connections break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    /// This many bytes have gone from source to destination since this was said.
    Forth(u64),
    /// This many have come back.
    Back(u64),
}

/// Where a process listens on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Path(PathBuf),
    Port(u16),
}

impl Place {
    /// A port at which no process listens.
    pub(super) fn free_port() -> Result<Place> {
        Ok(Place::Port(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port()))
    }

    /// As QEMU names it.
    pub(super) fn uri(&self) -> String {
        match self {
            Place::Path(path) => format!("unix:{}", path.display()),
            Place::Port(port) => format!("tcp:127.0.0.1:{port}"),
        }
    }

    fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Place::Path(path) => UnixStream::connect(path),
            Place::Port(port) => Ok(plain(TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?)),
        }
    }
}

/// A connection of which only bytes matter.
fn plain(stream: TcpStream) -> UnixStream {
    // Without, small messages are late, and arrive all the same.
    let _ = stream.set_nodelay(true);
    UnixStream::from(OwnedFd::from(stream))
}

/// Hands every connection on to a destination. Ends with this.
#[derive(Debug)]
#[must_use]
pub(super) struct Relay {
    entry: Place,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared(Mutex<State>);

#[derive(Debug)]
struct State {
    destination: Place,
    next: Option<Break>,
    /// Both ends of every connection.
    ends: Vec<UnixStream>,
    /// How often all of them were broken.
    broken: usize,
    over: bool,
}

impl Relay {
    /// Listens at `entry`.
    pub(super) fn listen(entry: Place, destination: Place) -> Result<Relay> {
        let context = || format!("listening at {}", entry.uri());
        let accept: Box<dyn Fn() -> io::Result<UnixStream> + Send> = match &entry {
            Place::Path(path) => {
                let _ = std::fs::remove_file(path);
                let listener = UnixListener::bind(path).with_context(context)?;
                listener.set_nonblocking(true)?;
                Box::new(move || Ok(listener.accept()?.0))
            }
            Place::Port(port) => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).with_context(context)?;
                listener.set_nonblocking(true)?;
                Box::new(move || Ok(plain(listener.accept()?.0)))
            }
        };
        let state = State { destination, next: None, ends: Vec::new(), broken: 0, over: false };
        let shared = Arc::new(Shared(Mutex::new(state)));
        let accepting = shared.clone();
        thread::spawn(move || {
            while !accepting.lock().over {
                match accept() {
                    Ok(source) => accepting.hand_on(source),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(POLL),
                    Err(_) => break,
                }
            }
        });
        Ok(Relay { entry, shared })
    }

    /// Where it listens.
    pub(super) fn entry(&self) -> &Place {
        &self.entry
    }

    /// Connections that come from here on go there.
    pub(super) fn lead_to(&self, destination: Place) {
        self.shared.lock().destination = destination;
    }

    /// Says when all connections are to break, once.
    pub(super) fn break_at(&self, when: Break) {
        self.shared.lock().next = Some(when);
    }

    /// How often they have broken.
    pub(super) fn broken(&self) -> usize {
        self.shared.lock().broken
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.lock().over = true;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    fn hand_on(self: &Arc<Self>, source: UnixStream) {
        let mut state = self.lock();
        // Where no process listens the source's connection is closed, as where no host is.
        let Ok(destination) = state.destination.connect() else { return };
        for (from, to, forth) in [(&source, &destination, true), (&destination, &source, false)] {
            let (Ok(from), Ok(to), Ok(end)) = (from.try_clone(), to.try_clone(), from.try_clone()) else { return };
            state.ends.push(end);
            let shared = self.clone();
            thread::spawn(move || shared.pass_on(&from, &to, forth));
        }
    }

    fn pass_on(&self, mut from: &UnixStream, mut to: &UnixStream, forth: bool) {
        let mut chunk = [0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            let (allowed, breaks) = self.lock().allow(count as u64, forth);
            let sent = to.write_all(&chunk[..allowed as usize]);
            if breaks {
                self.lock().break_off();
            }
            if breaks || sent.is_err() {
                return;
            }
        }
        // It may be broken already.
        let _ = to.shutdown(Shutdown::Write);
    }
}

impl State {
    /// How many of these bytes may pass, and whether all breaks then.
    fn allow(&mut self, count: u64, forth: bool) -> (u64, bool) {
        let left = match (&mut self.next, forth) {
            (Some(Break::Forth(left)), true) | (Some(Break::Back(left)), false) => left,
            _ => return (count, false),
        };
        if *left > count {
            *left -= count;
            return (count, false);
        }
        let allowed = *left;
        self.next = None;
        (allowed, true)
    }

    fn break_off(&mut self) {
        for end in self.ends.drain(..) {
            // It may have ended.
            let _ = end.shutdown(Shutdown::Both);
        }
        self.broken += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_breaks_where_it_is_told_to_and_can_be_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let [entry, exit] = ["entry", "exit"].map(|name| folder.path().join(name));
        let listener = UnixListener::bind(&exit).unwrap();
        let relay = Relay::listen(Place::Path(entry.clone()), Place::Path(exit)).unwrap();
        for (n, when) in [Break::Forth(5), Break::Back(3), Break::Forth(0)].into_iter().enumerate() {
            relay.break_at(when);
            let mut source = UnixStream::connect(&entry).unwrap();
            let (mut destination, _) = listener.accept().unwrap();
            let (mut arrived, mut came_back) = (Vec::new(), Vec::new());
            source.write_all(b"ab").unwrap();
            if let Break::Back(_) = when {
                let mut two = [0; 2];
                destination.read_exact(&mut two).unwrap();
                destination.write_all(b"hello").unwrap();
                source.read_to_end(&mut came_back).unwrap();
                assert_eq!((&two, came_back.as_slice()), (b"ab", &b"hel"[..]));
            } else {
                // It may be broken by then.
                let _ = source.write_all(b"cdefgh");
                destination.read_to_end(&mut arrived).unwrap();
                assert_eq!(arrived, if when == Break::Forth(0) { &b""[..] } else { b"abcde" });
                source.read_to_end(&mut came_back).unwrap();
            }
            assert_eq!(relay.broken(), n + 1);
        }
    }
}
