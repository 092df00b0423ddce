//! The source's ear: reads the return path beside the sending thread, and keeps the destination's verdict.

use super::{Channel, MigrationError, channel::Target, handover};
use qevm_returnpath::{
    Decoder, Event, Message, SessionError, SwitchoverError,
    session::{Action, SourceSession},
    switchover::SwitchoverAckFlow,
};
use qevm_savevm::command::Command;
use qevm_wire::{Blame, Decode, Fault, Located, Step};
use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Why a message on the return path is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReturnPathError {
    /// A message could not be read.
    #[error(transparent)]
    Message(#[from] qevm_returnpath::ErrorKind),
    /// A message that nobody asked for, or that has no place at this time.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Blame for ReturnPathError {
    fn fault(&self) -> Fault {
        match self {
            ReturnPathError::Message(kind) => kind.fault(),
            ReturnPathError::Session(kind) => kind.fault(),
        }
    }
}

/// Bytes that a destination may send behind its verdict, which are not looked at.
const MOST_BEHIND_VERDICT: usize = 64 << 10;

/// What the return path has said so far.
#[derive(Debug)]
pub(crate) struct ReturnPath {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Debug)]
struct Heard {
    /// What may come, and what is missing.
    session: SourceSession,
    verdict: Option<Result<(), MigrationError>>,
    failed: bool,
    /// Nothing more will be heard: how the destination closed.
    ended: Option<io::Result<()>>,
    /// The destination waits for a confirmation before it runs the guest.
    agreed: bool,
    /// An ack of the switchover may come though nobody waits for it: the capability may be on there.
    stray_ack: bool,
}

impl ReturnPath {
    /// `flow` is how acks of the switchover are counted; `None` without `switchover-ack`. `asked_for` is false without
    /// `return-path`: a return path that is opened all the same must not fail a migration that would succeed without.
    pub(crate) fn new(flow: Option<SwitchoverAckFlow>, asked_for: bool) -> Self {
        let heard = Heard {
            session: SourceSession::new(flow),
            verdict: None,
            failed: false,
            ended: None,
            agreed: false,
            stray_ack: !asked_for,
        };
        ReturnPath { heard: Mutex::new(heard), changed: Condvar::new() }
    }

    /// This PING goes out.
    pub(crate) fn ping(&self, value: u32) -> Result<Command, MigrationError> {
        let pinged = self.lock().session.ping(value);
        match pinged {
            Ok(()) => Ok(Command::Ping(value)),
            Err(_) => Err(self.early_verdict()),
        }
    }

    /// Whether the switchover may happen: the destination listens, and its devices agree. Otherwise, after `patience`, what is missing.
    pub(crate) fn unready(&self, patience: Duration) -> Option<String> {
        let ready = |heard: &Heard| heard.session.gate().is_open() && heard.session.is_answered();
        let heard = self.lock();
        let (heard, _) = self
            .changed
            .wait_timeout_while(heard, patience, |heard| !ready(heard) && heard.ended.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        (!ready(&heard)).then(|| match heard.session.gate().waiting() {
            Some(acks) => format!("the destination has not agreed to the switchover: {acks}"),
            None => format!("the destination does not answer: {}", heard.session.waiting()),
        })
    }

    /// Waits until every PING was answered.
    pub(crate) fn answers(&self) -> Result<(), MigrationError> {
        let heard = self.lock();
        let unanswered = |heard: &mut Heard| !heard.session.is_answered() && heard.ended.is_none();
        let mut heard = self.changed.wait_while(heard, unanswered).unwrap_or_else(PoisonError::into_inner);
        match heard.session.is_answered() {
            true => Ok(()),
            false => heard.verdict.take().unwrap_or(Err(MigrationError::NoVerdict)),
        }
    }

    /// Reads messages until the peer closes. A failure closes the channel, so that the sending thread does not stay
    /// blocked in a write that nobody reads.
    pub(crate) fn listen(&self, channel: &dyn Channel) {
        let result = self.messages(channel);
        let failed = result.is_err();
        let mut heard = self.lock();
        (heard.failed, heard.verdict) = (failed, Some(result));
        if failed {
            heard.ended = Some(Ok(()));
        }
        drop(heard);
        self.changed.notify_all();
        if failed {
            channel.close();
        } else {
            let ended = drain(channel);
            self.lock().ended = Some(ended);
            self.changed.notify_all();
        }
    }

    /// The failure that the destination or the return path reported, if there is one. It is given once.
    pub(crate) fn failure(&self) -> Result<(), MigrationError> {
        let mut heard = self.lock();
        if heard.failed { heard.verdict.take().unwrap_or(Err(MigrationError::NoVerdict)) } else { Ok(()) }
    }

    /// Whether the destination or the return path has reported a failure.
    pub(crate) fn has_failed(&self) -> bool {
        self.lock().failed
    }

    /// A good verdict is expected from here on.
    pub(crate) fn everything_is_sent(&self) -> Result<(), MigrationError> {
        let noted = self.lock().session.everything_sent();
        noted.map_err(|_| self.early_verdict())
    }

    /// The verdict of a destination that has given one before it had everything, which cannot be a good one.
    fn early_verdict(&self) -> MigrationError {
        self.verdict().err().unwrap_or(MigrationError::NoVerdict)
    }

    /// Waits for the verdict.
    pub(crate) fn verdict(&self) -> Result<(), MigrationError> {
        let mut heard = self.lock();
        loop {
            if let Some(verdict) = heard.verdict.take() {
                return verdict;
            }
            heard = self.changed.wait(heard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the destination waits for a confirmation before it runs the guest.
    pub(crate) fn agreed(&self) -> bool {
        self.lock().agreed
    }

    /// Waits, behind the verdict, until the destination has closed, up to `patience`; says how it did.
    pub(crate) fn closed(&self, patience: Duration) -> Option<io::Result<()>> {
        let heard = self.lock();
        let (mut heard, _) = self
            .changed
            .wait_timeout_while(heard, patience, |heard| heard.ended.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        heard.ended.take()
    }

    /// Waits for a failure that explains why the channel broke; gives up after `patience`.
    pub(crate) fn explanation(&self, patience: Duration) -> Option<MigrationError> {
        let heard = self.lock();
        let (mut heard, _) = self
            .changed
            .wait_timeout_while(heard, patience, |heard| heard.ended.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match heard.verdict.take() {
            Some(Err(error @ (MigrationError::PeerFailed { .. } | MigrationError::ReturnPathMessage(_)))) => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Reads up to SHUT and gives its verdict.
    fn messages(&self, channel: &dyn Channel) -> Result<(), MigrationError> {
        let mut decoder = Decoder::default();
        let mut input = Vec::new();
        loop {
            let offset = decoder.offset();
            match decoder.next(&input).map_err(|error| error.map(ReturnPathError::from))? {
                Step::Event { consumed, event } => {
                    input.drain(..consumed);
                    if let Event::Message(message) = event
                        && let Some(verdict) = self.message(message).map_err(|kind| Located::new(kind, offset))?
                    {
                        return verdict;
                    }
                }
                Step::NeedMore { at_least } => {
                    let have = input.len();
                    input.resize(at_least.max(have + 1), 0);
                    match read(channel, &mut input[have..])? {
                        0 => return Err(MigrationError::NoVerdict),
                        count => input.truncate(have + count),
                    }
                }
                // Neither can be: SHUT ends the loop, and bitmaps are refused.
                Step::Payload { .. } | Step::End => return Err(MigrationError::NoVerdict),
            }
        }
    }

    /// What a message says, which is the verdict if it is the last one.
    fn message(&self, message: Message) -> Result<Option<Result<(), MigrationError>>, ReturnPathError> {
        let mut heard = self.lock();
        let agrees = message == Message::Pong { value: handover::AGREED };
        let action = heard.session.message(&if agrees { Message::Pong { value: handover::ANNOUNCE } } else { message });
        let verdict = match action {
            Ok(Action::Complete) => Some(Ok(())),
            Ok(Action::Failed { status }) => Some(Err(MigrationError::PeerFailed { status })),
            Err(SessionError::Switchover(SwitchoverError::Off)) if heard.stray_ack => {
                heard.stray_ack = false;
                None
            }
            Err(error) => return Err(error.into()),
            Ok(_) => None,
        };
        heard.agreed |= agrees;
        drop(heard);
        self.changed.notify_all();
        Ok(verdict)
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(channel: &dyn Channel, bytes: &mut [u8]) -> Result<usize, MigrationError> {
    loop {
        match channel.read(&mut [Target::bytes(bytes)]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(MigrationError::ReturnPath(error)),
            Ok(count) => return Ok(count),
        }
    }
}

/// Reads what still comes, so that closing the socket does not destroy what the peer has yet to read.
fn drain(channel: &dyn Channel) -> io::Result<()> {
    let (mut rest, mut total) = ([0; 512], 0);
    while total <= MOST_BEHIND_VERDICT {
        match channel.read(&mut [Target::bytes(&mut rest)]) {
            Ok(0) => return Ok(()),
            Ok(count) => total += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    // It would go on for ever.
    channel.close();
    Ok(())
}
