//! What a destination has said on the return path, and what follows from it for the source.

use super::Sweep;
use super::source::{Batch, BlockRange, Sent};
use crate::{MigrationError, ReturnPathError, Status, handover};
use qevm_returnpath::requests::{PageRequest, PageRequests, RequestBlocks};
use qevm_returnpath::session::{Action, SourceSession};
use qevm_returnpath::switchover::SwitchoverAckFlow;
use qevm_returnpath::{Message, RequestError, SessionError, SwitchoverError};
use qevm_savevm::command::Command;
use qevm_wire::{CountedString, Located, PageGeometry};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;

/// Value of the PING after the devices in the package of postcopy, before RUN: its answer says that they are loaded
/// (10.2).
pub(crate) const PACKAGE_LOADED: u32 = 0x42;

/// The source's end of a return path. Its inputs are every PING that is sent, every message that arrives and the end of
/// the channel; it decides what the source may do.
#[derive(Debug)]
pub struct Answers {
    /// What may come, and what is missing.
    session: SourceSession,
    verdict: Verdict,
    /// Nothing more comes: how the destination closed.
    ended: Option<io::Result<()>>,
    /// The destination waits for a confirmation before it runs the guest.
    agreed: bool,
    /// The pages that the guest waits for at the destination, once it runs there.
    requests: Option<PageRequests>,
    /// How many requests have come.
    requested: u64,
    /// The pages that are still here, from when those that the guest waits for go over the preempt channel.
    left: Option<Sweep>,
    /// What of them was taken.
    urgent: Urgent,
    /// The destination has loaded the devices of a guest that goes before its memory.
    package_loaded: bool,
    /// Which pages of a block are at the destination, block by block.
    bitmaps: VecDeque<(CountedString, Vec<u8>)>,
    /// The destination goes on with a postcopy that was interrupted.
    resumed: bool,
    /// An ack of the switchover may come though it is not waited for: the capability may be on there.
    stray_ack: bool,
    /// The destination has said something.
    heard: bool,
}

/// What the thread that receives requests sends on the preempt channel.
#[derive(Debug, Default)]
struct Urgent {
    /// It is being sent.
    going: Option<BlockRange>,
    /// It was sent, and the core does not know.
    gone: Vec<BlockRange>,
    sent: Sent,
    failure: Option<MigrationError>,
}

/// How the migration ended at the destination, as far as it is known.
#[derive(Debug)]
enum Verdict {
    /// It has not said so.
    Missing,
    /// It has loaded everything.
    Loaded,
    /// It has failed, or the return path has. The reason is given once.
    Failed(Option<MigrationError>),
}

impl Answers {
    /// `flow` is how acks of the switchover are counted; `None` without `switchover-ack`. `asked_for` is false without
    /// `return-path`: a return path that is opened all the same must not fail a migration that would succeed without.
    pub fn new(flow: Option<SwitchoverAckFlow>, asked_for: bool) -> Self {
        Answers {
            session: SourceSession::new(flow),
            verdict: Verdict::Missing,
            ended: None,
            agreed: false,
            requests: None,
            requested: 0,
            left: None,
            urgent: Urgent::default(),
            package_loaded: false,
            bitmaps: VecDeque::new(),
            resumed: false,
            stray_ack: !asked_for,
            heard: false,
        }
    }

    /// The guest runs at the destination, the connection was lost, and another is there: what comes from here on comes
    /// over that.
    pub(super) fn reconnected(&mut self, blocks: RequestBlocks) {
        let requests = Some(PageRequests::new(blocks, crate::PAGE_SIZE));
        *self = Answers {
            session: SourceSession::recovery(),
            requests,
            requested: self.requested,
            package_loaded: true,
            ..Answers::new(None, true)
        };
    }

    /// This PING goes out.
    ///
    /// # Errors
    /// Why no answer will come: the destination's last message came before everything was sent.
    pub(crate) fn ping(&mut self, value: u32) -> Result<Command, MigrationError> {
        match self.session.ping(value) {
            Ok(()) => Ok(Command::Ping(value)),
            Err(_) => Err(self.early_verdict()),
        }
    }

    /// The end of the stream is about to go out: a good verdict is expected from here on.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub(crate) fn everything_is_sent(&mut self) -> Result<(), MigrationError> {
        let noted = self.session.everything_sent();
        noted.map_err(|_| self.early_verdict())
    }

    /// A device wants the destination to agree to the switchover.
    ///
    /// # Errors
    /// It wants that too late.
    pub(crate) fn request_ack(&mut self, device: &str) -> Result<(), MigrationError> {
        let requested = self.session.gate_mut().request(device);
        Ok(requested.map_err(|error| Located::new(ReturnPathError::from(SessionError::from(error)), 0))?)
    }

    /// A message came, which began at byte `offset` of the return path. Says whether it was the last that matters.
    pub fn message(&mut self, message: Message, offset: u64) -> bool {
        self.heard = true;
        let agrees = message == Message::Pong { value: handover::AGREED };
        let message = if agrees { Message::Pong { value: handover::ANNOUNCE } } else { message };
        match self.session.message(&message) {
            Ok(Action::Request) => {
                if let Err(error) = self.request(&message) {
                    self.fail(Located::new(ReturnPathError::from(error), offset).into());
                }
            }
            Ok(Action::Complete) => self.verdict = Verdict::Loaded,
            Ok(Action::Failed { status }) => self.fail(MigrationError::PeerFailed { status }),
            Err(SessionError::Switchover(SwitchoverError::Off)) if self.stray_ack => self.stray_ack = false,
            Err(error) => self.fail(Located::new(ReturnPathError::from(error), offset).into()),
            Ok(action) => {
                self.agreed |= agrees;
                self.package_loaded |= action == Action::Pong { value: PACKAGE_LOADED };
                self.resumed |= action == Action::Resume;
            }
        }
        self.has_verdict()
    }

    fn request(&mut self, message: &Message) -> Result<(), RequestError> {
        let (Some(requests), Message::ReqPages { block, start, len }) = (&mut self.requests, message) else {
            return Ok(());
        };
        self.requested += 1;
        requests.request(block.as_ref(), *start, *len).map(drop)
    }

    /// The bitmap that [`Message::RecvBitmap`] has announced has come, with its end.
    pub fn bitmap(&mut self, block: CountedString, bitmap: Vec<u8>) {
        self.bitmaps.push_back((block, bitmap));
    }

    /// The next bitmap that has come; given once.
    pub(super) fn take_bitmap(&mut self) -> Option<(CountedString, Vec<u8>)> {
        self.bitmaps.pop_front()
    }

    /// The destination is about to be asked which pages of a block it has.
    ///
    /// # Errors
    /// No postcopy is recovered, or it was asked before.
    pub(super) fn ask_bitmap(&mut self, block: CountedString, used_length: u64) -> Result<(), MigrationError> {
        Ok(self.session.ask_bitmap(block, used_length, PageGeometry::X86).map_err(misplaced)?)
    }

    /// The destination is about to be told that postcopy goes on.
    ///
    /// # Errors
    /// No postcopy is recovered, or not all is known of what the destination has.
    pub(super) fn ask_resume(&mut self) -> Result<(), MigrationError> {
        Ok(self.session.ask_resume().map_err(misplaced)?)
    }

    /// Whether the destination goes on.
    pub(super) fn has_resumed(&self) -> bool {
        self.resumed
    }

    /// How many requests for pages have come, with those that were repeated.
    pub(crate) fn requested(&self) -> u64 {
        self.requested
    }

    /// Whether the destination has loaded the devices that went before the memory.
    pub(crate) fn package_loaded(&self) -> bool {
        self.package_loaded
    }

    /// The guest is about to go before its memory: from here on the destination may ask for pages.
    ///
    /// # Errors
    /// It has gone before.
    pub(crate) fn postcopy_starts(&mut self, blocks: RequestBlocks) -> Result<(), MigrationError> {
        let started = self.session.postcopy_starts();
        started.map_err(|error| Located::new(ReturnPathError::from(error), 0))?;
        self.requests = Some(PageRequests::new(blocks, crate::PAGE_SIZE));
        Ok(())
    }

    /// The page that the guest has waited for longest; given once.
    pub(crate) fn next_request(&mut self) -> Option<PageRequest> {
        self.requests.as_mut()?.next_page()
    }

    /// From here on the thread that receives requests may take these pages.
    pub(super) fn lend(&mut self, left: Sweep) {
        self.left = Some(left);
    }

    /// The pages that were lent, without those that were taken.
    pub(super) fn take_back(&mut self) -> Option<Sweep> {
        self.left.take()
    }

    /// Pages that the guest waits for and that were not sent, after
    /// [`Action::ServeRequests`](super::source::Action::ServeRequests); given once, and no others before
    /// [`urgent_sent`](Self::urgent_sent). The thread that takes them sends them on the preempt channel.
    pub fn next_urgent(&mut self) -> Option<Batch> {
        let (left, requests) = (self.left.as_mut()?, self.requests.as_mut()?);
        if self.urgent.going.is_some() {
            return None;
        }
        let run = std::iter::from_fn(|| requests.next_page()).find_map(|request| left.take_request(request))?;
        self.urgent.going = Some(run.clone());
        Some(Batch { runs: vec![run], ..Batch::default() })
    }

    /// The pages of [`next_urgent`](Self::next_urgent) could not be sent. No others are given. The destination may
    /// still say why.
    pub fn urgent_failed(&mut self, error: MigrationError) {
        self.urgent.failure.get_or_insert(error);
    }

    /// Why pages could not be sent; given once.
    pub(super) fn urgent_failure(&mut self) -> Result<(), MigrationError> {
        self.urgent.failure.take().map_or(Ok(()), Err)
    }

    /// The pages of [`next_urgent`](Self::next_urgent) were sent. If they could not be:
    /// [`urgent_failed`](Self::urgent_failed).
    pub fn urgent_sent(&mut self, sent: Sent) {
        self.urgent.gone.extend(self.urgent.going.take());
        let total = &mut self.urgent.sent;
        total.bytes = total.bytes.saturating_add(sent.bytes);
        total.normal = total.normal.saturating_add(sent.normal);
        total.zero = total.zero.saturating_add(sent.zero);
    }

    /// Whether nothing is left of what was lent, so that the core has to be told.
    pub fn nothing_is_left(&mut self) -> bool {
        self.left.as_mut().is_none_or(Sweep::is_over)
    }

    /// What was sent on the preempt channel since this was asked last.
    pub(super) fn take_urgent(&mut self) -> (Sent, Vec<BlockRange>) {
        (std::mem::take(&mut self.urgent.sent), std::mem::take(&mut self.urgent.gone))
    }

    /// Whether something is being sent on the preempt channel.
    pub(super) fn urgent_is_going(&self) -> bool {
        self.urgent.going.is_some()
    }

    /// The return path cannot be read (further), or ended before the verdict.
    pub fn fail(&mut self, error: MigrationError) {
        self.verdict = Verdict::Failed(Some(error));
        self.ended = Some(Ok(()));
    }

    /// The destination closed after its verdict, in order or not.
    pub fn end(&mut self, how: io::Result<()>) {
        self.ended = Some(how);
    }

    /// Whether nothing more comes.
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// How the destination closed; given once.
    pub(crate) fn take_end(&mut self) -> Option<io::Result<()>> {
        self.ended.take()
    }

    /// Whether the destination or the return path has failed.
    pub fn has_failed(&self) -> bool {
        matches!(self.verdict, Verdict::Failed(_))
    }

    /// The failure that the destination or the return path reported, if there is one. It is given once.
    pub(crate) fn failure(&mut self) -> Result<(), MigrationError> {
        if self.has_failed() { self.verdict() } else { Ok(()) }
    }

    /// Whether the verdict has come.
    pub fn has_verdict(&self) -> bool {
        !matches!(self.verdict, Verdict::Missing)
    }

    /// The verdict. The reason of a failure is given once.
    ///
    /// # Errors
    /// Why there is no good one: the destination failed, the return path failed, or no verdict has come.
    pub(crate) fn verdict(&mut self) -> Result<(), MigrationError> {
        match &mut self.verdict {
            Verdict::Missing => Err(MigrationError::NoVerdict),
            Verdict::Loaded => Ok(()),
            Verdict::Failed(reason) => Err(reason.take().unwrap_or(MigrationError::NoVerdict)),
        }
    }

    /// What keeps the switchover from happening: nothing if the destination listens and its devices agree.
    pub(crate) fn unready(&self) -> Option<String> {
        match self.session.gate().waiting() {
            Some(acks) => Some(format!("the destination has not agreed to the switchover: {acks}")),
            None if self.session.is_answered() => None,
            None => Some(format!("the destination does not answer: {}", self.session.waiting())),
        }
    }

    /// The acks of the switchover that are missing although every PING was answered.
    pub(crate) fn disagreement(&self) -> Option<qevm_returnpath::switchover::AckWait> {
        self.session.gate().waiting().filter(|_| self.session.is_answered())
    }

    /// Whether every PING was answered.
    pub(crate) fn is_answered(&self) -> bool {
        self.session.is_answered()
    }

    /// Fails if not every PING was answered.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub(crate) fn answered(&mut self) -> Result<(), MigrationError> {
        if self.is_answered() { Ok(()) } else { Err(self.early_verdict()) }
    }

    /// Whether the destination waits for a confirmation before it runs the guest.
    pub(crate) fn agreed(&self) -> bool {
        self.agreed
    }

    /// The error of a source that has waited long enough, with what is missing.
    pub(crate) fn overdue(&self, waited: Duration, status: Status, parameter: &'static str) -> MigrationError {
        MigrationError::Unanswered { missing: self.session.waiting(), waited, status, parameter }
    }

    /// Whether the destination has said anything at all.
    pub(crate) fn heard(&self) -> bool {
        self.heard
    }

    /// What explains why the main channel broke: what the destination reported, or how it broke the rules, or the TLS
    /// session.
    pub(crate) fn explanation(&mut self) -> Option<MigrationError> {
        match self.verdict() {
            Err(error @ (MigrationError::PeerFailed { .. } | MigrationError::ReturnPathMessage(_))) => Some(error),
            Err(error @ MigrationError::ReturnPath(_)) if error.is_of_tls() => Some(error),
            _ => None,
        }
    }

    /// The verdict of a destination that has given one before it had everything, which cannot be a good one.
    fn early_verdict(&mut self) -> MigrationError {
        self.verdict().err().unwrap_or(MigrationError::NoVerdict)
    }
}

fn misplaced(error: SessionError) -> Located<ReturnPathError> {
    Located::new(error.into(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_returnpath::MessageType;

    fn answers() -> Answers {
        let mut answers = Answers::new(None, true);
        for value in [1, handover::ANNOUNCE] {
            assert_eq!(answers.ping(value).unwrap(), Command::Ping(value));
        }
        answers
    }

    fn pong(value: u32) -> Message {
        Message::Pong { value }
    }

    #[test]
    fn the_switchover_waits_for_every_answer_and_an_agreement_is_one() {
        let mut answers = answers();
        assert!(answers.unready().unwrap().contains("PONG 0x1, 0x51454801"));
        assert!(!answers.message(pong(1), 0) && !answers.is_answered());
        assert!(!answers.message(pong(handover::AGREED), 8));
        assert!(answers.agreed() && answers.unready().is_none());
        answers.answered().unwrap();
    }

    #[test]
    fn a_pong_that_was_not_asked_for_fails_the_migration_with_its_place() {
        let mut answers = answers();
        assert!(answers.message(pong(handover::CONFIRM), 16));
        assert!(answers.has_failed() && answers.has_ended());
        let Err(MigrationError::ReturnPathMessage(error)) = answers.failure() else { panic!("{answers:?}") };
        let expected = SessionError::Pong { value: handover::CONFIRM };
        assert_eq!((error.offset, error.kind), (16, ReturnPathError::Session(expected)));
        assert!(matches!(answers.verdict(), Err(MigrationError::NoVerdict)), "the reason is given once");
    }

    #[test]
    fn success_counts_only_after_everything_was_sent() {
        let shut = |status| Message::Shut { status };
        let mut early = answers();
        assert!(early.message(shut(0), 0));
        let Err(MigrationError::ReturnPathMessage(error)) = early.verdict() else { panic!("{early:?}") };
        assert_eq!(error.kind, ReturnPathError::Session(SessionError::EarlyShut));

        let mut answers = answers();
        answers.everything_is_sent().unwrap();
        assert!(answers.message(shut(0), 0) && !answers.has_failed() && !answers.has_ended());
        answers.verdict().unwrap();
        answers.end(Err(io::ErrorKind::ConnectionReset.into()));
        assert_eq!(answers.take_end().unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn after_a_failure_nothing_more_can_be_asked() {
        let mut answers = answers();
        assert!(answers.message(Message::Shut { status: 7 }, 0));
        assert!(matches!(answers.ping(3), Err(MigrationError::PeerFailed { status: 7 })));
        assert!(matches!(answers.everything_is_sent(), Err(MigrationError::NoVerdict)));
        assert!(answers.explanation().is_none(), "it was given already");
    }

    #[test]
    fn one_stray_ack_is_forgiven_where_no_return_path_was_asked_for() {
        for (asked_for, forgiven) in [(true, 0), (false, 1)] {
            let mut answers = Answers::new(None, asked_for);
            for _ in 0..forgiven {
                assert!(!answers.message(Message::SwitchoverAck, 0));
            }
            assert!(answers.message(Message::SwitchoverAck, 8), "{}", MessageType::SwitchoverAck.name());
            let Err(MigrationError::ReturnPathMessage(error)) = answers.failure() else { panic!("{answers:?}") };
            assert_eq!(error.kind, ReturnPathError::Session(SwitchoverError::Off.into()));
        }
    }
}
