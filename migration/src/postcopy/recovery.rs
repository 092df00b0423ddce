//! A postcopy whose connection is lost and replaced by another: nothing that has come is lost, and nothing comes twice.

use super::missing::{Line, NextLine, RequestChannel, Shared};
use super::preempt::{Preempt, PreemptListener};
use crate::channel::{ReadSlice, read_at_least};
use crate::patience::NO_END;
use crate::tls::{Accepting, LOOK};
use crate::watch::{Brings, Watch, Watched};
use crate::{Address, Channel, ChannelName, Listener, MigrationError, Refused, Socket, Status, Tls};
use qevm_returnpath::{Encoder, Message};
use qevm_wire::Writer;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How often who waits for a source looks whether it is still to wait.
const POLL: Duration = Duration::from_millis(20);
/// Type of a section that is a command: that is what a source begins with that goes on.
const COMMAND: u8 = 8;

/// Pauses a postcopy that is under way, and lets it go on over another connection (`migrate-pause`, `migrate-recover`).
#[derive(Debug, Clone)]
pub struct Recovery {
    pub(super) shared: Arc<Shared>,
}

impl Recovery {
    /// Whether the connection is lost, and another is waited for.
    pub fn is_paused(&self) -> bool {
        matches!(self.shared.lock().line, Line::Lost)
    }

    /// Gives the connection up: the guest runs on, and who touches a page that has not come waits for the recovery.
    ///
    /// # Errors
    /// [`Refused::NotInPostcopy`] if there is none, or not any more.
    pub fn pause(&self) -> Result<(), Refused> {
        let state = self.shared.lock();
        match &state.line {
            Line::Up(channel) => channel.close(),
            Line::Lost | Line::Over => return Err(Refused::NotInPostcopy),
        }
        drop(state);
        self.shared.stop_urgent();
        Ok(())
    }

    /// Goes on over the connection of the next source that comes, secured as `tls` says, in a thread of its own. Who
    /// was waited for before is not any more.
    ///
    /// # Errors
    /// [`MigrationError::Refused`] unless it is [paused](Recovery::is_paused); [`MigrationError::Guest`] if no thread
    /// can be started.
    pub fn accept(&self, listener: Listener, tls: Option<Tls>) -> Result<(), MigrationError> {
        let turn = {
            let mut state = self.shared.lock();
            if !matches!(state.line, Line::Lost) {
                return Err(Refused::PostcopyNotPaused.into());
            }
            state.turn += 1;
            state.turn
        };
        listener.set_nonblocking().map_err(|error| listener.failed(error))?;
        let shared = self.shared.clone();
        let accepting = move || {
            while shared.waits(turn) {
                match listener.try_accept() {
                    Ok(Some((socket, caller))) => {
                        match known(socket, &shared.waits, listener.address(), tls.as_ref()) {
                            Ok((channel, first)) => {
                                let incoming = PreemptListener::new(listener, caller, [], tls, shared.waits.clone());
                                return shared.reconnect(turn, channel, first, incoming);
                            }
                            Err(why) => tracing::warn!("dropped a connection from {caller}: {why}"),
                        }
                    }
                    Ok(None) => thread::sleep(POLL),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return tracing::error!("{}", listener.failed(error)),
                }
            }
        };
        let accepting = thread::Builder::new().name("recovery".into()).spawn(accepting);
        accepting.map(drop).map_err(|error| MigrationError::guest("start a thread for the recovery")(error.into()))
    }
}

/// A connection of a source that goes on, and what it has said.
fn known(
    socket: Socket,
    waits: &Arc<Watch>,
    address: &Address,
    tls: Option<&Tls>,
) -> io::Result<(Arc<dyn Channel>, Vec<u8>)> {
    socket.set_nonblocking(false)?;
    socket.prepare()?;
    let socket = Arc::new(socket);
    let channel = Arc::new(Watched::new(socket.clone(), ChannelName::Main, waits, Brings::Guest, Some(address))?);
    // It may change meanwhile.
    let patience = || waits.timeouts().handshake().unwrap_or(NO_END);
    let (first, channel): (Vec<u8>, Arc<dyn Channel>) = match tls {
        Some(tls) => {
            let session = Accepting::new(tls).map_err(io::Error::other)?;
            let (first, channel) = session.first_byte(&socket, channel, &patience)?;
            (vec![first], Arc::new(channel))
        }
        None => {
            let mut first = vec![0; 1];
            channel.limit_silence(Some(LOOK))?;
            let since = Instant::now();
            let count = loop {
                match read_at_least(&*channel, &mut [ReadSlice::bytes(&mut first)], 1) {
                    Err(error) if error.kind() == io::ErrorKind::TimedOut && since.elapsed() < patience() => {}
                    read => break read?,
                }
            };
            channel.limit_silence(None)?;
            first.truncate(count);
            (first, channel)
        }
    };
    match first[..] {
        [COMMAND] => Ok((channel, first)),
        [] => Err(io::Error::other("it was closed at once")),
        [other, ..] => Err(io::Error::other(format!("it began with byte {other:#04x}, not with a command (0x08)"))),
    }
}

impl Shared {
    /// Whether this turn of waiting for a source is still the last.
    fn waits(&self, turn: u64) -> bool {
        let state = self.lock();
        state.turn == turn && matches!(state.line, Line::Lost)
    }

    fn reconnect(&self, turn: u64, channel: Arc<dyn Channel>, first: Vec<u8>, incoming: PreemptListener) {
        let preempt = match self.urgent_blocks.get().map(|_| Preempt::start(incoming)).transpose() {
            Ok(preempt) => preempt,
            Err(error) => {
                tracing::error!("cannot go on with the source that has come: {error}");
                return channel.close();
            }
        };
        let mut state = self.lock();
        if state.turn == turn && matches!(state.line, Line::Lost) {
            state.line = Line::Up(channel.clone());
            state.next = Some(NextLine { channel, first, preempt });
            drop(state);
            self.changed.notify_all();
        } else {
            channel.close();
        }
    }

    /// The connection is lost: waits for the next. `None` if something has failed here, after which none is of use.
    pub(super) fn next_line(self: &Arc<Self>, error: &MigrationError) -> Option<(Arc<dyn Channel>, Vec<u8>)> {
        *self.request_channel() = RequestChannel { channel: None, asks: false };
        // The source asks what has come, and that changes no more then.
        self.end_urgent();
        let mut state = self.lock();
        if state.has_failed() {
            return None;
        }
        tracing::warn!("postcopy is paused until 'migrate-recover': {error}");
        if let Line::Up(channel) = std::mem::replace(&mut state.line, Line::Lost) {
            channel.close();
        }
        state.news.push_back(Status::PostcopyPaused);
        self.changed.notify_all();
        loop {
            if state.has_failed() {
                return None;
            }
            if let Some(NextLine { channel, first, preempt }) = state.next.take() {
                state.news.push_back(Status::PostcopyRecover);
                self.changed.notify_all();
                drop(state);
                if let Some((preempt, blocks)) = preempt.zip(self.urgent_blocks.get()) {
                    self.read_urgent(preempt, blocks.clone());
                }
                self.request_channel().channel = Some(channel.clone());
                return Some((channel, first));
            }
            self.changed.wait(&mut state);
        }
    }

    /// The source goes on.
    pub(super) fn resumed(&self) {
        let mut request_channel = self.request_channel();
        let asked_again = self.book().reconnected();
        for message in [Message::ResumeAck].iter().chain(&asked_again) {
            request_channel.put(&message.to_bytes());
        }
        request_channel.asks = true;
        drop(request_channel);
        self.lock().news.push_back(Status::PostcopyActive);
        self.changed.notify_all();
    }

    /// Tells the source which pages of a block are here.
    pub(super) fn send_bitmap(&self, index: usize) -> Result<(), MigrationError> {
        let doing = "tell the source which pages have come";
        let Some((name, bitmap)) = self.bitmap(index) else {
            return Err(MigrationError::guest(doing)(format!("RAM block {index} was not listed").into()));
        };
        let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
        let announced = encoder.message(&Message::RecvBitmap { block: name, len: bitmap.len() as u64 }, &mut writer);
        writer.bytes(&bitmap);
        let ended = announced.and_then(|()| encoder.bitmap_end(&mut writer));
        ended.map_err(|error| MigrationError::guest(doing)(error.into()))?;
        self.request_channel().put(writer.as_bytes());
        Ok(())
    }
}
