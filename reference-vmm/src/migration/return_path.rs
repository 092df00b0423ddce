//! The source's ear: reads the return path beside the sending thread, and keeps the destination's verdict.

use super::{Channel, MigrationError, channel::Target, handover};
use qevm_returnpath::{
    Decoder, Event, Message, SwitchoverError,
    switchover::{AckWait, SourceGate, SwitchoverAckFlow},
};
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
    /// An ack of the switchover that was not asked for.
    #[error(transparent)]
    Switchover(#[from] SwitchoverError),
    /// A message that has no place in a precopy migration.
    #[error("{message}, expected SHUT, PONG or SWITCHOVER_ACK")]
    Unexpected {
        /// Its name.
        message: &'static str,
    },
    /// The destination reports success before it can have the whole guest.
    #[error("success reported before everything was sent")]
    EarlySuccess,
}

impl Blame for ReturnPathError {
    fn fault(&self) -> Fault {
        match self {
            ReturnPathError::Message(kind) => kind.fault(),
            ReturnPathError::Switchover(kind) => kind.fault(),
            _ => Fault::Malformed,
        }
    }
}

/// What the return path has said so far.
#[derive(Debug)]
pub(crate) struct ReturnPath {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Debug)]
struct Heard {
    /// The destination may have everything, so a good verdict is credible.
    sent_everything: bool,
    verdict: Option<Result<(), MigrationError>>,
    failed: bool,
    /// Nothing more will be heard.
    ended: bool,
    /// The destination waits for a confirmation before it runs the guest.
    agreed: bool,
    /// Holds the switchover back until the destination's acks are there.
    gate: SourceGate,
}

impl ReturnPath {
    /// `flow` is how acks of the switchover are counted; `None` without `switchover-ack`.
    pub(crate) fn new(flow: Option<SwitchoverAckFlow>) -> Self {
        let heard = Heard {
            sent_everything: false,
            verdict: None,
            failed: false,
            ended: false,
            agreed: false,
            gate: SourceGate::new(flow),
        };
        ReturnPath { heard: Mutex::new(heard), changed: Condvar::new() }
    }

    /// Whether the switchover may happen; otherwise, after `patience`, which acks are missing.
    pub(crate) fn acks(&self, patience: Duration) -> Option<AckWait> {
        let heard = self.lock();
        let (heard, _) = self
            .changed
            .wait_timeout_while(heard, patience, |heard| !heard.gate.is_open() && !heard.ended)
            .unwrap_or_else(PoisonError::into_inner);
        heard.gate.waiting()
    }

    /// Reads messages until the peer closes. A failure closes the channel, so that the sending thread does not stay
    /// blocked in a write that nobody reads.
    pub(crate) fn listen(&self, channel: &dyn Channel) {
        let result = self.messages(channel);
        let mut heard = self.lock();
        if heard.verdict.is_none() {
            heard.failed = result.is_err();
            heard.verdict = Some(result);
        }
        heard.ended = true;
        let failed = heard.failed;
        drop(heard);
        self.changed.notify_all();
        if failed {
            channel.close();
        } else {
            drain(channel);
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
    pub(crate) fn sent_everything(&self) {
        self.lock().sent_everything = true;
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

    /// Waits for a failure that explains why the channel broke; gives up after `patience`.
    pub(crate) fn explanation(&self, patience: Duration) -> Option<MigrationError> {
        let heard = self.lock();
        let (mut heard, _) = self
            .changed
            .wait_timeout_while(heard, patience, |heard| !heard.ended)
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
            let at = |kind| Err(Located::new(kind, offset).into());
            match decoder.next(&input).map_err(|error| error.map(ReturnPathError::from))? {
                Step::Event { consumed, event } => {
                    input.drain(..consumed);
                    match event {
                        Event::Message(Message::Shut { status: 0 }) if self.lock().sent_everything => return Ok(()),
                        Event::Message(Message::Shut { status: 0 }) => return at(ReturnPathError::EarlySuccess),
                        Event::Message(Message::Shut { status }) => return Err(MigrationError::PeerFailed { status }),
                        Event::Message(Message::Pong { value: handover::AGREED }) => self.lock().agreed = true,
                        Event::Message(Message::Pong { .. }) => {}
                        Event::Message(Message::SwitchoverAck) => {
                            self.lock().gate.ack().or_else(|error| at(error.into()))?;
                            self.changed.notify_all();
                        }
                        Event::Message(other) => {
                            return at(ReturnPathError::Unexpected { message: other.message_type().name() });
                        }
                        _ => return at(ReturnPathError::Unexpected { message: "bitmap" }),
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
fn drain(channel: &dyn Channel) {
    let mut rest = [0; 512];
    while let Ok(1..) = channel.read(&mut [Target::bytes(&mut rest)]) {}
}
