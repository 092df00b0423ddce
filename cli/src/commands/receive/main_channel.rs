//! The main channel: saved, decoded on the fly, because the source expects answers, and answered.

use super::connections::CHANNEL_PATIENCE;
use super::files::Files;
use super::ledger::Ledger;
use crate::progress::Progress;
use crate::socket::Socket;
use qevm_inspect::bounds::Spool;
use qevm_inspect::failure::Failure;
use qevm_inspect::ram::Keep;
use qevm_inspect::source::Source;
use qevm_inspect::stream::{Inputs, Layouts, Observer, Settings, analyze};
use qevm_returnpath::Message;
use qevm_savevm::Event;
use qevm_savevm::command::Command;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::ram::RamRecord;
use qevm_wire::PageGeometry;
use std::cell::Cell;
use std::fmt;
use std::io::{self, Read, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a source may take to send a description after the end of its stream, before it counts as having none.
const DESCRIPTION_PATIENCE: Duration = Duration::from_secs(2);
/// How long a source may take to close the connection after it has heard that all has arrived.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a reset may take that answers what was sent to a closed connection.
const RESET_PATIENCE: Duration = Duration::from_millis(200);
/// How long the source may take to read its answers.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// What the source was told at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handover {
    /// SHUT 0: the guest is here, and the source has given it up.
    Confirmed,
    /// SHUT 0, but the source reset the connection and may not have heard it.
    Doubtful,
    /// SHUT 1, or nothing: the guest is not here.
    Refused,
    /// Nothing, for the source opened no return path: it does not know whether its guest has arrived, and may have
    /// given it up in either case.
    Unasked,
}

impl Handover {
    /// The word in `--json`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Handover::Confirmed => "confirmed",
            Handover::Doubtful => "doubtful",
            Handover::Refused => "refused",
            Handover::Unasked => "unasked",
        }
    }
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Handover::Confirmed => "the source has been told that its guest has arrived, and has given it up",
            Handover::Doubtful => {
                "the source was told that its guest has arrived, but may not have heard it: see whether it runs there"
            }
            Handover::Refused => "the guest has not arrived: it is still the source's",
            Handover::Unasked => {
                "the source was told nothing, for it opened no return path: whether it has given up its guest shows there"
            }
        })
    }
}

/// How the main channel ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) failure: Option<Failure>,
    pub(super) handover: Handover,
    /// The return path was used.
    pub(super) answered: bool,
}

/// What the main channel is received with.
#[derive(Debug)]
pub(super) struct MainChannel {
    pub(super) socket: Arc<Socket>,
    /// What was read to recognise it.
    pub(super) first: Vec<u8>,
    pub(super) files: Arc<Files>,
    pub(super) switchover_ack: bool,
    pub(super) spool: Spool,
    /// How long the page channels may take after the main channel.
    pub(super) patience: Option<Duration>,
    pub(super) ledger: Arc<Ledger>,
}

impl MainChannel {
    /// Decodes, saves and answers it.
    pub(super) fn receive(self) -> Ended {
        let MainChannel { socket, first, files, switchover_ack, spool, patience, ledger } = self;
        let at_end = Rc::new(Cell::new(false));
        let tee = Tee {
            first,
            socket: Arc::clone(&socket),
            files: Arc::clone(&files),
            at_end: at_end.clone(),
            ledger: Arc::clone(&ledger),
        };
        let name = files.main.path().display().to_string();
        let mut inputs = Inputs::single(&name, Source::stream(Box::new(tee)));
        let mut answering = Answering {
            failure: socket.set_write_timeout(Some(ANSWER_PATIENCE)).err().map(|e| Failure::io(&name, 0, &e)),
            socket,
            files,
            answered: false,
            at_end,
            switchover_ack,
            progress: Progress::new("receiving", None),
            ledger,
            configured: false,
        };
        let settings = Settings {
            keep: Keep::Nothing,
            reencode: false,
            complete: false,
            strict: false,
            live: true,
            layouts: Layouts::default(),
            spool,
            max_ram: u64::MAX,
        };
        let analysis = analyze(&mut inputs, &settings, &mut answering);
        answering.finish(analysis.failure, patience.unwrap_or(CHANNEL_PATIENCE))
    }
}

/// Gives what comes from the socket, and saves it.
struct Tee {
    first: Vec<u8>,
    socket: Arc<Socket>,
    files: Arc<Files>,
    at_end: Rc<Cell<bool>>,
    ledger: Arc<Ledger>,
}

impl Read for Tee {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ledger.failure().is_some() {
            return Ok(0);
        }
        let read = match self.first.is_empty() {
            false => {
                let count = self.first.len().min(buffer.len());
                buffer[..count].copy_from_slice(&self.first[..count]);
                self.first.drain(..count);
                count
            }
            true => {
                if self.at_end.get() {
                    self.socket.set_read_timeout(Some(DESCRIPTION_PATIENCE))?;
                }
                match (&*self.socket).read(buffer) {
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => 0,
                    read => read?,
                }
            }
        };
        self.files.main.file().write_all(&buffer[..read])?;
        self.ledger.count(read);
        Ok(read)
    }
}

/// Answers the source as its commands come.
struct Answering {
    socket: Arc<Socket>,
    files: Arc<Files>,
    /// The source has opened the return path.
    answered: bool,
    failure: Option<Failure>,
    at_end: Rc<Cell<bool>>,
    switchover_ack: bool,
    progress: Progress,
    ledger: Arc<Ledger>,
    /// The page size is known.
    configured: bool,
}

impl Observer for Answering {
    fn position(&mut self, offset: u64) {
        self.progress.at(offset);
    }

    fn command(&mut self, command: &Command, _offset: u64) {
        match command {
            Command::OpenReturnPath => {
                self.answered = true;
                if self.switchover_ack {
                    self.answer(&Message::SwitchoverAck);
                }
            }
            Command::Ping(value) => self.answer(&Message::Pong { value: *value }),
            Command::PostcopyAdvise(_) => self.ledger.postcopy_advised(),
            // What follows goes over the main channel and the second one of postcopy.
            Command::PostcopyListen => self.ledger.end_of_memory(),
            _ => {}
        }
    }

    fn configuration(&mut self, page_size: u64) {
        self.ledger.configured(PageGeometry::from_size(page_size));
    }

    fn section(&mut self, _kind: SectionKind, _header: &SectionHeader, _offset: u64) {
        if !std::mem::replace(&mut self.configured, true) {
            self.ledger.configured(None);
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Ram(RamRecord::Block(block)) => self.ledger.block(block.clone()),
            Event::Ram(RamRecord::Page(_) | RamRecord::Xbzrle { .. } | RamRecord::Compressed { .. }) => {
                self.ledger.main_page();
            }
            Event::Ram(RamRecord::MultifdFlush) => {
                self.ledger.flush();
                self.ledger.wait();
            }
            Event::Ram(RamRecord::EndOfSection) => {
                self.ledger.eos();
                self.ledger.wait();
            }
            _ => {}
        }
    }

    fn end_of_stream(&mut self) {
        self.ledger.end_of_memory();
        self.at_end.set(true);
        self.ledger.main_ended();
    }
}

impl Answering {
    fn answer(&mut self, message: &Message) {
        if let Err(failure) = self.send(message) {
            self.failure.get_or_insert(failure);
        }
    }

    /// Sends a message on the return path, if there is one.
    fn send(&self, message: &Message) -> Result<(), Failure> {
        if !self.answered {
            return Ok(());
        }
        let bytes = message.to_bytes();
        let sent = self.files.return_path.file().write_all(&bytes).and_then(|()| (&*self.socket).write_all(&bytes));
        sent.map_err(|error| Failure::io(&self.files.return_path.path().display().to_string(), 0, &error))
    }

    /// Tells the source how it went and waits until it closes the connection.
    fn finish(mut self, failure: Option<Failure>, patience: Duration) -> Ended {
        // What went wrong elsewhere has ended this channel, and so is the explanation.
        let failure = self.ledger.failure().or(failure).or(self.failure.take());
        let failure = failure.or_else(|| self.ledger.settle(patience));
        let failure = match failure {
            Some(failure) => {
                self.ledger.fail(failure.clone());
                // That the migration failed is the better explanation than that the client has gone.
                let _ = self.send(&Message::Shut { status: 1 });
                Some(self.ledger.explained(failure))
            }
            None => self.hand_over().err(),
        };
        let handover = match (&failure, self.answered) {
            (Some(_), _) => Handover::Refused,
            (None, false) => Handover::Unasked,
            (None, true) if self.is_closed_in_order() => Handover::Confirmed,
            (None, true) => Handover::Doubtful,
        };
        self.socket.say_end();
        self.socket.close();
        self.ledger.over();
        Ended { failure, handover, answered: self.answered }
    }

    /// Says SHUT 0. From then on the guest is nowhere else, and so it must be on the disk, under its name, before.
    fn hand_over(&self) -> Result<(), Failure> {
        if self.answered && self.socket.is_closed() {
            let name = self.files.main.path().display().to_string();
            let message = "the source closed the connection before it was told that its guest has arrived";
            let _ = self.send(&Message::Shut { status: 1 });
            return Err(Failure::mismatch(&name, self.ledger.bytes(), "return path", message));
        }
        let published = self.files.publish(self.answered);
        if let Err(failure) = published {
            // As above.
            let _ = self.send(&Message::Shut { status: 1 });
            return Err(failure);
        }
        self.send(&Message::Shut { status: 0 }).map_err(|failure| {
            self.files.withdraw(self.answered);
            let message =
                format!("the source went away before it was told that its guest has arrived: {}", failure.message);
            Failure { message, ..failure }
        })
    }

    /// Waits until the source has closed the connection, which shows that it has heard the answer; false if it has
    /// reset it, and may not have.
    fn is_closed_in_order(&self) -> bool {
        let deadline = Instant::now() + CLOSE_PATIENCE;
        let mut rest = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.socket.set_read_timeout(Some(left)).is_err() {
                return true;
            }
            match (&*self.socket).read(&mut rest) {
                // It has closed it before it could read the answer if that makes it reset the connection.
                Ok(0) => return !self.socket.is_reset_within(RESET_PATIENCE.min(left)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            }
        }
    }
}
