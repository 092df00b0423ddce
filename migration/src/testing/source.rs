//! A driver of the source's core, over simulated links.

mod recovery;
mod send;

use super::memory::{BLOCKS, PAGE};
use super::page_sender::{PageSender, Work};
use super::{Link, Memory, Plan, Plant, Random};
use crate::core::source::{Action, Answers, BlockRange, PageRoute, Reader, Sent, SourceCore, SourceOptions, Wake};
use crate::multifd::Settings;
use crate::{Capabilities, DeviceSection, MigrationError, Parameters, ReturnPathError, SavedDevices, Status};
use qevm_returnpath::{Decoder, Event, Message};
use qevm_wire::{CountedString, Decode, Profile, Step, Writer};
use send::{FollowUp, Page};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;

/// How long the source waits for the destination's answers and its verdict.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// When the operator no longer minds how long the guest is paused.
const HURRY: Duration = Duration::from_secs(60);
/// Most that the guest writes to between two steps.
const WRITES: u64 = 20;

/// The source's end.
pub(super) struct Source {
    pub(super) memory: Memory,
    /// How often the guest has worked: the state of its device.
    pub(super) work: u64,
    /// The guest runs here.
    pub(super) runs: bool,
    /// How the migration ended.
    pub(super) result: Option<Result<(), MigrationError>>,
    /// Some of the end of the stream was sent.
    pub(super) ended: bool,
    /// Most bytes that the core had for the main channel.
    pub(super) most: usize,
    /// The page whose content a flip on the main channel has struck.
    struck: Option<usize>,
    /// Page channels that are used.
    channels: u8,
    /// Pages that were given back to the host, and whether one of them was needed after that.
    released: Vec<bool>,
    needed: bool,
    pages: PageSender,
    core: SourceCore,
    answers: Option<Answers>,
    decoder: Decoder,
    heard: Vec<u8>,
    /// Something came on the return path, or its end, since the core was asked last.
    news: bool,
    doing: Doing,
    /// What is to be sent on the main channel: bytes, and then pages.
    queue: Writer,
    batch: VecDeque<Page>,
    plan: Plan,
    parameters: Parameters,
    random: Random,
    /// When the guest worked last.
    worked: Duration,
    /// The connections were shut down.
    closed: bool,
    cancelled: bool,
    /// It is too late to cancel.
    committed: bool,
    /// When the operator lets the switchover happen.
    continue_at: Option<Duration>,
    /// When the operator starts postcopy.
    postcopy: Option<Duration>,
    /// The block whose bitmap comes next.
    bitmap: Option<CountedString>,
}

/// What was begun and is not done.
enum Doing {
    /// Nothing.
    Idle,
    Waiting {
        until: Option<Duration>,
        wake: Wake,
    },
    Sending(FollowUp),
    /// Pages wait for room among those of the page channels.
    Pushing(Work),
    Synchronising,
    Settling,
    /// Another connection is waited for.
    Interrupted,
    Over,
}

impl Source {
    pub(super) fn new(plan: &Plan) -> Result<Self, MigrationError> {
        let mut random = Random::new(plan.seed ^ 0x50);
        let mut memory = Memory::new(&plan.blocks);
        (0..2 * memory.pages()).for_each(|_| memory.work(&mut random));
        let profile = Profile::new(plan.qemu, "microvm");
        let flow = profile.switchover_ack.filter(|_| plan.switchover_ack);
        let capabilities = Capabilities {
            return_path: plan.return_path,
            multifd: plan.channels > 0,
            switchover_ack: flow.is_some(),
            pause_before_switchover: plan.pause.is_some(),
            postcopy_ram: plan.postcopy.is_some(),
            release_ram: plan.release,
            ..Capabilities::default()
        };
        let parameters = Parameters {
            max_bandwidth: plan.bandwidth,
            max_postcopy_bandwidth: plan.bandwidth,
            downtime_limit_ms: plan.downtime.as_millis() as u64,
            multifd_channels: plan.channels.max(1),
            ..Parameters::default()
        };
        let settings = Settings::of(Capabilities { multifd: true, ..capabilities }, &parameters, &profile);
        let settings = settings.ok_or(MigrationError::NoVerdict)?;
        let options = SourceOptions {
            profile,
            capabilities,
            machine_type: "microvm".into(),
            uuid: None,
            blocks: BLOCKS
                .iter()
                .zip(&plan.blocks)
                .map(|(name, pages)| (name.to_string(), (pages * PAGE) as u64))
                .collect(),
            host_page_sizes: Vec::new(),
            shared: Vec::new(),
            devices: Vec::new(),
            route: if plan.channels > 0 { PageRoute::Channels } else { PageRoute::Main },
            reader: if plan.return_path { Reader::Answers } else { Reader::Silent },
            patience: Some(PATIENCE),
        };
        let names = BLOCKS.iter().map(|block| name(block)).collect::<Result<_, _>>()?;
        Ok(Source {
            released: vec![false; memory.pages()],
            needed: false,
            channels: plan.channels,
            memory,
            work: 0,
            runs: true,
            result: None,
            ended: false,
            most: 0,
            struck: None,
            pages: PageSender::new(plan, &settings, names)?,
            core: SourceCore::new(options, parameters.clone()),
            answers: plan.return_path.then(|| Answers::new(flow, true)),
            decoder: Decoder::default(),
            heard: Vec::new(),
            news: false,
            doing: Doing::Idle,
            queue: Writer::new(),
            batch: VecDeque::new(),
            plan: plan.clone(),
            parameters,
            random,
            worked: Duration::ZERO,
            closed: false,
            cancelled: false,
            committed: false,
            continue_at: None,
            postcopy: plan.postcopy,
            bitmap: None,
        })
    }

    /// The page whose content a flip on this link has struck.
    pub(super) fn struck(&self, link: usize) -> Option<usize> {
        link.checked_sub(1).map_or(self.struck, |channel| self.pages.struck(channel))
    }

    /// Whether memory was given back to the host that is needed here.
    pub(super) fn misses_memory(&self) -> bool {
        self.needed || (self.runs && self.released.contains(&true))
    }

    /// Whether there is nothing more to do.
    pub(super) fn is_over(&self) -> bool {
        self.result.is_some()
    }

    /// Whether there is something to do before anything comes.
    pub(super) fn is_busy(&self, links: &[Link]) -> bool {
        match &self.doing {
            Doing::Over | Doing::Interrupted => false,
            Doing::Idle => true,
            Doing::Sending(_) if links[0].has_room() => true,
            Doing::Pushing(_) if self.pages.has_room() || self.pages.broken => true,
            Doing::Synchronising if self.pages.is_synchronised() || self.pages.broken => true,
            _ => self.channels > 0 && self.pages.is_busy(&links[1..]),
        }
    }

    /// When it must be woken if nothing comes.
    pub(super) fn wake(&self) -> impl Iterator<Item = Duration> {
        let until = match self.doing {
            Doing::Waiting { until, .. } => until,
            _ => None,
        };
        let cancel = self.plan.cancel.filter(|_| !self.cancelled);
        until.into_iter().chain(self.continue_at).chain(self.postcopy).chain(cancel).filter(|_| !self.is_over())
    }

    /// Goes on as far as it can at this time.
    pub(super) fn step(&mut self, now: Duration, links: &mut [Link], back: &mut Link) -> Result<(), MigrationError> {
        self.works_until(now);
        if self.is_over() {
            return Ok(());
        }
        self.listen(now, links, back);
        self.obey(now, links, back);
        for _ in 0..=self.random.below(8) {
            if self.channels > 0 {
                self.pages.step(now, &mut links[1..], &self.memory, &mut self.random)?;
            }
            self.proceed(now, links, back)?;
        }
        Ok(())
    }

    /// The guest works, if it runs.
    fn works_until(&mut self, now: Duration) {
        let writes = (now - self.worked).as_micros() / self.plan.work.as_micros().max(1);
        if writes > 0 {
            self.worked = now;
            (0..WRITES.min(writes as u64)).for_each(|_| self.works());
        }
    }

    fn works(&mut self) {
        if self.runs {
            self.work += 1;
            self.memory.work(&mut self.random);
        }
    }

    /// Reads the return path.
    fn listen(&mut self, now: Duration, links: &mut [Link], back: &mut Link) {
        let Some(answers) = &mut self.answers else { return };
        let (arrived, had_ended) = (back.receive(now, usize::MAX), answers.has_ended());
        self.news |= !arrived.is_empty();
        self.heard.extend(arrived);
        while !answers.has_verdict() {
            let due = self.decoder.payload_remaining() as usize;
            if let Some(bitmap) = self.heard.get(..due).filter(|_| due > 0) {
                let bitmap = if self.plan.plant == Plant::Assumes { vec![u8::MAX; due] } else { bitmap.to_vec() };
                let skipped = self.decoder.skip_payload(due as u64);
                debug_assert!(skipped.is_ok());
                self.heard.drain(..due);
                if let Some(block) = self.bitmap.take() {
                    answers.bitmap(block, bitmap);
                }
            }
            let offset = self.decoder.offset();
            match self.decoder.next(&self.heard) {
                Ok(Step::Event { consumed, event: Event::Message(message) }) => {
                    self.heard.drain(..consumed);
                    if self.plan.plant == Plant::Deaf && matches!(message, Message::ReqPages { .. }) {
                        continue;
                    }
                    if let Message::RecvBitmap { block, .. } = &message {
                        self.bitmap = Some(block.clone());
                    }
                    answers.message(message, offset);
                }
                Ok(Step::Event { consumed, event: Event::BitmapEnd }) => drop(self.heard.drain(..consumed)),
                Err(error) => answers.fail(error.map(ReturnPathError::from).into()),
                _ => break,
            }
        }
        if back.has_ended(now) {
            match answers.has_verdict() {
                true if answers.has_ended() => {}
                true => answers.end(Ok(())),
                false => answers.fail(MigrationError::NoVerdict),
            }
        }
        self.news |= answers.has_ended() != had_ended;
        if answers.has_failed() {
            self.close(now, links, back);
        }
    }

    /// The operator's word comes when it is time.
    fn obey(&mut self, now: Duration, links: &mut [Link], back: &mut Link) {
        if self.postcopy.is_some_and(|postcopy| now >= postcopy) {
            self.postcopy = None;
            // Plans have it only where it is possible.
            let started = self.core.start_postcopy();
            debug_assert_eq!(started, Ok(()));
        }
        if now > HURRY {
            // The guest writes faster than the link carries, perhaps.
            self.core.set_parameters(Parameters { downtime_limit_ms: 2_000_000, ..self.parameters.clone() });
        }
        if self.continue_at.is_some_and(|at| now >= at) {
            self.continue_at = None;
            self.core.let_switch_over();
            if matches!(self.doing, Doing::Waiting { wake: Wake::Continue, .. }) {
                self.doing = Doing::Idle;
            }
        }
        if self.plan.cancel.is_some_and(|cancel| now >= cancel) && !self.cancelled && !self.committed {
            self.cancelled = true;
            self.core.cancel();
            self.close(now, links, back);
            if matches!(self.doing, Doing::Waiting { .. }) {
                self.doing = Doing::Idle;
            }
        }
    }

    /// Shuts all connections down.
    fn close(&mut self, now: Duration, links: &mut [Link], back: &mut Link) {
        self.closed = true;
        links.iter_mut().for_each(|link| link.close(now));
        back.deafen();
    }

    /// Goes on with what was begun, or begins the next.
    fn proceed(&mut self, now: Duration, links: &mut [Link], back: &mut Link) -> Result<(), MigrationError> {
        match std::mem::replace(&mut self.doing, Doing::Idle) {
            Doing::Over => self.doing = Doing::Over,
            Doing::Interrupted => self.doing = Doing::Interrupted,
            Doing::Idle => {
                self.news = false;
                let action = self.core.poll(now, self.answers.as_mut());
                self.most = self.most.max(self.core.stream().bytes().len());
                self.perform(action, now, links, back)?;
            }
            Doing::Waiting { until, wake } => {
                let heard = wake == Wake::Answers && self.news;
                if !heard && until.is_none_or(|until| now < until) {
                    self.doing = Doing::Waiting { until, wake };
                }
            }
            Doing::Sending(then) => self.send(then, now, links)?,
            Doing::Pushing(_) | Doing::Synchronising if self.pages.broken || self.closed => {
                self.fail("pages on a page channel", now);
            }
            Doing::Pushing(work) if self.pages.has_room() => self.pages.push(work),
            Doing::Synchronising if self.pages.is_synchronised() => {}
            Doing::Settling if self.closed => self.core.settled(Err(io::ErrorKind::ConnectionReset.into())),
            Doing::Settling if back.has_ended(now) || links[0].is_refused() => {
                let taken = links[0].backlog(now) == Some(0);
                self.core.settled(if taken { Ok(()) } else { Err(io::ErrorKind::ConnectionReset.into()) });
            }
            doing => self.doing = doing,
        }
        if self.channels > 0 {
            self.core.sent(self.pages.take_sent());
        }
        Ok(())
    }

    fn perform(
        &mut self,
        action: Action,
        now: Duration,
        links: &mut [Link],
        back: &mut Link,
    ) -> Result<(), MigrationError> {
        match action {
            Action::ReadLog if self.plan.plant == Plant::NoLastReading && !self.runs => {}
            Action::ReadLog => self.memory.read_log(|block, number, word| self.core.found(block, number, word)),
            Action::Reset(ranges) => {
                ranges.into_iter().for_each(|range| self.memory.reset(range.block, range.pages));
            }
            Action::Send { .. } => self.doing = Doing::Sending(FollowUp::Sent(Sent::default())),
            Action::Pages(batch) => {
                let pages = batch.runs.iter().flat_map(|run| run.pages.clone().map(|page| (run.block, page)));
                let pages: Vec<_> = pages.collect();
                let mut contents = vec![None; pages.len()];
                if self.plan.plant == Plant::ReadBeforeReset {
                    let read =
                        |(block, page): &(usize, u64)| self.memory.page(self.memory.index(*block, *page)).to_vec();
                    contents = pages.iter().map(|page| Some(read(page))).collect();
                    (0..4).for_each(|_| self.works());
                }
                for range in batch.resets {
                    self.memory.reset(range.block, range.pages);
                }
                self.needed |= pages.iter().any(|(block, page)| self.released[self.memory.index(*block, *page)]);
                self.pages(pages, contents)?;
                if self.plan.plant == Plant::ReleasesEarly {
                    self.release(batch.runs);
                }
            }
            Action::Release(ranges) => self.release(ranges),
            Action::LeaveChannels => self.channels = 0,
            Action::SyncChannels => {
                self.pages.synchronise();
                self.doing = Doing::Synchronising;
            }
            Action::MeasureBacklog { all } => {
                let links = links.iter().take(if all { usize::MAX } else { 1 });
                match links.map(|link| link.backlog(now)).sum() {
                    Some(bytes) if !self.closed => self.core.backlog(bytes),
                    None if self.plan.plant == Plant::Silent => self.core.backlog(0),
                    _ => self.fail("what is on the way already", now),
                }
            }
            Action::Pause => {
                self.core.paused(self.runs);
                self.runs = false;
            }
            Action::Status(Status::PreSwitchover) => self.continue_at = self.plan.pause.map(|pause| now + pause),
            Action::SaveDevices { .. } => {
                let (idstr, body) = (name("counter")?, self.work.to_be_bytes().to_vec());
                let section = DeviceSection { idstr, instance_id: 0, version_id: 1, body };
                self.core.devices_saved(SavedDevices::opaque(vec![section]));
            }
            Action::SendEnd => {
                self.doing = Doing::Sending(FollowUp::Ended { before: links[0].sent() });
            }
            Action::Settle => {
                links.iter_mut().for_each(|link| link.close(now));
                self.doing = Doing::Settling;
            }
            Action::Commit => {
                self.committed = !self.cancelled;
                self.core.committed(if self.cancelled { Err(MigrationError::Cancelled) } else { Ok(()) });
            }
            Action::Confirm(bytes) => {
                self.queue.bytes(&bytes);
                self.doing = Doing::Sending(FollowUp::Confirmed);
            }
            Action::Wait { until, wake } => self.doing = Doing::Waiting { until, wake },
            Action::Close => self.close(now, links, back),
            Action::AwaitConnection { .. } => self.doing = Doing::Interrupted,
            Action::Resume => {
                self.runs = true;
                self.core.resumed(Ok(()));
            }
            Action::LeaveGuest => self.runs = self.plan.plant == Plant::GoesOn,
            Action::Activate => self.core.resumed(Ok(())),
            Action::End(result) => {
                self.result = Some(result);
                links.iter_mut().for_each(|link| link.close(now));
                self.doing = Doing::Over;
            }
            // The rest concerns a log that is always kept, devices and files that are not here, and reports.
            _ => {}
        }
        Ok(())
    }

    fn release(&mut self, ranges: Vec<BlockRange>) {
        for BlockRange { block, pages } in ranges {
            let (first, end) = (self.memory.index(block, pages.start), self.memory.index(block, pages.end));
            self.released[first..end].fill(true);
        }
    }

    /// What was being done cannot be done.
    fn fail(&mut self, doing: &'static str, now: Duration) {
        self.queue.clear();
        self.batch.clear();
        self.doing = Doing::Idle;
        self.core.failed(broken(doing), now, self.answers.is_some());
    }
}

fn broken(doing: &'static str) -> MigrationError {
    MigrationError::Send { doing, source: io::ErrorKind::BrokenPipe.into() }
}

fn name(name: &str) -> Result<CountedString, MigrationError> {
    let long = || MigrationError::guest("name a section or RAM block")("the name is too long".into());
    CountedString::new(name).ok_or_else(long)
}
