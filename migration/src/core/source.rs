//! The source: which bytes and pages go out, when the guest is paused, and who has it in the end.
//!
//! The inputs of [`SourceCore`] are what was sent, what the dirty log has and what the guest reported; those of
//! [`Answers`] are the messages of the return path. The output is what to do next, one [`Action`] at a time, each with
//! the call that reports its result. The example `async_vmm` drives it with tokio, [`migrate`](crate::migrate) with
//! threads.
//!
//! ```
//! use qevm_migration::{Parameters, core::source::{Action, Answers, Sent, SourceCore, SourceOptions}};
//! use qevm_wire::{Profile, QemuVersion};
//! use std::time::Duration;
//!
//! let profile = Profile::new(QemuVersion::NEWEST, "microvm");
//! let options = SourceOptions::new(profile, "microvm", vec![("microvm.ram".into(), 64 << 20)]);
//! let mut core = SourceCore::new(options, Parameters::default());
//! let mut answers = Answers::new(None, true);
//! // The driver sends this on the main channel, and says so.
//! let Action::Send { .. } = core.poll(Duration::ZERO, Some(&mut answers)) else { panic!() };
//! let header = core.stream().take();
//! assert_eq!(&header[..8], b"QEVM\0\0\0\x03");
//! core.sent(Sent { bytes: header.len() as u64, ..Sent::default() });
//! assert!(matches!(core.poll(Duration::ZERO, Some(&mut answers)), Action::StartLog));
//! ```

mod action;
mod completion;
mod devices;
mod downtime;
mod ending;
mod opening;
mod options;
mod phase;
mod postcopy;
mod precopy;
mod recovery;
mod round;
mod snapshot;
#[cfg(test)]
mod tests;
mod told;

pub use super::answers::Answers;
pub use crate::connections::Reader;
pub use crate::pending::DeviceSize;
pub use action::{Action, Batch, BlockRange, DifferencePass, Sent, Wake};
pub use options::{PageRoute, SourceOptions};

use super::Sweep;
use crate::converge::{AutoConverge, Trigger};
use crate::pending::Account;
use crate::rate::RateLimiter;
use crate::statistics::RoundStatistics;
use crate::switchover::Bandwidth;
use crate::{MigrationError, Parameters, Pending, Statistics};
use devices::InitialData;
use phase::{Phase, Setup};
use qevm_multifd::{SourceSync, SyncError, SyncStep};
use qevm_savevm::{Encoder, StreamWriter};
use qevm_wire::{CountedString, Located, PageGeometry};
use std::collections::VecDeque;
use std::time::Duration;

/// The section id of `ram`; the devices' follow. QEMU's are registration numbers, and any will do.
const RAM_SECTION: u32 = 1;
/// Pages in one vectored write: a part for each page and one for the records before it, within `IOV_MAX`.
pub(crate) const BATCH_PAGES: u64 = 256;
/// Pages in one packet of a page channel (524288 bytes; QEMU 5.2 to 11.1).
const PACKET_PAGES: u64 = qevm_multifd::layout::PACKET_DATA / crate::PAGE_SIZE;
/// Zero pages on the main channel are sent when there are this many bytes of them.
const FLUSH_AT: usize = 64 << 10;

/// The guest is paused.
#[derive(Debug, Clone, Copy)]
struct Pause {
    /// When it was told to.
    since: Duration,
    /// Whether it ran before.
    was_running: bool,
}

/// The state machine of a source. All times are counted from the start of the migration.
#[derive(Debug)]
pub struct SourceCore {
    options: SourceOptions,
    parameters: Parameters,
    phase: Phase,
    /// What was decided and is not done.
    actions: VecDeque<Action>,
    stream: StreamWriter,
    sweep: Sweep,
    /// What the last reading of the dirty log found is not for this pass but for the next one.
    look_ahead: bool,
    /// Pages that were found dirty since the last pass began.
    found: u64,
    /// When the page channels synchronise.
    sync: SourceSync,
    limiter: RateLimiter,
    /// What it is reckoned with for the switchover, and what was sent.
    bandwidth: Bandwidth,
    throughput: Bandwidth,
    /// Pages that went as differences since the bandwidth was told.
    differences: u64,
    /// Bytes sent so far.
    transferred: u64,
    /// Bytes and time up to which [`Bandwidth`] was told.
    accounted: (u64, Duration),
    passes: u64,
    converge: AutoConverge,
    trigger: Trigger,
    throttled: bool,
    /// The limit of dirty rates that holds for this migration.
    limit: Option<u64>,
    account: Account,
    sizes: Vec<DeviceSize>,
    /// The iterative devices' names, for messages.
    names: Vec<String>,
    /// What the destination knows of them.
    initial: InitialData,
    /// Bytes of the last record of a device's state.
    record: u64,
    backlog: u64,
    /// Since when the destination of a guest that runs owes an answer.
    unanswered: Option<Duration>,
    pause: Option<Pause>,
    /// When the destination had the guest.
    gone_at: Option<Duration>,
    /// Up to when the pause is accounted for.
    pause_accounted: Option<Duration>,
    /// The guest's disks were left to the destination.
    inactive: bool,
    may_switch_over: bool,
    /// The operator wants the guest to go before its memory.
    postcopy: bool,
    /// It has gone so.
    departed: bool,
    /// The destination has loaded its devices: it may run from here on.
    package_loaded: bool,
    /// …and its status says so.
    is_active: bool,
    /// What was sent is given back to the host.
    releases: bool,
    /// The preempt channel was opened, and has come to its end.
    preempt: (bool, bool),
    /// The destination is one of this crate.
    agreed: bool,
    cancelled: bool,
    statistics: Statistics,
    /// Rounds that were reported.
    reported: usize,
}

impl SourceCore {
    /// A source that has sent nothing, at time 0.
    pub fn new(options: SourceOptions, parameters: Parameters) -> Self {
        let profile = &options.profile;
        let pages = PageGeometry::X86;
        // Of what is not sent there are no pages.
        let count =
            |(block, (_, len)): (usize, &(String, u64))| if options.leaves_out(block) { 0 } else { pages.index(*len) };
        SourceCore {
            stream: StreamWriter::new(Encoder::new(pages), profile.send_section_footer),
            sweep: Sweep::new(options.blocks.iter().enumerate().map(count)),
            sync: SourceSync::new(profile),
            limiter: RateLimiter::new(parameters.max_bandwidth, Duration::ZERO),
            account: Account::new(options.devices.len()),
            sizes: vec![DeviceSize::default(); options.devices.len()],
            names: options.devices.iter().map(|device| device.name.clone()).collect(),
            initial: InitialData::default(),
            options,
            parameters,
            phase: Phase::Setup(Setup::Begin),
            actions: VecDeque::new(),
            look_ahead: false,
            found: 0,
            bandwidth: Bandwidth::default(),
            throughput: Bandwidth::default(),
            differences: 0,
            transferred: 0,
            accounted: (0, Duration::ZERO),
            passes: 0,
            converge: AutoConverge::default(),
            trigger: Trigger::default(),
            throttled: false,
            limit: None,
            record: 0,
            backlog: 0,
            unanswered: None,
            pause: None,
            gone_at: None,
            pause_accounted: None,
            inactive: false,
            may_switch_over: false,
            postcopy: false,
            departed: false,
            package_loaded: false,
            is_active: false,
            releases: false,
            preempt: (false, false),
            agreed: false,
            cancelled: false,
            statistics: Statistics::default(),
            reported: 0,
        }
    }

    /// What to do next, `now`; what the action before is answered with has to be told before. `answers` is what the
    /// return path has said, if there is one. Errors of the driver's go to [`failed`](Self::failed); how the migration
    /// ended comes with [`Action::End`].
    pub fn poll(&mut self, now: Duration, mut answers: Option<&mut Answers>) -> Action {
        loop {
            if let Some(action) = self.actions.pop_front() {
                return action;
            }
            self.account_for_pause(now);
            if let Err(error) = self.advance(now, answers.as_deref_mut()) {
                // Whatever fails: the destination may have said before that it can run the guest.
                if let Some(answers) = answers.as_deref() {
                    self.note_package(answers);
                }
                self.fail(error, now, answers.is_some());
            }
        }
    }

    /// How far the migration is.
    #[cfg(test)]
    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The parameters have changed.
    pub fn set_parameters(&mut self, parameters: Parameters) {
        self.parameters = parameters;
    }

    /// The operator has cancelled.
    pub fn cancel(&mut self) {
        self.cancelled = true;
    }

    /// The operator lets the switchover happen.
    pub fn let_switch_over(&mut self) {
        self.may_switch_over = true;
    }

    /// Whether a RAM block is not sent, because the destination has it (capability `x-ignore-shared`).
    pub fn leaves_out(&self, block: usize) -> bool {
        self.options.leaves_out(block)
    }

    /// What is to be sent on the main channel, before the pages of a batch. The sender clears it.
    pub fn stream(&mut self) -> &mut StreamWriter {
        &mut self.stream
    }

    /// Brings what is reported of the migration up to date.
    pub fn report(&mut self, to: &mut Statistics) {
        let Statistics { status, total_time, stopped_at, error, xbzrle, .. } = to;
        let (status, total_time, stopped_at, error, xbzrle) =
            (*status, *total_time, *stopped_at, error.take(), *xbzrle);
        let mut rounds = std::mem::take(&mut to.rounds);
        rounds.extend_from_slice(self.statistics.rounds.get(self.reported..).unwrap_or_default());
        self.reported = self.statistics.rounds.len();
        let own = std::mem::take(&mut self.statistics.rounds);
        *to = Statistics { status, total_time, stopped_at, error, xbzrle, rounds, ..self.statistics.clone() };
        self.statistics.rounds = own;
    }

    fn advance(&mut self, now: Duration, mut answers: Option<&mut Answers>) -> Result<(), MigrationError> {
        if self.phase.may_be_cancelled() {
            self.check(answers.as_deref_mut())?;
        }
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Setup(step) => self.open(step, now, answers),
            Phase::Precopy(precopy, step) => self.pass(precopy, step, now, answers),
            Phase::AwaitAck { until, precopy } => self.await_ack(precopy, until, now, answers),
            Phase::Stopping => self.stopping(),
            Phase::PreSwitchover => self.pre_switchover(now),
            Phase::Stopped(step) => self.stopped(step),
            Phase::Completing(rest) => self.complete(rest, now, answers),
            Phase::Postcopy(step) => self.go_first(step, now, answers),
            Phase::Snapshot(step) => self.snapshot(step, now),
            Phase::AwaitAnswers { devices, since } => self.await_answers(devices, since, now, answers),
            // `end_sent` is what ends this.
            Phase::Ending => Err(self.unsettled("it is not known how much of the end of the stream was sent")),
            Phase::AwaitVerdict { sent, since, heard_out } => self.await_verdict(sent, since, heard_out, now, answers),
            Phase::Settling(result) => self.settling(result),
            Phase::Committing { unsettled, committed } => self.committing(unsettled, committed, now, answers),
            Phase::Confirming { sent, deadline } => self.confirming(sent, deadline, now, answers),
            Phase::AwaitExplanation { error, until } => {
                self.await_explanation(error, until, now, answers);
                Ok(())
            }
            Phase::BackOut { error, back } => {
                self.back_out(error, back);
                Ok(())
            }
            Phase::HandedOver => {
                self.hand_over();
                Ok(())
            }
            Phase::Over => {
                self.do_next(Action::End(Ok(())));
                Ok(())
            }
        }
    }

    fn do_next(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn wait(&mut self, until: Option<Duration>, wake: Wake) {
        self.do_next(Action::Wait { until, wake });
    }

    fn check(&mut self, answers: Option<&mut Answers>) -> Result<(), MigrationError> {
        self.agreed |= answers.as_ref().is_some_and(|answers| answers.agreed());
        if self.cancelled {
            return Err(MigrationError::Cancelled);
        }
        answers.map_or(Ok(()), Answers::failure)
    }

    /// The next batch of a sweep, of up to `limit` pages; none at its end. `reset` is whether the guest may write to
    /// them meanwhile.
    fn batch(&mut self, limit: u64, reset: bool) -> Result<Option<Batch>, MigrationError> {
        let route = self.options.route;
        let most = if matches!(route, PageRoute::Main | PageRoute::File) { BATCH_PAGES } else { PACKET_PAGES };
        let mut left = limit.clamp(1, most);
        let mut batch = Batch { differences: self.difference_pass(), ..Batch::default() };
        while left > 0 {
            if let Some(first) = batch.runs.first() {
                let same_block = self.sweep.next_block() == Some(first.block);
                match route {
                    // The next block may be in huge pages.
                    PageRoute::Main if self.departed && !same_block => break,
                    PageRoute::Main => {}
                    PageRoute::File => break,
                    // A packet holds pages of one block.
                    PageRoute::Channels | PageRoute::FileByThreads if same_block => {}
                    PageRoute::Channels | PageRoute::FileByThreads => break,
                }
            }
            let Some(run) = self.sweep.take(left, reset.then_some(&mut batch.resets)) else { break };
            left -= run.pages.end - run.pages.start;
            batch.runs.push(run);
        }
        if batch.runs.is_empty() {
            return Ok(None);
        }
        if self.has_page_channels() {
            self.sync.pages().map_err(synchronisation)?;
        }
        Ok(Some(batch))
    }

    /// In the first pass there is nothing yet to differ from, and a guest that has gone takes pages in full alone.
    fn difference_pass(&self) -> Option<DifferencePass> {
        let possible = self.options.capabilities.xbzrle && self.options.route == PageRoute::Main && !self.departed;
        (possible && self.passes > 1).then_some(DifferencePass { number: self.passes, last: self.pause.is_some() })
    }

    fn has_page_channels(&self) -> bool {
        matches!(self.options.route, PageRoute::Channels | PageRoute::FileByThreads)
    }

    /// Synchronises the page channels with the main channel as is due at a moment; without page channels it is the end
    /// of the section.
    fn synchronise(
        &mut self,
        moment: fn(&mut SourceSync) -> Result<&'static [SyncStep], SyncError>,
    ) -> Result<(), MigrationError> {
        for step in moment(&mut self.sync).map_err(synchronisation)? {
            match step {
                SyncStep::Eos => self.stream.eos()?,
                SyncStep::SyncChannels if self.has_page_channels() => self.do_next(Action::SyncChannels),
                SyncStep::Flush if self.options.route == PageRoute::Channels => self.stream.multifd_flush()?,
                // In a file the threads have synchronised, and no peer reads along.
                SyncStep::SyncChannels | SyncStep::Flush => {}
            }
        }
        Ok(())
    }

    /// Tells the bandwidth estimate what was sent since the last time.
    fn account_for(&mut self, now: Duration) {
        let (bytes, time) = (self.transferred - self.accounted.0, now.saturating_sub(self.accounted.1));
        self.accounted = (self.transferred, now);
        let differences = std::mem::take(&mut self.differences).saturating_mul(PageGeometry::X86.size());
        if differences > bytes {
            self.bandwidth.add_differences(bytes.saturating_add(differences), time);
        } else {
            self.bandwidth.add(bytes, time);
        }
        self.throughput.add(bytes, time);
        if let Some(estimate) = self.throughput.estimate() {
            let ram = &mut self.statistics.ram;
            ram.mbps = estimate as f64 * 8.0 / 1e6;
            ram.pages_per_second = estimate / PageGeometry::X86.size();
        }
    }

    /// Names and remaining bytes of every block.
    fn remaining(&self) -> impl Iterator<Item = (&str, u64)> {
        let bytes = self.sweep.remaining().map(|pages| pages * PageGeometry::X86.size());
        self.options.blocks.iter().map(|(name, _)| name.as_str()).zip(bytes)
    }

    fn remaining_bytes(&self) -> u64 {
        self.remaining().map(|(_, bytes)| bytes).sum()
    }
}

fn synchronisation(error: SyncError) -> MigrationError {
    MigrationError::Packet(Located::new(error.into(), 0))
}

fn idstr(name: &str) -> Result<CountedString, MigrationError> {
    CountedString::new(name).ok_or_else(|| MigrationError::Guest {
        doing: "name a section or RAM block",
        source: format!("'{name}' is not 1 to 255 bytes long").into(),
    })
}
