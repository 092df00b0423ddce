//! One migration as it arrives: connections, threads, answers.

use super::Files;
use crate::failure::{Failure, Stop};
use crate::progress::Progress;
use crate::ram::Keep;
use crate::socket::{Listener, Socket};
use crate::source::Source;
use crate::stream::{Inputs, Layouts, Observer, Settings, analyze};
use qevm_returnpath::Message;
use qevm_savevm::command::Command;
use qevm_wire::Writer;
use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked for new connections.
const POLL: Duration = Duration::from_millis(10);
/// How long a source may take to send a description behind the end of its stream, before it counts as having none.
const DESCRIPTION_PATIENCE: Duration = Duration::from_secs(2);
/// How long a source may take to close its connections after all has arrived.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
const MAIN_MAGIC: &[u8; 4] = b"QEVM";

/// What a migration is received with.
pub(super) struct Session<'f> {
    pub(super) listener: Listener,
    pub(super) files: &'f Files,
    pub(super) multifd_channels: Option<u8>,
    pub(super) switchover_ack: bool,
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
    ChannelEnded(Option<Failure>),
}

impl Session<'_> {
    /// Takes connections until the main channel is over and all others are closed.
    pub(super) fn run(self) -> Result<Taken, Stop> {
        let (sender, messages) = mpsc::channel();
        let mut taken = Taken::default();
        let mut sockets: Vec<Socket> = Vec::new();
        let mut open_channels = 0;
        let mut main_started = false;
        let mut main_ended: Option<Instant> = None;
        let mut last_event = Instant::now();
        loop {
            if main_ended.is_none()
                && let Some(socket) = self.listener.accept().map_err(|error| self.wire_failure(&error))?
            {
                last_event = Instant::now();
                sockets.push(socket.try_clone().map_err(|error| self.wire_failure(&error))?);
                let sender = sender.clone();
                thread::spawn(move || recognise(socket, &sender));
            }
            match messages.recv_timeout(POLL) {
                Ok(News::Opened { socket, first }) if first == MAIN_MAGIC && !main_started => {
                    main_started = true;
                    let file = self.files.create(&self.files.main).map_err(|error| self.wire_failure(&error))?;
                    let return_path = self.files.return_path();
                    let (ack, sender) = (self.switchover_ack, sender.clone());
                    let name = self.files.main.display().to_string();
                    thread::spawn(move || main_channel(socket, first, file, return_path, ack, &name, &sender));
                }
                Ok(News::Opened { first, .. }) if first.is_empty() => {}
                Ok(News::Opened { socket, first }) => {
                    let path = self.files.channel(taken.channels.len());
                    let file = self.files.create(&path).map_err(|error| self.wire_failure(&error))?;
                    let (name, sender) = (path.display().to_string(), sender.clone());
                    taken.channels.push(path);
                    open_channels += 1;
                    thread::spawn(move || save(socket, first, file, &name, &sender));
                }
                Ok(News::MainEnded { failure, answered }) => {
                    if answered {
                        taken.return_path = Some(self.files.return_path());
                    }
                    taken.failure = failure.or(taken.failure);
                    main_ended = Some(Instant::now());
                }
                Ok(News::ChannelEnded(failure)) => {
                    open_channels -= 1;
                    taken.failure = taken.failure.or(failure);
                }
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
            } else if let Some(patience) = self.patience
                && !main_started
                && last_event.elapsed() > patience
            {
                sockets.iter().for_each(Socket::close);
                let message = format!("no main channel came within {} s", patience.as_secs());
                return Err(Failure { kind: "truncated", ..self.failure(message) }.into());
            }
        }
        sockets.iter().for_each(Socket::close);
        let multifd = taken.channels.len();
        if let Some(expected) = self.multifd_channels
            && taken.failure.is_none()
            && multifd < usize::from(expected)
        {
            let message = format!("{multifd} channels came beside the main one, expected {expected}");
            taken.failure = Some(self.failure(message));
        }
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

/// Saves a channel as it comes.
fn save(mut socket: Socket, first: Vec<u8>, mut file: File, name: &str, sender: &mpsc::Sender<News>) {
    let saved = file.write_all(&first).and_then(|()| io::copy(&mut socket, &mut file)).map(drop);
    let failure = saved.err().map(|error| {
        let at = file.metadata().map_or(0, |metadata| metadata.len());
        Failure::io(name, at, &error)
    });
    let _ = sender.send(News::ChannelEnded(failure));
}

/// Decodes, saves and answers the main channel.
fn main_channel(
    socket: Socket,
    first: Vec<u8>,
    file: File,
    return_path: PathBuf,
    switchover_ack: bool,
    name: &str,
    sender: &mpsc::Sender<News>,
) {
    let at_end = Rc::new(Cell::new(false));
    let (failure, answered) = match socket.try_clone() {
        Ok(answers) => {
            let tee = Tee { first, socket, file, at_end: at_end.clone() };
            let mut inputs = Inputs::single(name, Source::stream(Box::new(tee)));
            let mut answering = Answering {
                socket: answers,
                path: return_path,
                record: None,
                failure: None,
                at_end,
                switchover_ack,
                progress: Progress::new("receiving", None),
            };
            let settings = Settings {
                keep: Keep::Nothing,
                reencode: false,
                complete: false,
                live: true,
                layouts: Layouts::default(),
            };
            let analysis = analyze(&mut inputs, &settings, &mut answering);
            answering.finish(&mut inputs, analysis.failure)
        }
        Err(error) => (Some(Failure::io(name, 0, &error)), false),
    };
    let _ = sender.send(News::MainEnded { failure, answered });
}

/// Gives what comes from the socket, and saves it.
struct Tee {
    first: Vec<u8>,
    socket: Socket,
    file: File,
    at_end: Rc<Cell<bool>>,
}

impl Read for Tee {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
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
    fn finish(mut self, inputs: &mut Inputs, failure: Option<Failure>) -> (Option<Failure>, bool) {
        let failure = failure.or(self.failure.take());
        self.send(&Message::Shut { status: failure.is_some().into() });
        if failure.is_none() {
            // The clone shares its timeouts with the socket that is read.
            let _ = self.socket.set_read_timeout(Some(CLOSE_PATIENCE));
            let _ = inputs.main.source.skip(u64::MAX);
        }
        (failure, self.record.is_some())
    }
}
