//! A driver of the destination's core, over simulated links.

use super::early::Early;
use super::memory::{BLOCKS, PAGE};
use super::pages::Pages;
use super::{Link, Memory, Plan, Plant, Random};
use crate::core::Synchronisation;
use crate::core::destination::{Action, Destination, DestinationOptions, Turn};
use crate::{Doubt, LoadError, MigrationError};
use qevm_returnpath::requests::PageFaults;
use qevm_returnpath::{Encoder, Message};
use qevm_savevm::ram::{BlockId, PageAt, RamBlock};
use qevm_wire::{CountedString, Profile, Writer};
use std::io;
use std::ops::Range;
use std::time::Duration;

/// How long the main channel may be silent.
pub(super) const SILENCE: Duration = Duration::from_secs(20);

/// The destination's end.
pub(super) struct Receiver {
    pub(super) memory: Memory,
    /// The state of the device that arrived.
    pub(super) work: Option<u64>,
    /// The guest runs here.
    pub(super) runs: bool,
    /// Everything is over.
    pub(super) over: bool,
    /// SHUT 0 was sent.
    pub(super) told: bool,
    /// The guest is wholly here, and may run at the source: it is paused, and the operator is told.
    pub(super) undecided: bool,
    /// The guest runs here, and some of its memory is still at the source, which is gone.
    pub(super) broken: bool,
    /// The guest runs here, and the connection over which its memory came is lost.
    pub(super) interrupted: bool,
    /// The source may be asked for pages.
    asks: bool,
    /// What the guest does before its memory is here.
    pub(super) early: Early,
    /// Why it failed.
    pub(super) error: Option<String>,
    /// Most bytes that lay in buffers.
    pub(super) most: usize,
    core: Destination,
    sync: Synchronisation,
    input: Vec<u8>,
    pages: Vec<Pages>,
    /// What the guest was found to wait for.
    faults: Option<PageFaults>,
    /// The blocks in the order in which they were listed.
    listed: Vec<usize>,
    received: u64,
    random: Random,
    plant: Plant,
    /// How often the guest writes to a page.
    work_interval: Duration,
    /// The main channel waits for the page channels.
    waits: bool,
    /// How often the main channel has met a mark, and something has failed.
    marks: u64,
    failures: u64,
    /// Until when the last word must be acknowledged.
    telling: Option<Duration>,
    /// When something came last on the main channel.
    arrived: Duration,
    wake: Option<Duration>,
}

impl Receiver {
    pub(super) fn new(plan: &Plan) -> Self {
        let profile = Profile::new(plan.qemu, "microvm");
        let options = DestinationOptions {
            machine_type: "microvm".into(),
            ram: BLOCKS.map(String::from).to_vec(),
            vmdesc: profile.vmdesc,
            answers: plan.return_path,
            switchover_ack: profile.switchover_ack.filter(|_| plan.switchover_ack),
            page_channels: plan.channels > 0,
            postcopy: plan.postcopy.is_some(),
            silence: Some(SILENCE),
            ..DestinationOptions::default()
        };
        Receiver {
            memory: Memory::new(&plan.blocks),
            work: None,
            runs: false,
            over: false,
            told: false,
            undecided: false,
            broken: false,
            interrupted: false,
            asks: true,
            early: Early::new(plan.blocks.iter().sum(), plan.seed),
            error: None,
            most: 0,
            core: Destination::new(options),
            sync: Synchronisation::new(plan.channels.max(1)),
            input: Vec::new(),
            pages: (0..plan.channels).map(|number| Pages::new(number, plan)).collect(),
            faults: None,
            listed: Vec::new(),
            received: 0,
            random: Random::new(plan.seed ^ 0xd5),
            plant: plan.plant,
            work_interval: plan.work,
            waits: false,
            marks: 0,
            failures: 0,
            telling: None,
            arrived: Duration::ZERO,
            wake: None,
        }
    }

    /// When it must be woken if nothing comes.
    pub(super) fn wake(&self) -> Option<Duration> {
        self.wake
    }

    /// Goes on as far as it can at this time.
    pub(super) fn step(&mut self, now: Duration, links: &mut [Link], back: &mut Link) {
        self.wake = None;
        self.core.time(now);
        // Who is let go by another channel goes on at the same time.
        while !self.interrupted {
            let before = self.progress();
            self.round(now, links, back);
            if self.progress() == before {
                break;
            }
        }
        self.guest(now, back);
        if self.over || self.interrupted {
            links.iter_mut().for_each(Link::refuse);
            back.close(now);
        }
    }

    /// The guest works before its memory is here.
    fn guest(&mut self, now: Duration, back: &mut Link) {
        if !self.runs || !self.early.listens || self.over {
            return;
        }
        if let Some(page) = self.early.works(now, self.work_interval, &mut self.memory) {
            let (block, page) = self.memory.place(page);
            if let Some(Ok(Some(message))) =
                self.faults.as_mut().map(|faults| faults.fault(block, (page * PAGE) as u64))
            {
                // Under a paravirtual KVM the same is asked many times.
                let times = if self.asks { 1 + self.random.below(3) } else { 0 };
                (0..times).for_each(|_| self.send(now, back, &message));
            }
        }
        let next = self.early.wake(self.work_interval);
        self.wake = self.wake.into_iter().chain(next).min();
    }

    /// Each channel goes on, any of them first.
    fn round(&mut self, now: Duration, links: &mut [Link], back: &mut Link) {
        let first = self.random.below(links.len() as u64) as usize;
        for turn in 0..links.len() {
            let channel = (first + turn) % links.len();
            let stepped = match channel.checked_sub(1) {
                None => self.main(now, &mut links[0], back),
                // Page channels are no longer read.
                Some(_) if self.early.listens => Ok(()),
                Some(number) => self.page_channel(number, now, &mut links[channel]),
            };
            if let Err(error) = stepped {
                if self.core.runs_early() && self.runs {
                    // Whatever it is, it is no reason to lose the guest, which goes on until it needs what is missing.
                    self.error = Some(error.to_string());
                    (self.interrupted, self.asks) = (true, false);
                    return;
                }
                self.undecided |= matches!(error, MigrationError::Undecided(_)) && self.plant != Plant::Silent;
                self.error.get_or_insert_with(|| error.to_string());
                self.sync.abandon(error.to_string());
                self.waits = false;
                self.core.fail(&error);
                self.failures += 1;
                if let Some(number) = channel.checked_sub(1) {
                    self.pages[number].over = true;
                }
            }
        }
    }

    /// How often a channel has synchronised or failed.
    fn progress(&self) -> u64 {
        self.marks + self.failures + self.pages.iter().map(|pages| pages.marks).sum::<u64>()
    }

    fn main(&mut self, now: Duration, link: &mut Link, back: &mut Link) -> Result<(), MigrationError> {
        while !self.over {
            if self.waits {
                let waits = self.sync.main_waits(self.received, now);
                if let Ok(Some(until)) = waits {
                    self.wake = Some(until);
                    return Ok(());
                }
                self.waits = false;
                self.core.synchronised(waits.map(|_| ()))?;
            }
            let Turn { consumed, action } = self.core.next(&self.input)?;
            let mut used = consumed;
            match action {
                Action::Continue => {}
                Action::Read { at_least, until } => {
                    if !self.fill(at_least, now, link) {
                        self.wake = until;
                        return Ok(());
                    }
                }
                Action::Page { page, remaining } => {
                    let there = self.fill_page(&page, remaining, consumed)?;
                    used += there;
                    if self.plant == Plant::EarlyShut && !self.told {
                        self.send(now, back, &Message::Shut { status: 0 });
                    }
                    if there == 0 {
                        self.input.drain(..used);
                        if !self.fill(1, now, link) {
                            self.wake = Some(self.arrived + SILENCE);
                            return Ok(());
                        }
                        continue;
                    }
                }
                Action::Discard { block, ranges } => self.discard(block, ranges),
                Action::Listen => {
                    self.early.listens = true;
                    self.faults = self.memory.faults();
                }
                Action::Run { running } => self.runs = running,
                Action::Place { page, content } => {
                    let content = content.unwrap_or(&[0; PAGE]).to_vec();
                    self.place(&page, &content, now)?;
                }
                Action::Zero(page) => {
                    let index = self.index(&page);
                    self.early.came(index);
                    self.memory.page_mut(index).fill(0);
                }
                Action::Block(block) => self.list(block)?,
                Action::ForgetBlocks => self.listed.clear(),
                Action::Section { idstr, .. } => {
                    self.core.section(if idstr == *"counter" { Ok(()) } else { Err(String::new()) })?;
                }
                Action::Synchronise(_) if self.plant == Plant::NoBarrier => self.core.synchronised(Ok(()))?,
                Action::Synchronise(mark) => {
                    self.marks += 1;
                    let met = self.sync.main(mark, self.received, now);
                    self.waits = met.is_ok();
                    if let Err(error) = met {
                        self.core.synchronised(Err(error))?;
                    }
                }
                Action::EndOfMemory => {
                    let ended = if self.plant == Plant::NoBarrier { Ok(()) } else { self.sync.main_end() };
                    self.core.synchronised(ended)?;
                }
                Action::LoadDevices => self.load_devices()?,
                Action::Activate => self.core.activated(Ok(()))?,
                Action::Send(message) => self.send(now, back, &message),
                Action::Tell { message, patience } => {
                    let until = self.tell(&message, patience, now, link, back)?;
                    if until.is_some() {
                        self.wake = until;
                        return Ok(());
                    }
                }
                Action::SendBitmap(block) => {
                    let bitmap = self.bitmap(self.listed[block.index()])?;
                    back.send(now, &bitmap);
                }
                Action::Resume => self.resume(now, back),
                Action::Complete { running } => (self.runs, self.over) = (running, true),
                Action::Linger { until } => {
                    back.close(now);
                    link.receive(now, usize::MAX);
                    match link.has_ended(now) {
                        true => self.core.end_of_input(),
                        false if now >= until => {}
                        false => {
                            self.wake = Some(until);
                            return Ok(());
                        }
                    }
                }
                Action::Close => self.over = true,
                other => return Err(self.core.refuse(LoadError::Unsupported(format!("{other:?}")))),
            }
            self.input.drain(..used);
        }
        Ok(())
    }

    /// Puts what is there of a page to its place: so many bytes.
    fn fill_page(&mut self, page: &PageAt, remaining: u64, consumed: usize) -> Result<usize, MigrationError> {
        let there = (self.input.len() - consumed).min(remaining as usize);
        let at = PAGE - remaining as usize;
        let index = self.index(page);
        self.early.came(index);
        self.memory.page_mut(index)[at..at + there].copy_from_slice(&self.input[consumed..consumed + there]);
        self.core.placed(there as u64)?;
        Ok(there)
    }

    fn discard(&mut self, block: BlockId, ranges: Vec<Range<u64>>) {
        for page in ranges.into_iter().flat_map(|range| range.step_by(PAGE)) {
            let index = self.memory.index(self.listed[block.index()], page / PAGE as u64);
            if self.plant != Plant::NoDiscard {
                self.early.discard(index);
            }
        }
    }

    /// A page of postcopy, which may come once.
    fn place(&mut self, page: &PageAt, content: &[u8], now: Duration) -> Result<(), MigrationError> {
        let block = self.listed[page.block.index()];
        let index = self.memory.index(block, page.offset / PAGE as u64);
        if let Some(faults) = &mut self.faults {
            faults.received(block, page.offset);
        }
        if self.early.place(index, now) {
            self.memory.page_mut(index).copy_from_slice(content);
        } else if self.plant != Plant::NoDiscard {
            return Err(self.core.refuse(LoadError::Unsupported("a page that is there already".into())));
        }
        Ok(())
    }

    fn list(&mut self, block: RamBlock) -> Result<(), MigrationError> {
        let number = BLOCKS.iter().position(|name| block.name == **name);
        let expected = number.and_then(|number| self.memory.block_len(number)).unwrap_or(0);
        let Some(number) = number.filter(|_| block.used_length == expected) else {
            let kind = LoadError::RamBlockSize { name: block.name, found: block.used_length, expected };
            return Err(self.core.refuse(kind));
        };
        self.listed.push(number);
        self.core.block_fits();
        Ok(())
    }

    fn load_devices(&mut self) -> Result<(), MigrationError> {
        let state = self.core.devices().first().and_then(|device| device.body.first_chunk());
        self.work = state.map(|state| u64::from_be_bytes(*state));
        // As any machine: all of its devices have to come.
        self.core.loaded(self.work.map(|_| true).ok_or_else(|| "the device has not come".into()))
    }

    /// Says that the guest is here, and until when to wait for the source to acknowledge that.
    fn tell(
        &mut self,
        message: &Message,
        patience: Option<Duration>,
        now: Duration,
        link: &Link,
        back: &mut Link,
    ) -> Result<Option<Duration>, MigrationError> {
        if self.telling.is_none() {
            if link.has_ended(now) {
                self.core.told(Err(Doubt::SourceLeft))?;
            }
            self.send(now, back, message);
        }
        let until = *self.telling.get_or_insert(now + patience.unwrap_or_default());
        let told = match back.is_acknowledged(now) {
            _ if patience.is_none() => Ok(()),
            Some(true) => Ok(()),
            None => Err(Doubt::NotTold(io::ErrorKind::BrokenPipe.into())),
            Some(false) if now >= until => Err(Doubt::NotAcknowledged(patience.unwrap_or_default())),
            Some(false) => return Ok(Some(until)),
        };
        self.core.told(told).map(|()| None)
    }

    /// The source has connected again: asks for what the guest waits for once more.
    fn resume(&mut self, now: Duration, back: &mut Link) {
        self.asks = true;
        let again = self.faults.as_mut().map(PageFaults::reconnected).unwrap_or_default();
        for message in [Message::ResumeAck].iter().chain(&again) {
            self.send(now, back, message);
        }
    }

    fn page_channel(&mut self, number: usize, now: Duration, link: &mut Link) -> Result<(), MigrationError> {
        let pages = &mut self.pages[number];
        let before = pages.received;
        let stepped = pages.step(now, link, &mut self.memory, &mut self.sync);
        self.received += pages.received - before;
        self.most = self.most.max(pages.buffered());
        stepped
    }

    /// Another connection is there.
    pub(super) fn reconnect(&mut self, now: Duration) {
        self.input.clear();
        (self.interrupted, self.waits, self.arrived) = (false, false, now);
        self.core.reconnected();
    }

    /// There will be none: the guest waits for the next page that is missing, for ever.
    pub(super) fn give_up(&mut self) {
        if self.interrupted {
            (self.runs, self.broken, self.over) = (false, true, true);
        }
    }

    /// What says which pages of a block are here.
    fn bitmap(&self, block: usize) -> Result<Vec<u8>, MigrationError> {
        let pages = self.memory.block_len(block).unwrap_or(0) / PAGE as u64;
        let mut bitmap = vec![0; pages.div_ceil(64) as usize * 8];
        for page in (0..pages).filter(|page| self.early.is_present(self.memory.index(block, *page))) {
            bitmap[page as usize / 8] |= 1 << (page % 8);
        }
        let doing = MigrationError::guest("say which pages are here");
        let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
        let Some(name) = CountedString::new(BLOCKS[block]) else { return Ok(Vec::new()) };
        let written = encoder.message(&Message::RecvBitmap { block: name, len: bitmap.len() as u64 }, &mut writer);
        writer.bytes(&bitmap);
        written.and_then(|()| encoder.bitmap_end(&mut writer)).map_err(|error| doing(error.into()))?;
        Ok(writer.into_bytes())
    }

    fn send(&mut self, now: Duration, back: &mut Link, message: &Message) {
        self.told |= *message == Message::Shut { status: 0 };
        let mut writer = Writer::new();
        message.encode(&mut writer);
        back.send(now, writer.as_bytes());
    }

    /// Takes what has come on the main channel. False if there is nothing to do but to wait.
    fn fill(&mut self, at_least: usize, now: Duration, link: &mut Link) -> bool {
        let wanted = at_least.saturating_sub(self.input.len()).max(1) + self.random.below(5000) as usize;
        let arrived = link.receive(now, wanted);
        if arrived.is_empty() {
            if !link.has_ended(now) {
                return false;
            }
            self.core.end_of_input();
            return true;
        }
        self.core.arrived(now);
        self.arrived = now;
        self.input.extend(arrived);
        self.most = self.most.max(self.input.len());
        true
    }

    /// The number of a page, of a block that was listed.
    fn index(&self, page: &PageAt) -> usize {
        self.memory.index(self.listed[page.block.0 as usize], page.offset / PAGE as u64)
    }
}
