//! A postcopy whose connection was lost goes on over another.
//!
//! Guest memory is as it was when the guest left: it is not written to here any more. What of it was still on its way
//! may have arrived or not, which only the destination knows. It says so for each block, and whatever it lacks is sent
//! as before, what the guest waits for first.
//!
//! ```text
//!  RECV_BITMAP for each block ──▶        ◀── bitmap of what is there, for each
//!  POSTCOPY_RESUME            ──▶        ◀── RESUME_ACK, and requests for pages
//! ```

use super::phase::{Phase, Postcopy, Recovery};
use super::{Action, Answers, SourceCore, idstr};
use crate::{MigrationError, Status};
use qevm_savevm::command::Command;
use std::time::Duration;

impl SourceCore {
    /// Another connection is there, of which both directions are as yet unused: what [`Action::AwaitConnection`] has
    /// waited for. What comes back on it is for `answers`, which forgets what came on the one before.
    ///
    /// # Errors
    /// No other connection is waited for, or what was lost on the one before is no longer here; this one is of no use.
    pub fn reconnected(&mut self, answers: &mut Answers) -> Result<(), MigrationError> {
        if !matches!(self.phase, Phase::Postcopy(Postcopy::Paused(_))) {
            return Err(crate::Refused::NoPausedMigration.into());
        }
        if self.releases {
            return Err(crate::Refused::MemoryReleased.into());
        }
        self.take_back(answers);
        answers.reconnected(self.request_blocks()?);
        self.stream = self.stream.recovery();
        // Who knows how to ask for a recovery has the guest, and no failure there brings it back.
        (self.agreed, self.package_loaded, self.is_active) = (false, true, true);
        self.preempt = (false, false);
        self.phase = Phase::Postcopy(Postcopy::Recover(Recovery::Begin));
        Ok(())
    }

    pub(super) fn recover(
        &mut self,
        step: Recovery,
        now: Duration,
        answers: &mut Answers,
    ) -> Result<Postcopy, MigrationError> {
        let next = match step {
            Recovery::Begin => {
                self.do_next(Action::Status(Status::PostcopyRecover));
                if self.options.profile.preempt_pre_7_2 {
                    // The destination says nothing before it has both.
                    self.open_preempt();
                }
                for (name, used_length) in &self.options.blocks {
                    let name = idstr(name)?;
                    answers.ask_bitmap(name.clone(), *used_length)?;
                    self.stream.command(Command::RecvBitmap(name))?;
                }
                self.do_next(Action::Send { doing: "the question which pages have come" });
                Recovery::AwaitBitmaps { since: now, left: self.options.blocks.len() }
            }
            Recovery::AwaitBitmaps { since, mut left } => {
                while let Some((name, bitmap)) = answers.take_bitmap() {
                    if let Some(block) = self.options.blocks.iter().position(|(known, _)| name == *known.as_str()) {
                        self.sweep.received(block, &bitmap);
                        left -= 1;
                    }
                }
                if left > 0 {
                    self.keep_waiting(since, now, answers, Status::PostcopyRecover)?;
                    Recovery::AwaitBitmaps { since, left }
                } else {
                    self.widen();
                    self.open_preempt();
                    Recovery::Resume
                }
            }
            Recovery::Resume => {
                answers.ask_resume()?;
                self.stream.command(Command::PostcopyResume)?;
                self.do_next(Action::Send { doing: "the word that postcopy goes on" });
                Recovery::AwaitAck { since: now }
            }
            Recovery::AwaitAck { since } if !answers.has_resumed() => {
                self.keep_waiting(since, now, answers, Status::PostcopyRecover)?;
                Recovery::AwaitAck { since }
            }
            Recovery::AwaitAck { .. } => {
                self.do_next(Action::Status(Status::PostcopyActive));
                self.serve_requests();
                return Ok(Postcopy::Serve);
            }
        };
        Ok(Postcopy::Recover(next))
    }
}
