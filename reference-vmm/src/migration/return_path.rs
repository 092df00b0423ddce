//! The source's ear: reads the return path beside the sending thread, and keeps the destination's verdict.

use super::{Channel, MigrationError, channel::Target, handover};
use qevm_wire::{Blame, Fault, Located, WireError};
use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Type and length of a message.
const HEADER: usize = 4;
/// A 32-bit value.
const VALUE: usize = 4;
/// The verdict (2.5).
pub(crate) const SHUT: u16 = 1;
/// The answer to PING (2.5).
pub(crate) const PONG: u16 = 2;

/// Why a message on the return path is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReturnPathError {
    /// A message could not be read.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A message that has no place in a precopy migration, or none at all.
    #[error("message type {found}, expected SHUT or PONG")]
    Unexpected {
        /// Its type.
        found: u16,
    },
    /// A message of the wrong length.
    #[error("message type {message} has {found} bytes, expected {expected}")]
    Length {
        /// Its type.
        message: u16,
        /// Its length.
        found: u16,
        /// The only legal length.
        expected: u16,
    },
    /// The destination reports success before it can have the whole guest.
    #[error("success reported before everything was sent")]
    EarlySuccess,
}

impl Blame for ReturnPathError {
    fn fault(&self) -> Fault {
        match self {
            ReturnPathError::Wire(kind) => kind.fault(),
            _ => Fault::Malformed,
        }
    }
}

/// What the return path has said so far.
#[derive(Debug, Default)]
pub(crate) struct ReturnPath {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    /// The destination may have everything, so a good verdict is credible.
    sent_everything: bool,
    verdict: Option<Result<(), MigrationError>>,
    failed: bool,
    /// Nothing more will be heard.
    ended: bool,
    /// The destination waits for a confirmation before it runs the guest.
    agreed: bool,
}

impl ReturnPath {
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
        let mut offset = 0;
        loop {
            let mut header = [0; HEADER];
            if !fill(channel, &mut header)? {
                return Err(MigrationError::NoVerdict);
            }
            let at = |kind| Located::new(kind, offset);
            let mut reader = qevm_wire::Reader::<ReturnPathError>::at(&header, offset);
            let (kind, len) = (reader.be16()?, reader.be16()?);
            let wanted = match kind {
                SHUT | PONG => VALUE,
                _ => return Err(at(ReturnPathError::Unexpected { found: kind }).into()),
            };
            if usize::from(len) != wanted {
                return Err(at(ReturnPathError::Length { message: kind, found: len, expected: wanted as u16 }).into());
            }
            let mut payload = [0; VALUE];
            if !fill(channel, &mut payload)? {
                return Err(MigrationError::NoVerdict);
            }
            let value = u32::from_be_bytes(payload);
            match (kind, value) {
                (SHUT, 0) if self.lock().sent_everything => return Ok(()),
                (SHUT, 0) => return Err(at(ReturnPathError::EarlySuccess).into()),
                (SHUT, status) => return Err(MigrationError::PeerFailed { status }),
                (_, handover::AGREED) => self.lock().agreed = true,
                _ => {}
            }
            offset += (HEADER + VALUE) as u64;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills `bytes`; false if the peer closed before.
fn fill(channel: &dyn Channel, bytes: &mut [u8]) -> Result<bool, MigrationError> {
    let mut done = 0;
    while done < bytes.len() {
        match channel.read(&mut [Target::bytes(&mut bytes[done..])]) {
            Ok(0) => return Ok(false),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(MigrationError::ReturnPath(error)),
        }
    }
    Ok(true)
}

/// Reads what still comes, so that closing the socket does not destroy what the peer has yet to read.
fn drain(channel: &dyn Channel) {
    let mut rest = [0; 512];
    while let Ok(1..) = channel.read(&mut [Target::bytes(&mut rest)]) {}
}
