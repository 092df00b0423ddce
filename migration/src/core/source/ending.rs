//! Who has the guest in the end: the destination's verdict, the handover, and the way back.
//!
//! Whatever fails before any byte of the end of the stream was sent, the destination does not run the guest, which may
//! go on here. After that, only a destination that waits for a confirmation, or says that it has failed, does not run
//! it for certain.

use super::phase::{Back, Phase, Postcopy};
use super::{Action, Answers, SourceCore, Wake};
use crate::connections::Reader;
use crate::{GuestError, MigrationError, SavedDevices, Status, handover};
use std::io;
use std::time::Duration;

/// How long to wait for the destination's word on why the channel broke.
const EXPLANATION_PATIENCE: Duration = Duration::from_secs(1);
/// How long the destination's host may take to acknowledge the confirmation.
const CONFIRMATION_PATIENCE: Duration = Duration::from_secs(30);
/// A destination that has waited for the confirmation for so long may have given up…
const LATE: Duration = Duration::from_secs(1);
/// …which a source that goes on after having been held up hears within this time.
const HEAR_OUT: Duration = Duration::from_millis(50);
/// How often it is looked whether it has.
const CONFIRMATION_POLL: Duration = Duration::from_millis(1);

impl SourceCore {
    /// Sends the end of the stream when the destination has answered everything before.
    pub(super) fn await_answers(
        &mut self,
        devices: SavedDevices,
        since: Duration,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        if let Some(answers) = answers {
            if !answers.is_answered() && !answers.has_ended() {
                self.keep_waiting(since, now, answers, Status::Device)?;
                self.phase = Phase::AwaitAnswers { devices, since };
                return Ok(());
            }
            answers.answered()?;
            answers.everything_is_sent()?;
        }
        self.end_stream(&devices)?;
        self.do_next(Action::SendEnd);
        self.phase = Phase::Ending;
        Ok(())
    }

    pub(super) fn await_verdict(
        &mut self,
        sent: Result<(), MigrationError>,
        since: Duration,
        heard_out: Option<Duration>,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let Some(answers) = answers else { return self.settle(sent) };
        let agreed = answers.agreed();
        if !answers.has_verdict() {
            let patience = self.keep_waiting(since, now, answers, Status::Device);
            self.phase = Phase::AwaitVerdict { sent, since, heard_out };
            return patience.map_err(|error| if agreed { error } else { self.unsettled(error) });
        }
        match answers.verdict() {
            // It has given up, and does not run the guest.
            Ok(()) if agreed && answers.has_ended() => return Err(MigrationError::NotAwaited),
            Ok(()) if agreed => {
                let until = heard_out.unwrap_or(if now.saturating_sub(since) < LATE { now } else { now + HEAR_OUT });
                if now < until {
                    self.wait(Some(until), Wake::Answers);
                    self.phase = Phase::AwaitVerdict { sent, since, heard_out: Some(until) };
                    return Ok(());
                }
                self.commit(false);
            }
            // A QEMU runs the guest already: it is too late to cancel.
            Ok(()) => self.succeed(now),
            Err(error @ MigrationError::PeerFailed { .. }) => return Err(error),
            Err(MigrationError::NoVerdict | MigrationError::ReturnPath(_)) if agreed => {
                sent?;
                return Err(MigrationError::NoVerdict);
            }
            Err(error) if agreed => return Err(error),
            Err(error) => return Err(self.unsettled(error)),
        }
        Ok(())
    }

    /// Waits on for the destination, as long as its patience allows.
    pub(super) fn keep_waiting(
        &mut self,
        since: Duration,
        now: Duration,
        answers: &Answers,
        status: Status,
    ) -> Result<(), MigrationError> {
        let deadline = self.options.patience.map(|patience| since + patience);
        if deadline.is_some_and(|deadline| now >= deadline) {
            return Err(answers.overdue(now - since, status, "x-switchover-timeout"));
        }
        self.wait(deadline, Wake::Answers);
        Ok(())
    }

    /// How long a destination may take to answer when the guest is paused has changed
    /// ([`SourceOptions::patience`](super::SourceOptions)).
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.options.patience = patience;
    }

    /// Fails if the destination of a guest that runs has not answered for as long as it may be silent.
    pub(super) fn is_answered_in_time(&mut self, now: Duration, answers: &Answers) -> Result<(), MigrationError> {
        if answers.is_answered() {
            self.unanswered = None;
            return Ok(());
        }
        let waited = now.saturating_sub(*self.unanswered.get_or_insert(now));
        match self.parameters.timeouts.idle() {
            Some(limit) if waited >= limit => Err(answers.overdue(waited, Status::Active, "x-idle-timeout")),
            _ => Ok(()),
        }
    }

    /// Without a return path, waits until everything has been taken.
    fn settle(&mut self, sent: Result<(), MigrationError>) -> Result<(), MigrationError> {
        if self.options.reader == Reader::Nobody {
            sent?;
            self.commit(false);
            return Ok(());
        }
        sent.map_err(|error| self.unsettled(error))?;
        self.do_next(Action::Settle);
        self.phase = Phase::Settling(None);
        Ok(())
    }

    pub(super) fn settling(&mut self, result: Option<io::Result<()>>) -> Result<(), MigrationError> {
        match result.unwrap_or(Ok(())) {
            Ok(()) => {
                self.commit(true);
                Ok(())
            }
            // What it has not read it does not have.
            Err(source) if source.kind() == io::ErrorKind::BrokenPipe => {
                Err(MigrationError::Send { doing: "the end of the stream", source })
            }
            Err(source) => Err(self.unsettled(source)),
        }
    }

    fn commit(&mut self, unsettled: bool) {
        self.do_next(Action::Commit);
        self.phase = Phase::Committing { unsettled, committed: None };
    }

    pub(super) fn committing(
        &mut self,
        unsettled: bool,
        committed: Option<Result<(), MigrationError>>,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let committed = committed.unwrap_or(Ok(()));
        committed.map_err(|error| if unsettled { self.unsettled(error) } else { error })?;
        self.succeed(now);
        if answers.is_some_and(|answers| answers.agreed()) {
            // Says that the guest will not run here again.
            self.do_next(Action::Confirm(handover::confirmation()?));
            self.phase = Phase::Confirming { sent: None, deadline: now + CONFIRMATION_PATIENCE };
        }
        Ok(())
    }

    /// Waits until the destination's host has the confirmation.
    pub(super) fn confirming(
        &mut self,
        sent: Option<io::Result<()>>,
        deadline: Duration,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let measured = sent.is_none();
        sent.unwrap_or(Ok(())).map_err(|error| self.unsettled(error))?;
        self.phase = Phase::Confirming { sent: None, deadline };
        if measured && self.backlog == 0 {
            self.phase = Phase::HandedOver;
            return Ok(());
        }
        if measured {
            if let Some(Err(error)) = answers.and_then(Answers::take_end) {
                return Err(self.unsettled(error));
            }
            if now > deadline {
                return Err(self.unsettled("it does not acknowledge that it is to run the guest"));
            }
            self.wait(Some(now + CONFIRMATION_POLL), Wake::Answers);
        }
        self.do_next(Action::MeasureBacklog { all: false });
        Ok(())
    }

    /// The destination has the guest.
    pub(super) fn succeed(&mut self, now: Duration) {
        self.gone_at.get_or_insert(now);
        self.phase = Phase::HandedOver;
    }

    pub(super) fn hand_over(&mut self) {
        if let Some((pause, gone_at)) = self.pause.zip(self.gone_at) {
            self.statistics.downtime = Some(gone_at.saturating_sub(pause.since));
            let ram = &mut self.statistics.ram;
            ram.downtime_bytes = self.transferred.saturating_sub(ram.precopy_bytes).saturating_sub(ram.postcopy_bytes);
        }
        self.do_next(Action::StopLog);
        self.unthrottle();
        self.do_next(Action::LeaveGuest);
        self.do_next(Action::End(Ok(())));
        self.phase = Phase::Over;
    }

    /// Whether the guest runs at the destination is not known.
    pub(super) fn unsettled(&self, reason: impl Into<GuestError>) -> MigrationError {
        let reason = if self.cancelled { MigrationError::Cancelled.into() } else { reason.into() };
        MigrationError::Unsettled { reason }
    }

    fn unthrottle(&mut self) {
        let (throttled, limited) = (std::mem::take(&mut self.throttled), self.limit.take().is_some());
        if throttled || limited {
            self.do_next(Action::Unthrottle { throttled, limited });
        }
    }

    /// The migration fails. `return_path` is whether the destination may say why.
    pub(super) fn fail(&mut self, error: MigrationError, now: Duration, return_path: bool) {
        let error = match error {
            MigrationError::Unsettled { .. } => error,
            // What breaks after the operator's word breaks because of it.
            _ if self.cancelled && !self.departed => MigrationError::Cancelled,
            _ => error,
        };
        self.actions.clear();
        self.do_next(Action::StopLog);
        self.phase = if return_path && matches!(error, MigrationError::Send { .. }) {
            Phase::AwaitExplanation { error, until: now + EXPLANATION_PATIENCE }
        } else {
            self.after(error)
        };
    }

    /// What follows a failure that has no further explanation.
    fn after(&self, error: MigrationError) -> Phase {
        match error {
            // One of this crate says so only before it runs the guest. What was given back to the host is gone all the
            // same.
            MigrationError::PeerFailed { .. } if self.agreed && !self.releases => Phase::BackOut { error, back: None },
            // A QEMU that has not said that it has loaded the devices does not run the guest after it has failed. A
            // connection that is lost says nothing of the kind.
            MigrationError::PeerFailed { .. } if self.departed && !self.package_loaded => {
                Phase::BackOut { error, back: None }
            }
            MigrationError::PostcopyBroken { .. } => Phase::Postcopy(Postcopy::Lost(error)),
            _ if self.departed => {
                Phase::Postcopy(Postcopy::Lost(MigrationError::PostcopyBroken { reason: error.into() }))
            }
            _ => Phase::BackOut { error, back: None },
        }
    }

    /// Replaces a broken channel by what the destination said about it.
    pub(super) fn await_explanation(
        &mut self,
        error: MigrationError,
        until: Duration,
        now: Duration,
        answers: Option<&mut Answers>,
    ) {
        let error = match answers {
            Some(answers) if !answers.has_ended() && now < until => {
                self.wait(Some(until), Wake::Answers);
                self.phase = Phase::AwaitExplanation { error, until };
                return;
            }
            Some(answers) => {
                self.note_package(answers);
                answers.explanation().unwrap_or(error)
            }
            None => error,
        };
        self.phase = self.after(error);
    }

    /// Lets the guest go on after a failure.
    pub(super) fn back_out(&mut self, error: MigrationError, back: Option<Back>) {
        if back.is_some() {
            self.do_next(Action::End(Err(error)));
            self.phase = Phase::Over;
            return;
        }
        // First of all the destination must not get any further.
        self.do_next(Action::Close);
        self.unthrottle();
        let was_running = self.pause.take().is_some_and(|pause| pause.was_running);
        let back = if matches!(error, MigrationError::PostcopyBroken { .. }) {
            // It stays what it is, half handed over: without what is at the destination it is no guest any more.
            Back::Done
        } else if matches!(error, MigrationError::Unsettled { .. }) {
            self.do_next(Action::LeaveGuest);
            Back::Done
        } else if was_running {
            self.do_next(Action::Resume);
            Back::Asked { doing: "resume the guest" }
        } else {
            self.do_next(Action::StayStopped);
            if self.inactive {
                self.do_next(Action::Activate);
                Back::Asked { doing: "take the guest's disks back" }
            } else {
                Back::Done
            }
        };
        self.phase = Phase::BackOut { error, back: Some(back) };
    }

    /// The guest goes on here, or cannot.
    pub(super) fn came_back(&mut self, result: Result<(), GuestError>) {
        if let (Phase::BackOut { error, back: Some(Back::Asked { doing }) }, Err(failed)) = (&mut self.phase, result) {
            let source = format!("{failed} (the migration had failed: {error})").into();
            *error = MigrationError::Guest { doing, source };
        }
    }
}

impl Phase {
    /// Whether the destination cannot have the guest yet, so that an operator's word or a failure brings it back.
    pub(super) fn may_be_cancelled(&self) -> bool {
        matches!(
            self,
            Phase::Setup(_)
                | Phase::Precopy(..)
                | Phase::AwaitAck { .. }
                | Phase::Stopping
                | Phase::PreSwitchover
                | Phase::Stopped(_)
                | Phase::Completing(_)
                | Phase::AwaitAnswers { .. }
                | Phase::Postcopy(Postcopy::Begin(_))
                | Phase::Snapshot(_)
        )
    }
}
