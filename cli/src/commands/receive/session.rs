//! One migration as it arrives: connections, threads, answers.

use super::Files;
use super::channel::Channel;
use super::ledger::Ledger;
use crate::bounds::Spool;
use crate::failure::{Failure, Stop};
use crate::progress::Progress;
use crate::ram::Keep;
use crate::socket::{Listener, Socket};
use crate::source::Source;
use crate::stream::{Inputs, Layouts, Observer, Settings, analyze};
use qevm_multifd::{Compression, is_page_channel};
use qevm_returnpath::Message;
use qevm_savevm::Event;
use qevm_savevm::command::Command;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::ram::RamRecord;
use qevm_wire::{PageGeometry, Writer};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked for new connections.
const POLL: Duration = Duration::from_millis(10);
/// How long a source may take to send a description behind the end of its stream, before it counts as having none.
const DESCRIPTION_PATIENCE: Duration = Duration::from_secs(2);
/// How long a source may take to close its connections after all has arrived.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long page channels may stay behind the main channel: to connect, and to deliver the rest at the end.
const CHANNEL_PATIENCE: Duration = Duration::from_secs(30);
const MAIN_MAGIC: &[u8; 4] = b"QEVM";

/// What a migration is received with.
pub(super) struct Session<'f> {
    pub(super) listener: Listener,
    pub(super) files: &'f Files,
    pub(super) multifd_channels: Option<u8>,
    pub(super) multifd_compression: Option<Compression>,
    pub(super) switchover_ack: bool,
    pub(super) spool: Spool,
    pub(super) patience: Option<Duration>,
}

/// What was received.
#[derive(Debug, Default)]
pub(super) struct Taken {
    pub(super) channels: Vec<PathBuf>,
    pub(super) return_path: Option<PathBuf>,
    pub(super) failure: Option<Failure>,
}

enum News {
    /// A connection has shown its first bytes (fewer than four if it ended before).
    Opened { socket: Socket, first: Vec<u8> },
    /// The main channel is over; the return path was used.
    MainEnded { failure: Option<Failure>, answered: bool },
    /// A further channel is over.
    ChannelEnded,
}

impl Session<'_> {
    /// Takes connections until the main channel is over and all others are closed.
    pub(super) fn run(self) -> Result<Taken, Stop> {
        let (sender, messages) = mpsc::channel();
        let ledger = Arc::new(Ledger::new(self.listener.address(), self.multifd_channels));
        let mut taken = Taken::default();
        let mut sockets: Vec<Socket> = Vec::new();
        let mut open_channels = 0;
        let mut main_started = false;
        let mut main_ended: Option<Instant> = None;
        let mut last_sign = (0, Instant::now());
        let mut stopped = false;
        loop {
            while main_ended.is_none() {
                let Some(socket) = self.listener.accept().map_err(|error| self.wire_failure(&error))? else {
                    ledger.nobody_waits();
                    break;
                };
                last_sign.1 = Instant::now();
                ledger.accepted();
                sockets.push(socket.try_clone().map_err(|error| self.wire_failure(&error))?);
                let sender = sender.clone();
                thread::spawn(move || recognise(socket, &sender));
            }
            match messages.recv_timeout(POLL) {
                Ok(News::Opened { socket, first }) if first == MAIN_MAGIC && !main_started => {
                    main_started = true;
                    let file = self.files.create(&self.files.main).map_err(|error| self.wire_failure(&error))?;
                    let main = MainChannel {
                        first,
                        file,
                        name: self.files.main.display().to_string(),
                        return_path: self.files.return_path(),
                        switchover_ack: self.switchover_ack,
                        spool: self.spool.clone(),
                        patience: self.patience.unwrap_or(CHANNEL_PATIENCE),
                        ledger: Arc::clone(&ledger),
                    };
                    let sender = sender.clone();
                    ledger.recognised();
                    thread::spawn(move || main.receive(socket, &sender));
                }
                Ok(News::Opened { first, .. }) if first.is_empty() => ledger.recognised(),
                Ok(News::Opened { socket, first }) => {
                    let path = self.files.channel(taken.channels.len());
                    let file = self.files.create(&path).map_err(|error| self.wire_failure(&error))?;
                    let (name, sender, ledger) = (path.display().to_string(), sender.clone(), Arc::clone(&ledger));
                    taken.channels.push(path);
                    open_channels += 1;
                    let compression = self.multifd_compression;
                    thread::spawn(move || {
                        let pages = is_page_channel(&first) == Some(true);
                        let channel = Channel::new(socket, first, file, name, &ledger);
                        if pages {
                            channel.follow(compression);
                        } else {
                            ledger.recognised();
                            channel.save();
                        }
                        let _ = sender.send(News::ChannelEnded);
                    });
                }
                Ok(News::MainEnded { failure, answered }) => {
                    if answered {
                        taken.return_path = Some(self.files.return_path());
                    }
                    taken.failure = failure;
                    main_ended = Some(Instant::now());
                }
                Ok(News::ChannelEnded) => open_channels -= 1,
                Err(_) => {}
            }
            if let Some(ended) = main_ended {
                if open_channels == 0 {
                    break;
                }
                if taken.failure.is_some() || ended.elapsed() > CLOSE_PATIENCE {
                    // The source has had its answer; what it did not send by now it will not send.
                    sockets.iter().for_each(Socket::close);
                }
                continue;
            }
            if main_started {
                ledger.check_missing(self.patience.unwrap_or(CHANNEL_PATIENCE));
            }
            if ledger.bytes() != last_sign.0 {
                last_sign = (ledger.bytes(), Instant::now());
            }
            if let Some(patience) = self.patience
                && last_sign.1.elapsed() > patience
            {
                let what = if main_started { "nothing came" } else { "no main channel came" };
                let failure = self.failure(format!("{what} within {} s (--timeout)", patience.as_secs()));
                ledger.fail(Failure { kind: "truncated", ..failure });
            }
            if let Some(failure) = ledger.failure()
                && !stopped
            {
                // Whoever reads stops; the main channel's reader then tells the source. Its connection must stay
                // open for that.
                stopped = true;
                sockets.iter().for_each(Socket::stop_reading);
                if !main_started {
                    sockets.iter().for_each(Socket::close);
                    return Err(failure.into());
                }
            }
        }
        sockets.iter().for_each(Socket::close);
        taken.failure = taken.failure.or_else(|| ledger.failure());
        Ok(taken)
    }

    fn failure(&self, message: String) -> Failure {
        Failure::mismatch(&self.listener.address(), 0, "", message)
    }

    fn wire_failure(&self, error: &io::Error) -> Failure {
        Failure::io(&self.listener.address(), 0, error)
    }
}

/// Waits for the first bytes of a connection, which tell what it is.
fn recognise(mut socket: Socket, sender: &mpsc::Sender<News>) {
    let mut first = Vec::new();
    // A connection that breaks here has carried nothing.
    let _ = (&mut socket).take(MAIN_MAGIC.len() as u64).read_to_end(&mut first);
    let _ = sender.send(News::Opened { socket, first });
}

/// What the main channel is received with.
struct MainChannel {
    first: Vec<u8>,
    file: File,
    /// The file's name, by which errors call the channel.
    name: String,
    return_path: PathBuf,
    switchover_ack: bool,
    spool: Spool,
    /// How long page channels may stay behind.
    patience: Duration,
    ledger: Arc<Ledger>,
}

impl MainChannel {
    /// Decodes, saves and answers it.
    fn receive(self, socket: Socket, sender: &mpsc::Sender<News>) {
        let at_end = Rc::new(Cell::new(false));
        let (failure, answered) = match socket.try_clone() {
            Ok(answers) => {
                let ledger = Arc::clone(&self.ledger);
                let tee = Tee { first: self.first, socket, file: self.file, at_end: at_end.clone(), ledger };
                let mut inputs = Inputs::single(&self.name, Source::stream(Box::new(tee)));
                let mut answering = Answering {
                    socket: answers,
                    path: self.return_path,
                    record: None,
                    failure: None,
                    at_end,
                    switchover_ack: self.switchover_ack,
                    progress: Progress::new("receiving", None),
                    ledger: self.ledger,
                    configured: false,
                };
                let settings = Settings {
                    keep: Keep::Nothing,
                    reencode: false,
                    complete: false,
                    live: true,
                    layouts: Layouts::default(),
                    spool: self.spool,
                    max_ram: u64::MAX,
                };
                let analysis = analyze(&mut inputs, &settings, &mut answering);
                answering.finish(&mut inputs, analysis.failure, self.patience)
            }
            Err(error) => (Some(Failure::io(&self.name, 0, &error)), false),
        };
        let _ = sender.send(News::MainEnded { failure, answered });
    }
}

/// Gives what comes from the socket, and saves it.
struct Tee {
    first: Vec<u8>,
    socket: Socket,
    file: File,
    at_end: Rc<Cell<bool>>,
    ledger: Arc<Ledger>,
}

impl Read for Tee {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ledger.failure().is_some() {
            return Ok(0);
        }
        if !self.first.is_empty() && buffer.len() >= self.first.len() {
            let first = std::mem::take(&mut self.first);
            buffer[..first.len()].copy_from_slice(&first);
            self.file.write_all(&first)?;
            return Ok(first.len());
        }
        if self.at_end.get() {
            self.socket.set_read_timeout(Some(DESCRIPTION_PATIENCE))?;
        }
        let read = match self.socket.read(buffer) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => 0,
            read => read?,
        };
        self.file.write_all(&buffer[..read])?;
        self.ledger.count(read);
        Ok(read)
    }
}

/// Answers the source as its commands come.
struct Answering {
    socket: Socket,
    path: PathBuf,
    /// The return path as it was sent; exists once the source opened it.
    record: Option<File>,
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
                match File::create(&self.path) {
                    Ok(file) => self.record = Some(file),
                    Err(error) => self.failure = Some(Failure::io(&self.path.display().to_string(), 0, &error)),
                }
                if self.switchover_ack {
                    self.send(&Message::SwitchoverAck);
                }
            }
            Command::Ping(value) => self.send(&Message::Pong { value: *value }),
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
            Event::Ram(RamRecord::MultifdFlush) => self.ledger.flush(),
            Event::Ram(RamRecord::EndOfSection) => self.ledger.eos(),
            _ => {}
        }
    }

    fn end_of_stream(&mut self) {
        self.at_end.set(true);
    }
}

impl Answering {
    fn send(&mut self, message: &Message) {
        let Some(record) = &mut self.record else { return };
        let mut writer = Writer::new();
        message.encode(&mut writer);
        let bytes = writer.as_bytes();
        if let Err(error) = self.socket.write_all(bytes).and_then(|()| record.write_all(bytes)) {
            self.failure.get_or_insert_with(|| Failure::io(&self.path.display().to_string(), 0, &error));
        }
    }

    /// Tells the source how it went and waits until it closes the connection.
    fn finish(mut self, inputs: &mut Inputs, failure: Option<Failure>, patience: Duration) -> (Option<Failure>, bool) {
        // What went wrong elsewhere has ended this channel, and so is the explanation.
        let failure = self.ledger.failure().or(failure).or(self.failure.take());
        let failure = failure.or_else(|| self.ledger.settle(patience));
        if let Some(failure) = &failure {
            self.ledger.fail(failure.clone());
        }
        self.send(&Message::Shut { status: failure.is_some().into() });
        if failure.is_none() {
            // The clone shares its timeouts with the socket that is read.
            let _ = self.socket.set_read_timeout(Some(CLOSE_PATIENCE));
            let _ = inputs.main.source.skip(u64::MAX);
        }
        (failure, self.record.is_some())
    }
}
