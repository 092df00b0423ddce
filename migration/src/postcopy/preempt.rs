//! The preempt channel: the connection over which pages come that are waited for, past what is on its way on the
//! main channel.
//!
//! A source opens it with the main channel (7.1, 7.2) or when the guest goes (8.0), and says nothing on it before the
//! first page that is waited for. So any connection after the main channel may be it, and counts for nothing until it
//! has sent the record of a page of a block that the source has listed. With TLS its session begins when it calls: a
//! source waits for that.

use super::assembly::Assembly;
use super::missing::{Line, Shared, State};
use crate::channel::Reading;
use crate::listener::Caller;
use crate::patience::NO_END;
use crate::tls::{self, Accepting};
use crate::unidentified::SilentConn;
use crate::watch::{Brings, Watch, Watched};
use crate::{Channel, ChannelName, Listener, LoadError, MigrationError, PAGE_SIZE, Socket, Tls};
use parking_lot::{Mutex, MutexGuard};
use qevm_savevm::first_bytes::FirstBytes;
use qevm_savevm::ram::{PreemptDecoder, RamBlocks, RamRecord};
use qevm_wire::{Decode, DriveError, Driver, Fault, PageGeometry};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

/// Connections that may be the preempt channel at a time.
const ROOM: usize = 64;
/// Bytes of the longest record, without its page: its word, and a name with its length.
const RECORD: usize = 8 + 1 + 255;
/// How long not to accept when the system could not.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Where the preempt channel comes in.
#[derive(Debug)]
pub(crate) struct PreemptListener {
    listener: Listener,
    /// Where the main channel comes from.
    main: Caller,
    /// A caller has to begin a TLS session.
    tls: Option<Tls>,
    /// Who watches over it.
    watch: Arc<Watch>,
    /// In the order in which they came.
    waiting: Vec<Candidate>,
}

/// A connection that may be it.
#[derive(Debug)]
struct Candidate {
    socket: Socket,
    session: Option<Accepting>,
    caller: Caller,
    said: Vec<u8>,
}

/// What the bytes read so far say of a candidate.
enum Outcome {
    More,
    /// It is the preempt channel.
    Page,
    Drop(String),
}

impl PreemptListener {
    /// Any connection that comes to `listener`, or is `waiting` and has sent nothing, may be it.
    pub(crate) fn new(
        listener: Listener,
        main: Caller,
        waiting: impl IntoIterator<Item = SilentConn>,
        tls: Option<Tls>,
        watch: Arc<Watch>,
    ) -> Self {
        let mut incoming = PreemptListener { listener, main, tls, watch, waiting: Vec::new() };
        waiting.into_iter().for_each(|silent| incoming.add(silent));
        incoming
    }

    fn add(&mut self, (socket, session, caller): SilentConn) {
        if self.waiting.len() >= ROOM {
            // A 7.2's is the first after its main channel, and that of a newer source among the last. Both come from
            // the source's host.
            let strange = |candidate: &Candidate| !candidate.caller.is_of_host(&self.main);
            let index = self.waiting.iter().position(strange).unwrap_or(1);
            self.drop_one(index, "too many others came that did not say what they are");
        }
        // One that cannot be set up is gone already, and says so when it is listened to.
        let _ = socket.set_nonblocking(true);
        self.waiting.push(Candidate { socket, session, caller, said: Vec::new() });
    }

    /// A connection has come.
    fn greet(&mut self, socket: Socket, caller: Caller) {
        match self.tls.as_ref().map(Accepting::new).transpose() {
            Ok(session) => self.add((socket, session, caller)),
            Err(why) => tracing::warn!("dropped a connection from {caller}: {why}"),
        }
    }

    /// The preempt channel, which has been known by what it said.
    fn watched(&self, socket: Socket, session: Option<Accepting>) -> io::Result<Arc<dyn Channel>> {
        socket.set_nonblocking(false)?;
        let address = Some(self.listener.address());
        let channel = Watched::new(Arc::new(socket), ChannelName::Preempt, &self.watch, Brings::Guest, address)?;
        Ok(match session {
            Some(session) => Arc::new(session.into_channel(Arc::new(channel))),
            None => Arc::new(channel),
        })
    }

    fn drop_one(&mut self, index: usize, why: impl fmt::Display) {
        let Candidate { caller, .. } = self.waiting.remove(index);
        tracing::warn!("dropped a connection from {caller}, which is no preempt channel: {why}");
    }

    /// Accepts a connection; false if the system could not.
    fn accept(&mut self) -> bool {
        for _ in 0..ROOM {
            match self.listener.try_accept() {
                Ok(Some((socket, caller))) => self.greet(socket, caller),
                Ok(None) => break,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED)) => {}
                Err(error) => {
                    tracing::warn!("cannot accept a connection at {}, and try again: {error}", self.listener.address());
                    return false;
                }
            }
        }
        true
    }
}

impl Candidate {
    /// Takes in what has come, without waiting for more. What it says counts as soon as the `blocks` are known.
    fn hear(&mut self, blocks: Option<&Arc<RamBlocks>>) -> Outcome {
        let mut bytes = [0; RECORD];
        loop {
            if let Some(blocks) = blocks
                && let Some(heard) = self.what(blocks)
            {
                return heard;
            }
            if self.said.len() == RECORD {
                return Outcome::More;
            }
            let room = &mut bytes[self.said.len()..];
            let heard = match &mut self.session {
                None => plain(&self.socket, room),
                Some(session) => session.hear(&self.socket, room).map_err(|error| error.to_string()),
            };
            match heard {
                Ok(tls::Received::Nothing) => return Outcome::More,
                Ok(tls::Received::Closed) => return Outcome::Drop(format!("it sent {} and was closed", self.first())),
                Ok(tls::Received::Bytes(count)) => self.said.extend_from_slice(&bytes[self.said.len()..][..count]),
                Err(why) => return Outcome::Drop(why),
            }
        }
    }

    /// What it is by what it has said; nothing so far.
    fn what(&self, blocks: &Arc<RamBlocks>) -> Option<Outcome> {
        if self.said.is_empty() {
            return None;
        }
        let decoder = PreemptDecoder::new(blocks.clone(), PageGeometry::X86);
        match Driver::new(self.said.as_slice(), decoder).next() {
            Ok(Some(RamRecord::Page(_) | RamRecord::Zero(_))) => Some(Outcome::Page),
            // Of a 7.2 that was not asked for anything.
            Ok(_) => Some(Outcome::Drop("it ended before the first page".into())),
            // So far.
            Err(error) if error.fault() == Some(Fault::Truncated) => None,
            Err(_) => Some(Outcome::Drop(format!("it sent {}", self.first()))),
        }
    }

    /// What it began with.
    fn first(&self) -> FirstBytes {
        FirstBytes::of(match &self.session {
            Some(session) if self.said.is_empty() => session.first(),
            _ => &self.said,
        })
    }

    /// What to wait for. Without a session a connection is not read before the blocks are known (`hear`): until
    /// then it can only leave.
    fn events(&self, hear: bool) -> PollFlags {
        match &self.session {
            Some(session) if session.wants_write() => PollFlags::IN | PollFlags::OUT,
            Some(_) if self.said.is_empty() => PollFlags::IN,
            _ if hear => PollFlags::IN,
            _ => PollFlags::RDHUP,
        }
    }
}

/// Reads what has come on a socket that does not block.
fn plain(socket: &Socket, room: &mut [u8]) -> Result<tls::Received, String> {
    loop {
        return match socket.receive(room) {
            Ok(0) => Ok(tls::Received::Closed),
            Ok(count) => Ok(tls::Received::Bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(tls::Received::Nothing),
            Err(error) => Err(error.to_string()),
        };
    }
}

/// A thread that finds the preempt channel and reads it.
pub(crate) struct Preempt {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// How the thread is controlled.
struct Control {
    /// Wakes it.
    news: OwnedFd,
    orders: Mutex<Orders>,
}

#[derive(Default)]
struct Orders {
    over: bool,
    /// Where pages go, once some are missing.
    memory: Option<(Arc<Shared>, Arc<RamBlocks>)>,
    /// The preempt channel, once it is known.
    channel: Option<Arc<dyn Channel>>,
}

impl Preempt {
    /// Takes connections in. They are not read before memory is [missing](Preempt::listen).
    pub(crate) fn start(incoming: PreemptListener) -> Result<Self, MigrationError> {
        let failed = |error: io::Error| MigrationError::guest("start a thread for the preempt channel")(error.into());
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        let control = Arc::new(Control { news, orders: Mutex::default() });
        let at = control.clone();
        let thread = thread::Builder::new().name("preempt".into()).spawn(move || at.run(incoming)).map_err(failed)?;
        Ok(Preempt { control, thread: Some(thread) })
    }

    /// Pages of `blocks` are missing in `memory`, and the connection that sends the first is the preempt channel.
    pub(super) fn listen(&self, memory: Arc<Shared>, blocks: Arc<RamBlocks>) {
        self.control.orders().memory = Some((memory, blocks));
        self.control.wake();
    }

    /// Ends the channel, or the wait for it. The thread is not waited for.
    pub(super) fn stop(&self) {
        let mut orders = self.control.orders();
        orders.over = true;
        orders.channel.iter().for_each(|channel| channel.close());
        drop(orders);
        self.control.wake();
    }
}

impl Drop for Preempt {
    /// When this returns, no page of it is placed any more, and no connection is taken.
    fn drop(&mut self) {
        self.stop();
        // It has reported what went wrong.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl fmt::Debug for Preempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Preempt").finish_non_exhaustive()
    }
}

impl Control {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock()
    }

    fn wake(&self) {
        // One that is full already says the same.
        let _ = rustix::io::write(&self.news, &1_u64.to_ne_bytes());
    }

    fn run(&self, incoming: PreemptListener) {
        let found = self.find(incoming);
        let memory = self.orders().memory.take();
        let Some((shared, blocks)) = memory else { return };
        let read = match found {
            Ok(Some(Found { channel, first })) => read(&*channel, &first, &shared, blocks),
            Ok(None) => Ok(()),
            Err(error) => Err(MigrationError::guest("wait for the preempt channel")(error.into())),
        };
        match read {
            Err(error @ MigrationError::Guest { .. }) => shared.fail(error),
            // The source learns of it by the main channel.
            Err(error) if !self.orders().over => shared.give_up_line(&error),
            _ => {}
        }
        shared.no_more_urgent();
    }

    /// Waits for the preempt channel. `None` when it is not waited for any more.
    fn find(&self, mut incoming: PreemptListener) -> Result<Option<Found>, Errno> {
        let (mut accepting, mut known) = (true, false);
        loop {
            let blocks = match &*self.orders() {
                Orders { over: true, .. } => return Ok(None),
                Orders { memory, .. } => memory.as_ref().map(|(_, blocks)| blocks.clone()),
            };
            let Ready { calling, mut speaking } = self.wait(&incoming, accepting, blocks.is_some())?;
            if blocks.is_some() && !std::mem::replace(&mut known, true) {
                // What was said before counts from now on.
                speaking.fill(true);
            }
            // From the back, so that the numbers stay true.
            for index in (0..speaking.len()).rev().filter(|index| speaking[*index]) {
                let candidate = &mut incoming.waiting[index];
                let heard = match &blocks {
                    None if candidate.session.is_none() => Outcome::Drop("it was closed before the guest came".into()),
                    blocks => candidate.hear(blocks.as_ref()),
                };
                match heard {
                    Outcome::More => {}
                    Outcome::Drop(why) => incoming.drop_one(index, why),
                    Outcome::Page => {
                        let Candidate { socket, session, said, caller } = incoming.waiting.swap_remove(index);
                        let channel = match incoming.watched(socket, session) {
                            Ok(channel) => channel,
                            Err(why) => {
                                tracing::warn!("dropped a connection from {caller}: {why}");
                                break;
                            }
                        };
                        let mut orders = self.orders();
                        orders.channel = Some(channel.clone());
                        return Ok((!orders.over).then_some(Found { channel, first: said }));
                    }
                }
            }
            accepting = !calling || incoming.accept();
        }
    }

    /// Waits until a connection does something. Candidates are heard when it is known what they may say, and before
    /// that they can only leave.
    fn wait(&self, incoming: &PreemptListener, accepting: bool, hear: bool) -> Result<Ready, Errno> {
        let mut entries = vec![PollFd::new(&self.news, PollFlags::IN)];
        let waiting = incoming.waiting.iter();
        entries.extend(waiting.map(|who| PollFd::from_borrowed_fd(who.socket.as_fd(), who.events(hear))));
        entries.extend(accepting.then(|| PollFd::from_borrowed_fd(incoming.listener.as_fd(), PollFlags::IN)));
        match poll(&mut entries, (!accepting).then_some(&PAUSE)) {
            // A signal: no connection has done anything.
            Err(Errno::INTR) => entries.iter_mut().for_each(PollFd::clear_revents),
            polled => drop(polled?),
        }
        let mut ready = entries.iter().map(|entry| !entry.revents().is_empty());
        if ready.next() == Some(true) {
            // The thread that woke this one wakes it again for the next order.
            let _ = rustix::io::read(&self.news, &mut [0; 8]);
        }
        let speaking = ready.by_ref().take(incoming.waiting.len()).collect();
        Ok(Ready { speaking, calling: !accepting || ready.next() == Some(true) })
    }
}

/// The preempt channel.
struct Found {
    channel: Arc<dyn Channel>,
    /// What was read from it.
    first: Vec<u8>,
}

/// Who has done something.
struct Ready {
    /// A connection is in the listener's queue, or may be.
    calling: bool,
    /// For each candidate, whether it has.
    speaking: Vec<bool>,
}

impl Shared {
    /// Reads the preempt channel of the connection.
    pub(super) fn read_urgent(self: &Arc<Self>, preempt: Preempt, blocks: Arc<RamBlocks>) {
        self.lock().urgent = true;
        preempt.listen(self.clone(), blocks);
        *self.preempt() = Some(preempt);
    }

    /// Nothing more comes on the preempt channel.
    pub(super) fn no_more_urgent(&self) {
        self.lock().urgent = false;
        self.changed.notify_all();
    }

    /// Lets go of the preempt channel: when this returns, no page of it is placed any more.
    pub(super) fn end_urgent(&self) {
        // A caller that waits for the thread may not hold the lock.
        let preempt = self.preempt().take();
        drop(preempt);
    }

    /// The same, but it is not waited for.
    pub(super) fn stop_urgent(&self) {
        self.preempt().iter().for_each(Preempt::stop);
    }

    /// The main channel has ended: pages may still be on their way on the preempt channel.
    ///
    /// # Errors
    /// [`MigrationError::Receive`] if some do not come.
    pub(super) fn wait_for_urgent(&self, offset: u64) -> Result<(), MigrationError> {
        let left = || self.remaining.load(Ordering::Relaxed);
        let mut state = self.lock();
        while self.urgent_blocks.get().is_some() && left() > 0 {
            let before = left();
            let waits = |state: &mut State| left() > 0 && state.urgent && !state.has_failed();
            let patience = self.waits.timeouts().handshake().unwrap_or(NO_END);
            let waited = self.changed.wait_while_for(&mut state, waits, patience);
            let given_up = !state.urgent || state.has_failed() || waited.timed_out() && left() == before;
            if left() > 0 && given_up {
                let why = format!("the source has ended, and {} bytes of guest memory have not come", left());
                return Err(MigrationError::Receive { offset, source: io::Error::other(why) });
            }
        }
        Ok(())
    }

    /// The preempt channel has failed: pages that were on it are lost, and the source learns by the main channel what
    /// to send again.
    pub(super) fn give_up_line(&self, error: &MigrationError) {
        let state = self.lock();
        if let Line::Up(channel) = &state.line {
            tracing::warn!("the preempt channel is lost: {error}");
            channel.close();
        }
    }

    fn preempt(&self) -> MutexGuard<'_, Option<Preempt>> {
        self.preempt.lock()
    }
}

/// Reads the channel to its end. `first` was read from it already.
fn read(channel: &dyn Channel, first: &[u8], shared: &Shared, blocks: Arc<RamBlocks>) -> Result<(), MigrationError> {
    let decoder = PreemptDecoder::new(blocks, PageGeometry::X86);
    let mut records = Driver::new(first.chain(Reading(channel)), decoder);
    let (mut assembly, mut content) = (Assembly::default(), [0; PAGE_SIZE as usize]);
    loop {
        let offset = records.decoder().offset();
        let failed = |source| MigrationError::Receive { offset, source };
        let record = records.next().map_err(|error| match error {
            DriveError::Io(source) => failed(source),
            DriveError::Stream(error) => error.map(LoadError::from).into(),
            other => failed(io::Error::other(other.to_string())),
        })?;
        match record {
            Some(RamRecord::Page(page)) => {
                records.payload().read_exact(&mut content).map_err(failed)?;
                shared.place(&page, Some(&content), &mut assembly, offset)?;
            }
            Some(RamRecord::Zero(page)) => shared.place(&page, None, &mut assembly, offset)?,
            // Its end in a word.
            Some(_) => {}
            None => return Ok(()),
        }
    }
}
