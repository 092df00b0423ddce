//! The session at the source.

use super::SessionError;
use crate::Message;
use crate::bitmap::BitmapExchange;
use crate::switchover::{SourceGate, SwitchoverAckFlow};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use qevm_wire::{CountedString, PageGeometry};

/// Watches the messages of one return path. The source tells it what it sends on the main channel, and gives it every
/// message that comes; the answer says what to do. A message that is wrong at its time is an error that names it, and
/// [`waiting`](SourceSession::waiting) says what has not come.
///
/// ```
/// use qevm_returnpath::{Message, session::{Action, SourceSession}};
///
/// let mut session = SourceSession::new(None); // without switchover-ack
/// session.ping(1)?;
/// assert_eq!(session.message(&Message::Pong { value: 1 })?, Action::Pong { value: 1 });
/// assert!(session.message(&Message::Pong { value: 1 }).is_err()); // answered already
/// session.everything_sent()?;
/// assert_eq!(session.waiting(), "SHUT is missing");
/// assert_eq!(session.message(&Message::Shut { status: 0 })?, Action::Complete);
/// # Ok::<(), qevm_returnpath::SessionError>(())
/// ```
#[derive(Debug, Clone)]
pub struct SourceSession {
    stage: Stage,
    gate: SourceGate,
    /// For each value, the PINGs that were not answered.
    pings: BTreeMap<u32, u64>,
    bitmaps: BitmapExchange,
    resume_asked: bool,
    everything_sent: bool,
}

/// How far a migration is, as far as the return path matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The guest runs at the source.
    Precopy,
    /// The guest runs at the destination, which may request pages.
    Postcopy,
    /// A broken postcopy is being resumed on this return path.
    Recovery,
    /// SHUT came.
    Shut,
}

/// What the source has to do about a message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub enum Action {
    /// A PING was answered.
    Pong {
        /// Its value.
        value: u32,
    },
    /// Put the request into [`PageRequests`](crate::requests::PageRequests).
    Request,
    /// Read the bitmap that follows.
    Bitmap,
    /// Go on with postcopy.
    Resume,
    /// Look at the [gate](SourceSession::gate): it may be open now.
    SwitchoverAck,
    /// The migration is complete.
    Complete,
    /// The destination failed; its status is not 0.
    Failed {
        /// The status.
        status: u32,
    },
}

impl SourceSession {
    /// A return path that is opened with the migration. `flow` is that of capability `switchover-ack`; `None` if it is
    /// off.
    pub fn new(flow: Option<SwitchoverAckFlow>) -> Self {
        SourceSession {
            stage: Stage::Precopy,
            gate: SourceGate::new(flow),
            pings: BTreeMap::new(),
            bitmaps: BitmapExchange::default(),
            resume_asked: false,
            everything_sent: false,
        }
    }

    /// A return path on which a broken postcopy is resumed.
    pub fn recovery() -> Self {
        SourceSession { stage: Stage::Recovery, ..Self::new(None) }
    }

    /// How far the migration is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// True if every PING was answered. A destination answers in the order of the stream, so it has read all up to the
    /// last one.
    pub fn is_answered(&self) -> bool {
        self.pings.is_empty()
    }

    /// The switchover gate, to ask whether it is open.
    pub fn gate(&self) -> &SourceGate {
        &self.gate
    }

    /// The switchover gate, to tell of requests and of the guest's state.
    pub fn gate_mut(&mut self) -> &mut SourceGate {
        &mut self.gate
    }

    /// `MIG_CMD_PING` goes out.
    ///
    /// # Errors
    /// [`SessionError::Order`] after SHUT: no answer will come.
    pub fn ping(&mut self, value: u32) -> Result<(), SessionError> {
        self.running("PING")?;
        *self.pings.entry(value).or_default() += 1;
        Ok(())
    }

    /// Postcopy starts: `MIG_CMD_POSTCOPY_LISTEN`, with or without a package, goes out.
    ///
    /// # Errors
    /// [`SessionError::Order`] if the guest does not run at the source.
    pub fn postcopy_starts(&mut self) -> Result<(), SessionError> {
        match self.stage {
            Stage::Precopy => {
                self.stage = Stage::Postcopy;
                Ok(())
            }
            _ => Err(SessionError::Order { what: "start of postcopy", place: "comes outside of precopy" }),
        }
    }

    /// `MIG_CMD_RECV_BITMAP` for this block goes out.
    ///
    /// # Errors
    /// [`SessionError::Order`] outside of recovery, or if it was sent before.
    pub fn ask_bitmap(
        &mut self,
        block: CountedString,
        used_length: u64,
        pages: PageGeometry,
    ) -> Result<(), SessionError> {
        self.recovering("RECV_BITMAP")?;
        self.bitmaps.ask(block, used_length, pages)
    }

    /// `MIG_CMD_POSTCOPY_RESUME` goes out.
    ///
    /// # Errors
    /// [`SessionError::Order`] outside of recovery, or if bitmaps are missing.
    pub fn ask_resume(&mut self) -> Result<(), SessionError> {
        self.recovering("POSTCOPY_RESUME")?;
        if self.bitmaps.waiting().next().is_some() {
            return Err(SessionError::Order { what: "POSTCOPY_RESUME", place: "comes before all bitmaps are here" });
        }
        self.resume_asked = true;
        Ok(())
    }

    /// The last byte of the main channel is about to go out; from now on the destination may report success.
    ///
    /// # Errors
    /// [`SessionError::Order`] after SHUT.
    pub fn everything_sent(&mut self) -> Result<(), SessionError> {
        self.running("the end of the main channel")?;
        self.everything_sent = true;
        Ok(())
    }

    /// A message came.
    ///
    /// # Errors
    /// Every kind that names a message which is wrong at this time; the migration fails then (or pauses, in postcopy).
    pub fn message(&mut self, message: &Message) -> Result<Action, SessionError> {
        if self.stage == Stage::Shut {
            return Err(SessionError::AfterShut { message: message.message_type().name() });
        }
        match message {
            Message::Pong { value } => self.pong(*value),
            Message::ReqPages { .. } if self.stage == Stage::Precopy => Err(SessionError::RequestInPrecopy),
            Message::ReqPages { .. } => Ok(Action::Request),
            Message::RecvBitmap { block, len } => self.bitmaps.answer(block, *len).map(|()| Action::Bitmap),
            Message::ResumeAck if core::mem::take(&mut self.resume_asked) => {
                self.stage = Stage::Postcopy;
                Ok(Action::Resume)
            }
            Message::ResumeAck => Err(SessionError::ResumeAck),
            Message::SwitchoverAck => Ok(self.gate.ack().map(|()| Action::SwitchoverAck)?),
            Message::Shut { status: 0 } if !self.everything_sent => Err(SessionError::EarlyShut),
            Message::Shut { status } => {
                self.stage = Stage::Shut;
                Ok(if *status == 0 { Action::Complete } else { Action::Failed { status: *status } })
            }
        }
    }

    /// The return path was closed.
    ///
    /// # Errors
    /// [`SessionError::Ended`] if SHUT did not come. In [`Stage::Postcopy`] and [`Stage::Recovery`] the migration can
    /// be resumed on a new connection; in [`Stage::Precopy`] it has failed, and the guest goes on at the source.
    pub fn ended(&self) -> Result<(), SessionError> {
        match self.stage {
            Stage::Shut => Ok(()),
            _ => Err(SessionError::Ended { waiting: self.waiting() }),
        }
    }

    /// The error of a caller that has waited long enough.
    pub fn timed_out(&self) -> SessionError {
        SessionError::TimedOut { waiting: self.waiting() }
    }

    /// What has not come so far.
    pub fn waiting(&self) -> String {
        if self.stage == Stage::Shut {
            return "nothing is missing".into();
        }
        let mut missing = Vec::new();
        if let Some(waiting) = self.gate.waiting() {
            missing.push(waiting.to_string());
        }
        if !self.pings.is_empty() {
            let values: Vec<String> = self.pings.keys().map(|value| format!("{value:#x}")).collect();
            missing.push(format!("PONG {} is missing", values.join(", ")));
        }
        if let Some(block) = self.bitmaps.waiting().next() {
            missing.push(format!(
                "{} received bitmaps are missing, the first of '{block}'",
                self.bitmaps.waiting().count()
            ));
        }
        if self.resume_asked {
            missing.push("RESUME_ACK is missing".into());
        }
        if self.everything_sent || missing.is_empty() {
            missing.push("SHUT is missing".into());
        }
        missing.join("; ")
    }

    fn pong(&mut self, value: u32) -> Result<Action, SessionError> {
        let Some(open) = self.pings.get_mut(&value) else { return Err(SessionError::Pong { value }) };
        *open -= 1;
        if *open == 0 {
            self.pings.remove(&value);
        }
        Ok(Action::Pong { value })
    }

    fn recovering(&self, what: &'static str) -> Result<(), SessionError> {
        match self.stage {
            Stage::Recovery => Ok(()),
            _ => Err(SessionError::Order { what, place: "comes outside of recovery" }),
        }
    }

    fn running(&self, what: &'static str) -> Result<(), SessionError> {
        match self.stage {
            Stage::Shut => Err(SessionError::Order { what, place: "comes after the destination's last message" }),
            _ => Ok(()),
        }
    }
}
