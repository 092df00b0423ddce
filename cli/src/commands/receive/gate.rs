//! Connections that are not identified yet. They cost a descriptor each, up to a bound, and nothing else: no thread, no
//! file, and no time of the migration.

use super::caller::{INIT_LEN, MAX_FIRST, Verdict, What, incomplete, judge, unsealed};
use super::dropped::Dropped;
use crate::socket::{Peer, Socket};
use qevm_multifd::Init;
use qevm_savevm::ram::RamBlocks;
use qevm_wire::PageGeometry;
use rustix::process::{Resource, getrlimit};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a connection may take to show what it is.
const SILENCE: Duration = Duration::from_secs(5);
/// The most connections that a source opens: the main channel, page channels, and the second one of postcopy.
const OF_A_SOURCE: usize = 1 + u8::MAX as usize + 1;
/// How many others may be waiting to show what they are, if the process may have enough descriptors.
const OTHERS: usize = 128;
/// The share of the process's descriptors that all of these may take: files need some, too.
const SHARE: u64 = 2;
/// How long the oldest of them is let alone when there are more.
const GRACE: Duration = Duration::from_millis(100);
/// How long a source is let alone before it learns of a fault. QEMU 7.2 hangs, monitor and guest included, if a page
/// channel is closed while it opens the others.
pub(super) const REFUSAL_DELAY: Duration = Duration::from_millis(500);
/// Silent connections that are kept because one may be the second channel of postcopy.
const SILENT_CHANNELS: usize = 8;

/// A connection that belongs to the migration.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) socket: Socket,
    pub(super) peer: Peer,
    /// What was read to recognise it.
    pub(super) first: Vec<u8>,
    pub(super) known: Known,
}

/// What it is.
#[derive(Debug)]
pub(super) enum Known {
    Main,
    PageChannel(Init),
    Preempt,
}

#[derive(Debug)]
struct Stranger {
    socket: Socket,
    peer: Peer,
    first: Vec<u8>,
    since: Instant,
    /// It came when the migration was under way already.
    late: bool,
    /// It was turned away, and is closed then.
    closing: Option<Instant>,
    /// Why it has no TLS session.
    unsealed: Option<String>,
}

/// What unidentified connections are measured by.
pub(super) struct Context<'c> {
    /// The source of the migration that is under way.
    pub(super) main: Option<&'c Peer>,
    /// What a preempt channel would refer to, if there can be one.
    pub(super) preempt: Option<(Arc<RamBlocks>, PageGeometry)>,
}

/// The connections that are not identified yet, the oldest first.
#[derive(Debug)]
pub(super) struct Gate {
    strangers: VecDeque<Stranger>,
    room: usize,
    pub(super) dropped: Dropped,
}

impl Gate {
    pub(super) fn new() -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        // A source may open all of its connections before it says anything on the first.
        let room = usize::try_from(descriptors / SHARE).unwrap_or(usize::MAX).clamp(1, OF_A_SOURCE + OTHERS);
        Gate { strangers: VecDeque::new(), room, dropped: Dropped::default() }
    }

    /// True if another connection can be taken in, for which the oldest may have to go.
    pub(super) fn has_room(&self) -> bool {
        let oldest = self.strangers.iter().find(|stranger| stranger.closing.is_none());
        self.strangers.len() < self.room || oldest.is_some_and(|stranger| stranger.since.elapsed() > GRACE)
    }

    /// Closes the connection that has been silent longest; false if there is none.
    pub(super) fn drop_oldest(&mut self, why: &str) -> bool {
        let oldest = self.strangers.iter().position(|stranger| stranger.closing.is_none()).unwrap_or(0);
        let Some(Stranger { peer, first, closing, .. }) = self.strangers.remove(oldest) else { return false };
        if closing.is_none() {
            self.dropped.note(&peer, &incomplete(&first, why));
        }
        true
    }

    /// Takes in a connection.
    pub(super) fn push(&mut self, socket: Socket, peer: Peer, late: bool) {
        if self.strangers.len() >= self.room {
            self.drop_oldest("others are waiting");
        }
        let (first, since) = (Vec::new(), Instant::now());
        self.strangers.push_back(Stranger { socket, peer, first, since, late, closing: None, unsealed: None });
    }

    /// Turns away a page channel that could have been one of the migration, but not at once.
    pub(super) fn refuse(&mut self, caller: Caller, why: String) {
        let Caller { socket, peer, first, .. } = caller;
        self.dropped.note(&peer, &What { kind: "a multifd channel".into(), detail: why });
        let since = Instant::now();
        let closing = Some(since + REFUSAL_DELAY);
        self.strangers.push_back(Stranger { socket, peer, first, since, late: true, closing, unsealed: None });
    }

    /// The sockets of those of whom something is expected.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        let expected = self.strangers.iter().filter(|stranger| stranger.closing.is_none());
        expected.filter(|stranger| stranger.first.len() < MAX_FIRST).map(|stranger| &stranger.socket)
    }

    /// Looks what each connection has sent, and gives those that are known now. Strangers are closed, and those that
    /// have sent too little for too long.
    pub(super) fn recognise(&mut self, context: &Context<'_>) -> Vec<Caller> {
        let now = Instant::now();
        let (mut callers, mut silent_channels) = (Vec::new(), 0);
        let mut main = context.main.copied();
        for _ in 0..self.strangers.len() {
            let Some(mut stranger) = self.strangers.pop_front() else { break };
            if let Some(closing) = stranger.closing {
                if closing > now {
                    self.strangers.push_back(stranger);
                }
                continue;
            }
            let may_be_silent =
                context.preempt.is_some() && stranger.late && main.is_some_and(|main| main.same_host(&stranger.peer));
            let preempt = context.preempt.as_ref().filter(|_| may_be_silent);
            let ended = stranger.read();
            if ended && stranger.first.is_empty() && !stranger.socket.not_tls().is_empty() {
                let why = "its other end closed it in the handshake: does it believe this certificate?";
                stranger.unsealed.get_or_insert_with(|| why.to_owned());
            }
            if let Some(why) = stranger.unsealed {
                self.dropped.note(&stranger.peer, &unsealed(&stranger.socket.not_tls(), why));
                continue;
            }
            let known = match judge(&stranger.first, ended, preempt) {
                Verdict::Main if main.is_some() => {
                    let detail = "one is under way".to_owned();
                    self.dropped.note(&stranger.peer, &What { kind: "a second migration".into(), detail });
                    continue;
                }
                Verdict::Main => {
                    main = Some(stranger.peer);
                    Known::Main
                }
                Verdict::PageChannel(init) => Known::PageChannel(init),
                Verdict::Preempt => Known::Preempt,
                Verdict::Stranger(what) => {
                    self.dropped.note(&stranger.peer, &what);
                    continue;
                }
                Verdict::Wait => {
                    let spared = may_be_silent && stranger.first.is_empty() && silent_channels < SILENT_CHANNELS;
                    silent_channels += usize::from(spared);
                    if spared || now.duration_since(stranger.since) < SILENCE {
                        self.strangers.push_back(stranger);
                    } else {
                        let then = format!("nothing more within {} s", SILENCE.as_secs());
                        self.dropped.note(&stranger.peer, &incomplete(&stranger.first, &then));
                    }
                    continue;
                }
            };
            let Stranger { socket, peer, first, .. } = stranger;
            callers.push(Caller { socket, peer, first, known });
        }
        self.dropped.flush();
        callers
    }

    /// What came so far and was no migration, those that still wait included; `None` if none came.
    pub(super) fn summary(&self) -> Option<String> {
        let waiting = self.strangers.iter().filter(|stranger| stranger.closing.is_none());
        self.dropped.summary(waiting.map(|stranger| incomplete(&stranger.first, "").kind))
    }
}

impl Stranger {
    /// Reads what is there; true if nothing can follow.
    fn read(&mut self) -> bool {
        let mut buffer = [0; MAX_FIRST];
        loop {
            // A main channel's bytes are its reader's, as far as they are not needed here.
            let wanted = if self.first.len() < INIT_LEN { INIT_LEN } else { MAX_FIRST } - self.first.len();
            match (&self.socket).read(&mut buffer[..wanted]) {
                Ok(0) => return wanted > 0,
                Ok(count) => self.first.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    if matches!(self.socket, Socket::Tls(_)) {
                        self.unsealed = Some(error.to_string());
                    }
                    return true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::{Address, Listener};
    use std::os::unix::net::UnixStream;
    use std::thread;

    #[test]
    fn a_source_may_be_silent_on_all_its_connections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let mut gate = Gate::new();
        let connect = |gate: &mut Gate| {
            let source = UnixStream::connect(&path).unwrap();
            let (socket, peer) = listener.accept().unwrap().unwrap();
            gate.push(socket, peer, false);
            source
        };
        let _sources: Vec<_> = (0..OF_A_SOURCE).map(|_| connect(&mut gate)).collect();
        thread::sleep(2 * GRACE);
        assert!(gate.has_room());
        let nobody = Context { main: None, preempt: None };
        assert!(gate.recognise(&nobody).is_empty());
        assert_eq!((gate.strangers.len(), gate.dropped.summary([].into_iter())), (OF_A_SOURCE, None));
        // None of them goes as long as nobody else comes.
        gate.room = OF_A_SOURCE;
        assert!(gate.has_room());
        assert_eq!(gate.strangers.len(), OF_A_SOURCE);
        let _other = connect(&mut gate);
        assert_eq!(gate.strangers.len(), OF_A_SOURCE);
        assert!(gate.dropped.summary([].into_iter()).is_some());
        gate.strangers.iter_mut().for_each(|stranger| stranger.since = Instant::now());
        assert!(!gate.has_room());
    }
}
