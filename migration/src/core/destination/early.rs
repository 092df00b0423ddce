//! The start of a guest whose memory comes after it.

use super::{Action, Destination, Payload, Phase, Start, Turn, located};
use crate::{MigrationError, PAGE_SIZE};
use qevm_returnpath::Message;
use qevm_savevm::ram::PageAt;
use qevm_wire::Decode;

impl Destination {
    /// The connection was lost, whatever the error, and another has taken its place: what arrives from here on comes
    /// over that one. Only when the guest [runs](Self::runs_early) before its memory has come.
    pub fn reconnected(&mut self) {
        if self.runs_early() {
            self.decoder = self.decoder.recovery();
            (self.nested, self.phase, self.payload) = (None, Phase::Stream, Payload::Other);
            (self.ended, self.at, self.loader.postcopy.recovers) = (false, 0, true);
        }
    }

    /// Whether the guest runs here though the migration goes on (postcopy).
    pub fn runs_early(&self) -> bool {
        self.loader.postcopy.runs
    }

    /// What is to be done to start the guest. It does not depend on what arrives.
    pub(super) fn starting(&mut self) -> Option<Action<'static>> {
        match self.start? {
            Start::Loading => None,
            Start::Activating { .. } => Some(Action::Activate),
            Start::Answering { running } => match self.loader.postcopy.held.pop_front() {
                Some(value) => Some(Action::Send(Message::Pong { value })),
                None => {
                    self.start = None;
                    self.loader.postcopy.runs = true;
                    if let Phase::AwaitingStart = self.phase {
                        self.phase = self.verdict(running);
                    }
                    Some(Action::Run { running })
                }
            },
        }
    }

    /// Whether [`next`](Self::next) says how to start the guest, whatever arrives.
    pub fn starts(&self) -> bool {
        matches!(self.start, Some(Start::Activating { .. } | Start::Answering { .. }))
    }

    /// The package is loaded when all of it is here.
    pub(super) fn package(&mut self, input: &[u8], len: u64) -> Result<Turn<'static>, MigrationError> {
        if (input.len() as u64) < len && !self.ended {
            let at_least = usize::try_from(len).unwrap_or(usize::MAX);
            return Ok(Turn { consumed: 0, action: Action::Read { at_least, until: None } });
        }
        self.nested = Some(self.decoder.nested().map_err(located)?);
        if self.ended
            && let Some(nested) = &mut self.nested
        {
            nested.end_of_input();
        }
        self.phase = Phase::Stream;
        Ok(Turn { consumed: 0, action: Action::Continue })
    }

    /// A page is placed when all of it is here.
    pub(super) fn place_page<'a>(
        &mut self,
        input: &'a [u8],
        page: PageAt,
        zero: bool,
    ) -> Result<Turn<'a>, MigrationError> {
        let len = if zero { 0 } else { PAGE_SIZE as usize };
        let Some(content) = input.get(..len) else {
            if self.ended {
                let source = std::io::ErrorKind::UnexpectedEof.into();
                return Err(MigrationError::Receive { offset: self.decoder.offset(), source });
            }
            return Ok(Turn { consumed: 0, action: Action::Read { at_least: len, until: None } });
        };
        self.skip(len as u64)?;
        self.phase = Phase::Stream;
        Ok(Turn { consumed: len, action: Action::Place { page, content: (!zero).then_some(content) } })
    }

    /// An error after which the guest is here and some of its memory is not.
    pub(crate) fn broken(&self, error: MigrationError) -> MigrationError {
        match error {
            MigrationError::PostcopyBroken { .. } => error,
            error if self.runs_early() => MigrationError::PostcopyBroken { reason: error.into() },
            error => error,
        }
    }
}
