//! The thread that takes connections, tells who they are, and reads all but the main channel. It is the only one beside
//! the main channel's, and runs before the first connection is taken: from then on nothing needs a thread.

use super::channel::Channel;
use super::files::Files;
use super::gate::{Caller, Context, Gate, Known, REFUSAL_DELAY};
use super::ledger::{Ledger, Phase};
use crate::socket::{Listener, Peer, Socket};
use qevm_inspect::failure::Failure;
use qevm_migration::Tls;
use qevm_multifd::Compression;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked what has changed elsewhere.
const TICK: Duration = Duration::from_millis(20);
/// The same while what it waits for may come at any moment.
const MOMENT: Duration = Duration::from_millis(1);
/// How long no connection is taken after the system had no room for one.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that are taken before others are looked at.
const BURST: usize = 64;
/// How long a source may take to close its channels after all has arrived.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long page channels may take after the main channel: to connect, and to deliver the rest at the end.
pub(super) const CHANNEL_PATIENCE: Duration = Duration::from_secs(30);

/// What the main channel's reader waits for.
#[derive(Debug)]
pub(super) enum SessionEvent {
    /// The main channel, and what was read of it.
    Main(Arc<Socket>, Vec<u8>),
    /// None came in time, or none can come any more.
    Failed(Failure),
}

/// The connections of one migration, except for the main channel.
#[derive(Debug)]
pub(super) struct Connections {
    pub(super) listener: Option<Listener>,
    /// Who connects has to begin a TLS session.
    pub(super) tls: Option<Tls>,
    pub(super) gate: Gate,
    pub(super) files: Arc<Files>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) compression: Option<Compression>,
    pub(super) patience: Option<Duration>,
    pub(super) events: mpsc::Sender<SessionEvent>,
    pub(super) main: Option<(Arc<Socket>, Peer)>,
    pub(super) channels: Vec<Channel>,
    /// No connection is taken until then.
    pub(super) full_until: Option<Instant>,
    /// What ends the migration, and when.
    pub(super) failing: Option<(Instant, Failure)>,
}

impl Connections {
    /// Runs until the main channel's reader is done, or there will be none.
    pub(super) fn run(mut self) {
        let mut heard = (0, Instant::now());
        let mut over: Option<Instant> = None;
        let mut stopped = false;
        loop {
            let ready = self.wait();
            let phase = self.ledger.phase();
            let failure = self.ledger.failure();
            if phase == Phase::Arriving && failure.is_none() {
                self.take();
            } else {
                // Who comes now comes in vain, and should know.
                self.listener = None;
            }
            self.advance(&ready);
            if phase == Phase::Over {
                let over = *over.get_or_insert_with(Instant::now);
                if self.channels.is_empty() || failure.is_some() || over.elapsed() > CLOSE_PATIENCE {
                    return;
                }
                continue;
            }
            if let Some(failure) = failure {
                if !std::mem::replace(&mut stopped, true) {
                    match &self.main {
                        // Its reader stops, and tells the source. The connection must stay open for that.
                        Some((main, _)) => main.stop_reading(),
                        None => {
                            // This is not read if the main thread is gone.
                            let _ = self.events.send(SessionEvent::Failed(failure));
                            return;
                        }
                    }
                }
                continue;
            }
            if self.ledger.bytes() != heard.0 {
                heard = (self.ledger.bytes(), Instant::now());
            }
            self.check(phase, heard.1);
        }
    }

    /// Waits until something can be read, or a moment. Says which channels can.
    fn wait(&self) -> Vec<bool> {
        let taking = self.full_until.is_none_or(|until| until <= Instant::now());
        let mut sockets: Vec<PollFd<'_>> =
            self.channels.iter().map(|channel| PollFd::new(channel.socket(), self.interest(channel))).collect();
        sockets.extend(self.listener.iter().filter(|_| taking).map(|l| PollFd::new(l, PollFlags::IN)));
        sockets.extend(self.gate.sockets().map(|socket| PollFd::new(socket, PollFlags::IN)));
        // What a channel waits for happens on the main channel.
        let tick = if self.channels.iter().any(Channel::waits) { MOMENT } else { TICK };
        let moment = Timespec { tv_sec: 0, tv_nsec: tick.subsec_nanos().into() };
        if poll(&mut sockets, Some(&moment)).is_err() {
            // Interrupted, or out of memory: it is tried again.
            thread::sleep(TICK);
            return vec![false; self.channels.len()];
        }
        let reported = |socket: &PollFd<'_>| !(socket.revents() & !PollFlags::NVAL).is_empty();
        let more = |channel: &Channel| channel.waits() && self.can_read(channel);
        let ready: Vec<bool> = self.channels.iter().zip(&sockets).map(|(c, s)| more(c) || reported(s)).collect();
        // A channel that hangs up while it cannot be read yet would be reported for ever.
        if self.channels.iter().zip(&sockets).any(|(channel, socket)| reported(socket) && !self.can_read(channel)) {
            thread::sleep(MOMENT);
        }
        ready
    }

    /// What of a channel is to be reported: before the page size is known, only that it is gone.
    fn interest(&self, channel: &Channel) -> PollFlags {
        match (self.can_read(channel), &self.main) {
            (true, _) => PollFlags::IN,
            (false, None) => PollFlags::RDHUP,
            (false, Some(_)) => PollFlags::empty(),
        }
    }

    fn can_read(&self, channel: &Channel) -> bool {
        self.failing.is_none() && channel.can_follow(&self.ledger)
    }

    /// Takes new connections, and those in whom something was recognised.
    fn take(&mut self) {
        for _ in 0..BURST {
            if !self.gate.has_room() || !self.accept() {
                break;
            }
        }
        let main = self.main.as_ref().map(|(_, peer)| peer);
        let context = Context { main, preempt: self.ledger.preempt_context() };
        for caller in self.gate.recognise(&context) {
            if let Err(failure) = self.welcome(caller) {
                self.ledger.fail(failure);
            }
        }
    }

    /// Takes a connection; false if there is none.
    fn accept(&mut self) -> bool {
        let Some(listener) = self.listener.as_ref().filter(|_| self.full_until.is_none_or(|t| t <= Instant::now()))
        else {
            return false;
        };
        match listener.accept() {
            Ok(Some((socket, peer))) => {
                let socket = match &self.tls {
                    Some(tls) => socket.unseal(tls),
                    None => Ok(socket),
                };
                if let Ok(socket) = socket {
                    self.gate.push(socket, peer, self.main.is_some());
                }
                true
            }
            Ok(None) => false,
            Err(error) if is_full(&error) && self.gate.drop_oldest("the system has no room for more") => true,
            // A connection that broke before it was taken. Anything else will be seen again.
            Err(error) => {
                if is_full(&error) {
                    self.full_until = Some(Instant::now() + PAUSE);
                }
                false
            }
        }
    }

    /// Takes in a connection of the migration.
    fn welcome(&mut self, caller: Caller) -> Result<(), Failure> {
        let failed = |error| Failure::io(&self.files.main.path().display().to_string(), 0, &error);
        match &caller.known {
            Known::Main => {
                let Caller { socket, peer, first, .. } = caller;
                socket.set_nonblocking(false).map_err(failed)?;
                let socket = Arc::new(socket);
                self.main = Some((Arc::clone(&socket), peer));
                // The main thread waits for it.
                let _ = self.events.send(SessionEvent::Main(socket, first));
                return Ok(());
            }
            Known::PageChannel(init) => {
                if let Err(reason) = self.ledger.admit(init) {
                    self.gate.refuse(caller, reason);
                    return Ok(());
                }
            }
            Known::Preempt => {}
        }
        self.ledger.count(caller.first.len());
        let output = loop {
            match self.files.channel() {
                Err(error) if is_full(&error) && self.gate.drop_oldest("a channel needs its descriptor") => {}
                output => break output.map_err(failed)?,
            }
        };
        self.channels.push(Channel::new(caller, output)?);
        Ok(())
    }

    /// Takes what has arrived on the channels that are `ready`.
    fn advance(&mut self, ready: &[bool]) {
        let mut failed = None;
        let (ledger, main, failing) = (&self.ledger, &self.main, self.failing.is_some());
        let (files, compression) = (&self.files, self.compression);
        let mut number = 0;
        self.channels.retain_mut(|channel| {
            number += 1;
            if !ready.get(number - 1).is_some_and(|ready| *ready) {
                return true;
            }
            if !channel.can_follow(ledger) {
                // It leaves before there is a migration, as one of a source that gave up.
                if let (None, Some(gone)) = (main, channel.number) {
                    ledger.forget(gone);
                    files.forget(channel.output());
                    return false;
                }
                return true;
            }
            if failing {
                return true;
            }
            channel.advance(compression, ledger).unwrap_or_else(|failure| {
                failed.get_or_insert(failure);
                ledger.phase() == Phase::Arriving
            })
        });
        if let Some(failure) = failed.filter(|_| self.ledger.phase() == Phase::Arriving) {
            self.failing.get_or_insert((Instant::now() + REFUSAL_DELAY, failure));
        }
    }

    /// Ends what takes too long.
    fn check(&mut self, phase: Phase, heard: Instant) {
        if let Some((when, failure)) = &self.failing
            && *when <= Instant::now()
        {
            self.ledger.fail(failure.clone());
        }
        if phase != Phase::Arriving {
            return;
        }
        let awaited = self.ledger.awaited();
        // Without a limit of the user's, there is one for what the main channel waits for: it was sent before.
        let patience = self.patience.or(awaited.as_ref().map(|_| CHANNEL_PATIENCE));
        let silent = patience.filter(|patience| heard.elapsed() > *patience && self.ledger.awaits_main());
        if self.main.is_some() {
            self.ledger.check_missing(self.patience.unwrap_or(CHANNEL_PATIENCE), silent.is_some());
        }
        if let Some(patience) = silent {
            let what = if self.main.is_some() { "nothing came" } else { "no main channel came" };
            let option = if self.patience.is_some() { " (--timeout)" } else { "" };
            let reason = awaited.map(|awaited| format!(": {awaited}"));
            let instead = || self.gate.summary().map(|came| format!("; what came instead: {came}"));
            let reason = reason.or_else(instead).unwrap_or_default();
            let message = format!("{what} within {} s{option}{reason}", patience.as_secs());
            let failure = Failure::mismatch(self.ledger.address(), 0, "", message);
            self.ledger.fail(Failure { kind: "truncated", ..failure });
        }
    }
}

/// The system, or the process, has no room for another descriptor.
fn is_full(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}
