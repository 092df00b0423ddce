//! The guest goes before its memory: its devices in a package, and then the pages, those first that it waits for.
//!
//! A destination runs the guest when it has the whole package. As long as that was not sent to its last byte, the guest
//! can go on here; after that, never again. A connection that is lost then is replaced by another (`recovery`).

use super::phase::{Phase, Postcopy};
use super::{Action, Answers, Batch, BlockRange, PageRoute, RAM_SECTION, Reader, SourceCore, Sweep, Wake, idstr};
use crate::core::answers::PACKAGE_LOADED;
use crate::{MigrationError, PAGE_SIZE, Refused, ReturnPathError, SavedDevices, Status};
use qevm_multifd::SourceSync;
use qevm_returnpath::requests::{RequestBlock, RequestBlocks};
use qevm_savevm::command::{Command, DiscardRange, RamDiscard};
use qevm_savevm::framing::SectionHeader;
use qevm_wire::Located;
use std::time::Duration;

/// Values of the PINGs before the package, in it, and after it.
const BEFORE: u32 = 2;
const INSIDE: u32 = 3;
const AFTER: u32 = 4;
/// Pages in a batch of the background push. A requested page waits for the batch before it.
const AT_A_TIME: u64 = 32;

impl SourceCore {
    /// The operator lets the guest go before its memory does (`migrate-start-postcopy`): it runs at the destination as
    /// soon as its devices are there.
    ///
    /// # Errors
    /// [`Refused::PostcopyOff`] without capability `postcopy-ram`; [`Refused::Blocked`] if pages go to a file, no
    /// destination can ask for them, or a device sends its state in parts.
    pub fn start_postcopy(&mut self) -> Result<(), Refused> {
        if !self.options.capabilities.postcopy_ram {
            return Err(Refused::PostcopyOff);
        }
        if matches!(self.options.route, PageRoute::File | PageRoute::FileByThreads) {
            return Err(Refused::Blocked("Postcopy needs a destination that takes guest memory".into()));
        }
        if self.options.reader == Reader::Nobody {
            return Err(Refused::Blocked("Postcopy needs a destination that asks for pages".into()));
        }
        if let Some(device) = self.options.devices.first() {
            return Err(Refused::Blocked(format!(
                "Device '{}' sends its state in parts, and cannot go with postcopy",
                device.idstr
            )));
        }
        self.postcopy = true;
        Ok(())
    }

    /// Whether the guest may go now: the operator wants it, and the destination listens.
    pub(super) fn postcopy_may_start(&self, answers: Option<&Answers>) -> bool {
        self.postcopy && self.passes > 0 && answers.is_some_and(|answers| answers.unready().is_none())
    }

    /// Opens the preempt channel if there is to be one. False if there is nothing to do.
    pub(super) fn open_preempt(&mut self) -> bool {
        let open = self.options.capabilities.postcopy_preempt && !self.preempt.0;
        if open {
            self.preempt.0 = true;
            self.do_next(Action::OpenPreempt);
        }
        open
    }

    /// The guest goes, and then its memory.
    pub(super) fn go_first(
        &mut self,
        step: Postcopy,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let step = match step {
            Postcopy::Lost(error) => {
                self.do_next(Action::Close);
                self.do_next(Action::AwaitConnection { why: error.to_string() });
                self.phase = Phase::Postcopy(Postcopy::Paused(error));
                return Ok(());
            }
            Postcopy::Paused(error) => {
                self.phase = Phase::BackOut { error, back: None };
                return Ok(());
            }
            step => step,
        };
        let Some(answers) = answers else { return Err(MigrationError::NoVerdict) };
        self.take_back(answers);
        self.proceed(step, now, answers)?;
        let serves = matches!(self.phase, Phase::Postcopy(Postcopy::Serve | Postcopy::Sent));
        if serves && self.preempt == (true, false) {
            answers.lend(std::mem::replace(&mut self.sweep, Sweep::new(std::iter::empty())));
        }
        Ok(())
    }

    /// The pages that are still here, of which others may have sent some.
    pub(super) fn take_back(&mut self, answers: &mut Answers) {
        if let Some(left) = answers.take_back() {
            self.sweep = left;
        }
        let (sent, gone) = answers.take_urgent();
        self.sent(sent);
        if !gone.is_empty() {
            self.release(gone);
        }
    }

    fn proceed(&mut self, step: Postcopy, now: Duration, answers: &mut Answers) -> Result<(), MigrationError> {
        if self.departed {
            self.note_package(answers);
            answers.failure()?;
            answers.urgent_failure()?;
            self.statistics.ram.postcopy_requests = answers.requested();
            if self.package_loaded && !self.is_active {
                self.is_active = true;
                self.do_next(Action::Status(Status::PostcopyActive));
                if self.options.capabilities.release_ram {
                    // Not before: a destination that fails to load the devices gives the guest back.
                    self.releases = true;
                    self.do_next(Action::Release(self.sweep.gone().collect()));
                }
                self.phase = Phase::Postcopy(step);
                return Ok(());
            }
        }
        let next = match step {
            Postcopy::Begin(devices) => {
                // From this notice on it is too late to cancel.
                self.do_next(Action::Status(Status::PostcopyDevice));
                self.do_next(Action::Commit);
                Postcopy::Committing { devices, committed: None }
            }
            Postcopy::Committing { devices, committed } => {
                committed.unwrap_or(Ok(()))?;
                self.leave_channels()?;
                if self.options.profile.switchover_start {
                    self.stream.command(Command::SwitchoverStart)?;
                }
                self.discard()?;
                self.stream.command(answers.ping(BEFORE)?)?;
                self.package(&devices, answers)?;
                answers.postcopy_starts(self.request_blocks()?)?;
                self.do_next(Action::Send { doing: "the package of the devices" });
                Postcopy::Departed
            }
            Postcopy::Departed => {
                self.departed = true;
                self.gone_at = Some(now);
                self.statistics.downtime = self.pause.map(|pause| now.saturating_sub(pause.since));
                self.statistics.ram.downtime_bytes = self.transferred.saturating_sub(self.statistics.ram.precopy_bytes);
                self.limiter.set_limit(self.parameters.max_postcopy_bandwidth);
                self.do_next(Action::StopLog);
                self.stream.command(answers.ping(AFTER)?)?;
                self.serve_requests();
                Postcopy::Serve
            }
            Postcopy::Serve => self.serve(now, answers)?,
            Postcopy::Sent => {
                self.stream.eos()?;
                self.stream.footer()?;
                Postcopy::Serve
            }
            Postcopy::Ending(sent) => {
                sent.unwrap_or(Ok(()))?;
                Postcopy::AwaitShut { since: now }
            }
            Postcopy::AwaitShut { since } if !answers.has_verdict() => {
                self.phase = Phase::Postcopy(Postcopy::AwaitShut { since });
                return self.keep_waiting(since, now, answers, Status::PostcopyActive);
            }
            Postcopy::AwaitShut { .. } => {
                answers.verdict()?;
                self.succeed(now);
                return Ok(());
            }
            Postcopy::Recover(step) => self.recover(step, now, answers)?,
            // They were above.
            Postcopy::Lost(error) | Postcopy::Paused(error) => return Err(error),
        };
        self.phase = Phase::Postcopy(next);
        Ok(())
    }

    /// Sees whether the destination has loaded the devices. One that does not say so runs the guest from the start, as
    /// far as is known.
    pub(super) fn note_package(&mut self, answers: &Answers) {
        self.package_loaded |=
            self.departed && (answers.package_loaded() || !self.options.profile.postcopy_package_ping);
    }

    /// What page channels carry has to be there before any of it is called old. They are not used again (10.1 to 11.1).
    fn leave_channels(&mut self) -> Result<(), MigrationError> {
        if self.options.route == PageRoute::Channels {
            self.stream.section_part(RAM_SECTION)?;
            self.synchronise(SourceSync::before_postcopy)?;
            self.stream.footer()?;
            self.do_next(Action::LeaveChannels);
            self.options.route = PageRoute::Main;
        }
        Ok(())
    }

    /// Sends pages: one that the guest waits for, or else the next few.
    fn serve(&mut self, now: Duration, answers: &mut Answers) -> Result<Postcopy, MigrationError> {
        let mut requests = std::iter::from_fn(|| answers.next_request());
        let requested = requests.find_map(|request| self.sweep.take_request(request));
        let batch = match requested {
            Some(run) if self.preempt.0 => {
                self.do_next(Action::UrgentPages(Batch { runs: vec![run.clone()], ..Batch::default() }));
                self.release(vec![run]);
                return Ok(Postcopy::Serve);
            }
            Some(run) => Batch { runs: vec![run], ..Batch::default() },
            None if self.sweep.is_over() && answers.urgent_is_going() => {
                self.wait(None, Wake::Answers);
                return Ok(Postcopy::Serve);
            }
            None if self.sweep.is_over() && self.preempt == (true, false) && self.options.profile.preempt_pre_7_2 => {
                self.preempt.1 = true;
                self.do_next(Action::EndPreempt);
                return Ok(Postcopy::Serve);
            }
            None if self.sweep.is_over() => {
                self.stream.section_end(RAM_SECTION)?;
                self.stream.eos()?;
                self.stream.footer()?;
                self.stream.eof()?;
                answers.everything_is_sent()?;
                self.do_next(Action::SendEnd);
                return Ok(Postcopy::Ending(None));
            }
            None => {
                self.limiter.set_limit(self.parameters.max_postcopy_bandwidth);
                let pages = self.limiter.allowance(now) / PAGE_SIZE;
                if pages == 0 {
                    // What comes between a decision to wait and the wait would not be heard.
                    if !self.stream.bytes().is_empty() {
                        self.do_next(Action::Send { doing: "the end of a RAM section" });
                        return Ok(Postcopy::Serve);
                    }
                    self.wait(Some(now + self.limiter.wait(now)), Wake::Answers);
                    return Ok(Postcopy::Serve);
                }
                self.push(pages.min(AT_A_TIME))?
            }
        };
        self.stream.section_part(RAM_SECTION)?;
        let runs = batch.runs.clone();
        self.do_next(Action::Pages(batch));
        self.release(runs);
        Ok(Postcopy::Sent)
    }

    /// Lets others send what the guest waits for, if that does not go on the main channel.
    pub(super) fn serve_requests(&mut self) {
        if self.preempt == (true, false) {
            self.do_next(Action::ServeRequests);
        }
    }

    /// These pages were sent.
    fn release(&mut self, runs: Vec<BlockRange>) {
        if self.releases {
            self.do_next(Action::Release(runs));
        }
    }

    /// The next few pages, or one that is huge: the destination has it when all of it has come, one part after the
    /// other.
    fn push(&mut self, limit: u64) -> Result<Batch, MigrationError> {
        let huge = |(block, page)| {
            Some((block, page, self.options.host_page_size(block) / PAGE_SIZE)).filter(|huge| huge.2 > 1)
        };
        let Some((block, page, pages)) = self.sweep.next_page().and_then(huge) else {
            return Ok(self.batch(limit, false)?.unwrap_or_default());
        };
        let first = page / pages * pages;
        Ok(Batch { runs: self.sweep.take_at(block, first..first + pages).into_iter().collect(), ..Batch::default() })
    }

    /// A page of the host of which a part is to be sent is sent as a whole.
    pub(super) fn widen(&mut self) {
        for block in 0..self.options.blocks.len() {
            self.sweep.widen(block, self.options.host_page_size(block) / PAGE_SIZE);
        }
        self.statistics.ram.remaining = self.remaining_bytes();
    }

    /// What the destination has of these pages is old, or nothing.
    fn discard(&mut self) -> Result<(), MigrationError> {
        self.widen();
        let runs: Vec<_> = self.sweep.runs().collect();
        for of_block in runs.chunk_by(|a, b| a.block == b.block) {
            for some in of_block.chunks(RamDiscard::MAX_RANGES_WRITTEN) {
                let range = |run: &BlockRange| DiscardRange {
                    start: run.pages.start * PAGE_SIZE,
                    len: (run.pages.end - run.pages.start) * PAGE_SIZE,
                };
                let block = idstr(&self.options.blocks[some[0].block].0)?;
                let ranges = some.iter().map(range).collect();
                self.stream.command(Command::RamDiscard(RamDiscard { block, ranges }))?;
            }
        }
        Ok(())
    }

    /// The devices, after which the guest runs.
    fn package(&mut self, devices: &SavedDevices, answers: &mut Answers) -> Result<(), MigrationError> {
        let mut package = self.stream.package_writer();
        package.command(Command::PostcopyListen)?;
        for (section_id, device) in (RAM_SECTION + 1..).zip(devices.sections()) {
            let (idstr, instance_id, version_id) = (device.idstr.clone(), device.instance_id, device.version_id);
            package.section_full(&SectionHeader { section_id, idstr, instance_id, version_id }, &device.body)?;
        }
        package.command(answers.ping(INSIDE)?)?;
        if self.options.profile.postcopy_package_ping {
            package.command(answers.ping(PACKAGE_LOADED)?)?;
        }
        package.command(Command::PostcopyRun)?;
        Ok(self.stream.package(package.bytes())?)
    }

    pub(super) fn request_blocks(&self) -> Result<RequestBlocks, MigrationError> {
        let block = |(index, (name, used_length)): (usize, &(String, u64))| {
            let page_size = self.options.host_page_size(index);
            Ok(RequestBlock { name: idstr(name)?, used_length: *used_length, page_size })
        };
        let blocks = self.options.blocks.iter().enumerate().map(block).collect::<Result<_, MigrationError>>()?;
        let blocks = RequestBlocks::new(blocks);
        Ok(blocks.map_err(|error| Located::new(ReturnPathError::from(error), 0))?)
    }
}
