//! The destination of a migration.

mod action;
mod early;
mod iterative;
mod loader;
mod options;
mod phase;
mod postcopy;
mod reports;

pub use action::{Action, SectionUse, Turn};
pub use options::DestinationOptions;

use crate::{Doubt, LoadError, MigrationError, handover};
use iterative::Iterative;
use loader::{FollowUp, Loader, RamSection};
use phase::{Payload, Phase};
use postcopy::{Postcopy, Start};
use qevm_multifd::is_page_channel;
use qevm_returnpath::Message;
use qevm_returnpath::switchover::DestinationGate;
use qevm_savevm::ram::{RamBlocks, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Event, PayloadKind};
use qevm_wire::{Decode, Limits, Located, Step};
use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A destination: told what arrived on the main channel, what the guest reported and what time it is, it says what to
/// do next.
///
/// [`next`](Self::next) is shown the bytes that have arrived and are not done with, and names one [`Action`]. The
/// driver carries it out, drops what was consumed and asks again. Where the action is a question to the guest, it is
/// asked again until it was answered. Page channels have readers of their own, [`PageChannel`](super::PageChannel).
///
/// After an error, of the destination's or of the driver's ([`fail`](Self::fail)), the actions are those that tell the
/// source and let go of it.
#[derive(Debug)]
pub struct Destination {
    options: DestinationOptions,
    decoder: Decoder,
    /// That of the package that is next in the stream.
    nested: Option<Decoder>,
    loader: Loader,
    phase: Phase,
    /// The start of a guest that comes before its memory.
    start: Option<Start>,
    payload: Payload,
    /// Where the item of the last turn begins.
    at: u64,
    /// Nothing more comes.
    ended: bool,
    now: Duration,
    /// When something came last.
    arrived: Duration,
}

/// How long the source's host may take to acknowledge the last word, and the source to confirm it, unless the operator
/// says otherwise.
const PATIENCE: Duration = crate::verdict::PATIENCE;
/// How long the source may take to close after it was told of a failure.
const LINGER: Duration = Duration::from_secs(1);
/// How long a source may be silent that has sent no page, and whose page channels may have been dropped.
const SILENCE: Duration = Duration::from_secs(3);
/// Bytes that the state of all devices of a machine may have; with a full console it is some hundred kilobytes.
const DEVICE_STATE: u64 = 64 << 20;
/// Status of SHUT when the guest has arrived.
const SUCCESS: u32 = 0;
/// Status of SHUT when it has not.
const FAILURE: u32 = 1;

impl Destination {
    /// A destination that nothing has reached, at time 0.
    pub fn new(options: DestinationOptions) -> Self {
        let limits = Limits {
            device_state: DEVICE_STATE,
            device_section: DEVICE_STATE,
            packages: DEVICE_STATE,
            ..Limits::default()
        };
        let (vmdesc, offset) = (options.vmdesc, options.offset);
        let mut gate = DestinationGate::new(options.switchover_ack);
        for device in options.devices.iter().filter(|device| device.switchover_ack) {
            // It is too late only when a return path is open.
            gate.announce(&device.idstr.to_string()).ok();
        }
        Destination {
            decoder: Decoder::new(DecoderOptions { vmdesc, live: true, offset, limits, ..DecoderOptions::default() }),
            nested: None,
            loader: Loader {
                postcopy: Postcopy::new(options.postcopy, options.page_sizes),
                machine_type: options.machine_type.clone(),
                uuid: options.uuid,
                mapped_ram: options.mapped_ram,
                ignore_shared: options.ignore_shared,
                answers: options.answers,
                page_channels: options.page_channels,
                flushes: false,
                gate,
                switchover_ack: options.switchover_ack.is_some(),
                iterative: Iterative::new(&options.devices),
                devices: Vec::new(),
                listed: Vec::new(),
                came: HashSet::new(),
                ram: RamSection::Awaited,
                has_pages: false,
                records: 0,
                snapshot: options.background_snapshot,
                section: None,
                opened: false,
                return_path: false,
                confirmation: false,
            },
            phase: Phase::Opening,
            start: None,
            payload: Payload::Other,
            at: offset,
            ended: false,
            now: Duration::ZERO,
            arrived: Duration::ZERO,
            options,
        }
    }

    /// What to do next, where `input` is what has arrived on the main channel and is not done with.
    ///
    /// # Errors
    /// What arrived is wrong or ends too early, or a wait was too long. The guest must not run here; with
    /// [`MigrationError::Undecided`] it is wholly here, and may run at the source.
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Turn<'a>, MigrationError> {
        self.turn(input).map_err(|error| {
            let error = self.broken(error);
            self.fail(&error);
            error
        })
    }

    /// It is `now`.
    pub fn time(&mut self, now: Duration) {
        self.now = now.max(self.now);
    }

    /// More has come on the main channel, and it is `now`.
    pub fn arrived(&mut self, now: Duration) {
        self.time(now);
        self.arrived = self.now;
    }

    /// Nothing more comes on the main channel.
    pub fn end_of_input(&mut self) {
        self.ended = true;
        self.decoder.end_of_input();
        if let Some(nested) = &mut self.nested {
            nested.end_of_input();
        }
    }

    /// Something failed, here or at the driver's: from now on the source is told and let go of. Of a guest that may run
    /// there it is told nothing.
    pub fn fail(&mut self, error: &MigrationError) {
        self.phase = match (&self.phase, error) {
            (Phase::Failing | Phase::Lingering { .. } | Phase::Over, _) => return,
            (_, MigrationError::Undecided(_)) => Phase::Over,
            _ if self.runs_early() => Phase::Over,
            _ if self.loader.return_path => Phase::Failing,
            _ => Phase::Over,
        };
        self.start = None;
    }

    /// What the guest reported of the item of the last turn is an error of the stream's.
    pub fn refuse(&self, kind: LoadError) -> MigrationError {
        self.locate(kind, self.at).into()
    }

    /// Whether a page with content has been met on the main channel.
    pub fn has_pages(&self) -> bool {
        self.loader.has_pages
    }

    /// Whether the source has been told that the guest has arrived: from then on it must not be told of a failure.
    pub fn is_decided(&self) -> bool {
        matches!(self.phase, Phase::Confirming { .. } | Phase::Arrived { .. })
    }

    /// The RAM blocks that the source has listed, for the reader of the preempt channel ([`PreemptDecoder`]).
    ///
    /// [`PreemptDecoder`]: qevm_savevm::ram::PreemptDecoder
    pub fn ram_blocks(&self) -> &Arc<RamBlocks> {
        self.decoder.ram_blocks()
    }

    /// Bytes of the stream, from the start of its file, that are done with.
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    fn turn<'a>(&mut self, input: &'a [u8]) -> Result<Turn<'a>, MigrationError> {
        if let Some(action) = self.starting() {
            return Ok(Turn { consumed: 0, action });
        }
        let until = self.until();
        if let Some(until) = until
            && self.now >= until
            && !self.ended
        {
            return self.too_long(until);
        }
        let action = match &self.phase {
            Phase::Opening if input.len() < 4 && !self.ended => Action::Read { at_least: 4, until },
            Phase::Opening => {
                if is_page_channel(input) == Some(true) {
                    return Err(self.locate(LoadError::MultifdOff, 0).into());
                }
                self.phase = Phase::Stream;
                Action::Continue
            }
            Phase::Stream => return self.stream(input),
            Phase::Section { header, usage } => {
                Action::Section { idstr: header.idstr.clone(), instance_id: header.instance_id, usage: *usage }
            }
            Phase::Block(block) => Action::Block(block.clone()),
            Phase::MappedBlock(block) => {
                Action::MappedBlock { block: block.clone(), gap: self.decoder.payload_remaining() }
            }
            Phase::Package { len } => return self.package(input, *len),
            Phase::Place { page, zero } => return self.place_page(input, *page, *zero),
            Phase::AwaitingStart => Action::AwaitStart,
            Phase::Synchronising(mark) => Action::Synchronise(*mark),
            Phase::EndOfMemory => Action::EndOfMemory,
            Phase::DeviceStates => Action::DeviceStates,
            Phase::LoadingDevices => Action::LoadDevices,
            Phase::Activating { .. } => Action::Activate,
            Phase::Telling { .. } => {
                // Where the guest runs already, nothing depends on it.
                let patience = (!self.loader.confirmation && !self.runs_early()).then_some(self.handover_time());
                Action::Tell { message: Message::Shut { status: SUCCESS }, patience }
            }
            Phase::Confirming { running, until } => return self.confirm(input, *running, *until),
            Phase::Arrived { running } => Action::Complete { running: *running },
            Phase::Failing => {
                self.phase = Phase::Lingering { until: self.now + LINGER };
                Action::Send(Message::Shut { status: FAILURE })
            }
            Phase::Lingering { until } if self.ended || self.now >= *until => {
                self.phase = Phase::Over;
                Action::Close
            }
            Phase::Lingering { until } => Action::Linger { until: *until },
            Phase::Over => Action::Close,
        };
        Ok(Turn { consumed: 0, action })
    }

    fn handover_time(&self) -> Duration {
        self.options.handover.unwrap_or(PATIENCE)
    }

    /// Until when something must have come, where a wait has a limit.
    fn until(&self) -> Option<Duration> {
        let limit = match self.phase {
            Phase::Opening | Phase::Stream => {
                let hurried = (self.options.hurried && !self.loader.has_pages).then_some(SILENCE);
                hurried.into_iter().chain(self.options.silence).min()?
            }
            _ => return None,
        };
        Some(self.arrived + limit)
    }

    fn too_long(&self, until: Duration) -> Result<Turn<'static>, MigrationError> {
        let silence = until - self.arrived;
        let reason = format!("nothing has come for {} s", silence.as_secs());
        let source = io::Error::new(io::ErrorKind::TimedOut, reason);
        Err(MigrationError::Receive { offset: self.decoder.offset(), source })
    }

    fn stream<'a>(&mut self, input: &'a [u8]) -> Result<Turn<'a>, MigrationError> {
        let decoder = self.nested.as_mut().unwrap_or(&mut self.decoder);
        self.at = decoder.offset();
        match decoder.next(input).map_err(located)? {
            // An idle guest is made of these.
            Step::Event { consumed, event: Event::Ram(RamRecord::Zero(page)) }
                if self.nested.is_none() && !self.loader.postcopy.listens =>
            {
                self.payload = Payload::Other;
                self.loader.records += 1;
                Ok(Turn { consumed, action: Action::Zero(page) })
            }
            Step::Event { consumed, event } => {
                if self.nested.is_some() {
                    self.decoder.skip_payload(consumed as u64).map_err(located)?;
                }
                let then = self.loader.take(event).map_err(|error| self.refuse(error))?;
                self.payload = Payload::Other;
                let action = match then {
                    FollowUp::Do(Action::Page { page, .. }) => {
                        self.payload = Payload::Page(page);
                        let decoder = self.nested.as_ref().unwrap_or(&self.decoder);
                        Action::Page { page, remaining: decoder.payload_remaining() }
                    }
                    FollowUp::Do(action) => action,
                    FollowUp::Ask(phase) => {
                        self.phase = phase;
                        Action::Continue
                    }
                    FollowUp::Start => {
                        self.start = Some(Start::Loading);
                        Action::LoadDevices
                    }
                };
                Ok(Turn { consumed, action })
            }
            Step::Payload { of, remaining } => self.pending(input, &of, remaining),
            Step::NeedMore { at_least } => {
                Ok(Turn { consumed: 0, action: Action::Read { at_least, until: self.until() } })
            }
            // A source that waits for the verdict sends nothing more, and the decoder asks for nothing more.
            Step::End if self.nested.take().is_some() => Ok(Turn { consumed: 0, action: Action::Continue }),
            Step::End => self.stream_is_over(),
        }
    }

    /// Of a payload this many bytes are not done with.
    fn pending<'a>(&mut self, input: &'a [u8], of: &PayloadKind, remaining: u64) -> Result<Turn<'a>, MigrationError> {
        if let Payload::Page(page) = self.payload {
            return Ok(Turn { consumed: 0, action: Action::Page { page, remaining } });
        }
        if input.is_empty() {
            return Ok(Turn { consumed: 0, action: Action::Read { at_least: 1, until: self.until() } });
        }
        // The state of a device, taken over as it comes; otherwise the description, which is skipped.
        let consumed = input.len().min(usize::try_from(remaining).unwrap_or(usize::MAX));
        let device = match of {
            PayloadKind::DeviceData { section_id } => self.decoder.sections().get(*section_id),
            _ => None,
        };
        let action = match device.map(|header| header.idstr.clone()) {
            Some(idstr) => Action::LoadPiece { idstr, state: &input[..consumed] },
            None => Action::Continue,
        };
        self.skip(consumed as u64)?;
        Ok(Turn { consumed, action })
    }

    /// This many bytes of payload are done with.
    fn skip(&mut self, count: u64) -> Result<(), MigrationError> {
        if let Some(nested) = &mut self.nested {
            nested.skip_payload(count).map_err(located)?;
        }
        self.decoder.skip_payload(count).map_err(located)?;
        Ok(())
    }

    fn stream_is_over(&mut self) -> Result<Turn<'static>, MigrationError> {
        let offset = self.decoder.offset();
        self.at = offset;
        if self.options.page_channels_called && !self.loader.has_pages {
            // Not every release's stream tells that its pages went elsewhere.
            return Err(self.refuse(LoadError::MultifdOff));
        }
        match self.options.page_channels && !self.loader.postcopy.listens {
            true => self.phase = Phase::EndOfMemory,
            false => self.memory_is_complete()?,
        }
        Ok(Turn { consumed: 0, action: Action::Continue })
    }

    fn memory_is_complete(&mut self) -> Result<(), MigrationError> {
        self.loader.check_complete(&self.options.ram).map_err(|error| self.refuse(error))?;
        if self.loader.postcopy.listens {
            self.phase = match self.start {
                Some(_) => Phase::AwaitingStart,
                None if self.loader.postcopy.runs => self.verdict(true),
                None => return Err(self.refuse(LoadError::Unsupported("postcopy without command POSTCOPY_RUN".into()))),
            };
            return Ok(());
        }
        self.phase = if self.loader.iterative.has_transfers() { Phase::DeviceStates } else { Phase::LoadingDevices };
        Ok(())
    }

    fn verdict(&self, running: bool) -> Phase {
        if self.loader.return_path { Phase::Telling { running } } else { Phase::Arrived { running } }
    }

    /// Waits for the source to say that it will not run the guest again.
    fn confirm(&mut self, input: &[u8], running: bool, until: Duration) -> Result<Turn<'static>, MigrationError> {
        let expected = handover::confirmation()?;
        if input.starts_with(&expected) {
            self.phase = Phase::Arrived { running };
            return Ok(Turn { consumed: expected.len(), action: Action::Continue });
        }
        if input.len() < expected.len() && !self.ended && self.now < until {
            return Ok(Turn { consumed: 0, action: Action::Read { at_least: expected.len(), until: Some(until) } });
        }
        Err(Doubt::NotConfirmed.into())
    }

    fn locate(&self, kind: LoadError, offset: u64) -> Located<LoadError> {
        let error = Located::new(kind, offset);
        match self.decoder.current_section() {
            Some(header) => error.within(format!("section {} '{}'", header.section_id, header.idstr)),
            None => error,
        }
    }
}

fn located(error: qevm_savevm::Error) -> Located<LoadError> {
    error.map(LoadError::from)
}

#[cfg(test)]
mod tests;
