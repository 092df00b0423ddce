//! A source that is a model of precopy: passes over the dirty pages, a switchover, and the last word of the destination.

use super::{Link, Memory, Plan, Plant, Random, memory::PAGE};
use crate::handover;
use qevm_multifd::{ChannelEncoder, EncoderOptions, Init, Pages, Uuid};
use qevm_returnpath::{Decoder, Event, Message};
use qevm_savevm::{
    StreamWriter,
    command::Command,
    configuration::Configuration,
    framing::SectionHeader,
    ram::{BlockId, RamBlock},
};
use qevm_wire::{CountedString, Decode, Limits, Step, Writer};
use std::{collections::VecDeque, error::Error, time::Duration};

/// Id of the `ram` section.
const RAM: u32 = 2;
/// The guest is stopped when a pass has found no more pages than this, or after so many passes.
const FEW: usize = 3;
const PASSES: u32 = 6;

/// The source's end.
pub(super) struct Source {
    pub(super) memory: Memory,
    pub(super) state: State,
    /// How often the guest has worked: the state of its device.
    pub(super) work: u64,
    random: Random,
    plant: Plant,
    stream: StreamWriter,
    encoders: Vec<ChannelEncoder>,
    /// What each channel has to send, the main channel first.
    queues: Vec<Writer>,
    /// Pages of this pass that are left.
    pass: VecDeque<usize>,
    passes: u32,
    packets: u64,
    answers: Decoder,
    heard: Vec<u8>,
    /// PINGs that were not answered.
    awaited: usize,
    /// Nothing goes on before an answer.
    waits: bool,
    announce: bool,
    agreed: bool,
}

/// What has become of the guest here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It runs, and is sent.
    Running,
    /// It is stopped, and the last pages are sent.
    Stopped,
    /// Everything was sent.
    Sent,
    /// It belongs to the destination.
    HandedOver,
    /// The migration has failed, and it runs on.
    Resumed,
}

type Done = Result<(), Box<dyn Error>>;

impl Source {
    pub(super) fn new(plan: &Plan) -> Result<Self, Box<dyn Error>> {
        let mut random = Random::new(plan.seed ^ 0x50);
        let mut memory = Memory::new(plan.pages);
        (0..2 * plan.pages).for_each(|_| memory.work(&mut random));
        memory.log_all();
        let channels = usize::from(plan.channels);
        let mut source = Source {
            memory,
            state: State::Running,
            work: 0,
            random,
            plant: plan.plant,
            stream: StreamWriter::default(),
            encoders: vec![ChannelEncoder::new(EncoderOptions::default()); channels],
            queues: vec![Writer::new(); channels + 1],
            pass: VecDeque::new(),
            passes: 0,
            packets: 0,
            answers: Decoder::new(Limits::default()),
            heard: Vec::new(),
            awaited: 0,
            waits: false,
            announce: plan.confirmed,
            agreed: false,
        };
        source.set_up()?;
        Ok(source)
    }

    /// Goes on as far as it can at this time.
    pub(super) fn step(&mut self, now: Duration, links: &mut [Link], back: &mut Link) -> Done {
        if matches!(self.state, State::HandedOver | State::Resumed) {
            self.flush(now, links);
            return Ok(());
        }
        if !self.listen(now, links, back)? {
            return Ok(());
        }
        self.waits = false;
        for _ in 0..=self.random.below(8) {
            if self.queues.iter().any(|queue| queue.len() > 2 * PAGE) || !self.flush(now, links) {
                break;
            }
            self.produce()?;
        }
        if !self.flush(now, links) {
            self.fail(now, links, back);
        }
        Ok(())
    }

    /// Whether the guest runs here.
    pub(super) fn runs(&self) -> bool {
        matches!(self.state, State::Running | State::Resumed)
    }

    /// Whether there is nothing more to do.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::HandedOver | State::Resumed) && self.queues.iter().all(Writer::is_empty)
    }

    /// Whether there is something to do before anything comes.
    pub(super) fn is_busy(&self, links: &[Link]) -> bool {
        let mut queues = self.queues.iter().zip(links);
        let full = self.queues.iter().any(|queue| queue.len() > 2 * PAGE);
        let produces = matches!(self.state, State::Running | State::Stopped) && !self.waits && !full;
        produces || queues.any(|(queue, link)| !queue.is_empty() && link.has_room())
    }

    fn set_up(&mut self) -> Done {
        for (number, (encoder, queue)) in (0..).zip(self.encoders.iter_mut().zip(&mut self.queues[1..])) {
            encoder.init(&Init::new(Uuid::default(), number), queue)?;
        }
        self.stream.header(Some(&Configuration::new("microvm")))?;
        self.stream.command(Command::OpenReturnPath)?;
        self.ping(1)?;
        if self.announce {
            self.ping(handover::ANNOUNCE)?;
        }
        let ram = SectionHeader { section_id: RAM, idstr: name("ram")?, instance_id: 0, version_id: 4 };
        self.stream.section_start(&ram)?;
        self.stream.ram_setup([RamBlock::new(name("microvm.ram")?, (self.memory.pages() * PAGE) as u64)])?;
        self.synchronise()?;
        self.end_section()
    }

    fn ping(&mut self, value: u32) -> Done {
        self.awaited += 1;
        Ok(self.stream.command(Command::Ping(value))?)
    }

    /// Reads the return path. False if the migration is over.
    fn listen(&mut self, now: Duration, links: &mut [Link], back: &mut Link) -> Result<bool, Box<dyn Error>> {
        self.heard.extend(back.receive(now, usize::MAX));
        while let Step::Event { consumed, event: Event::Message(message) } = self.answers.next(&self.heard)? {
            self.heard.drain(..consumed);
            match (message, self.state) {
                (Message::Pong { value }, _) => {
                    self.agreed |= value == handover::AGREED;
                    self.awaited = self.awaited.saturating_sub(1);
                }
                (Message::Shut { status: 0 }, State::Sent) => {
                    self.state = State::HandedOver;
                    if self.agreed {
                        self.queues[0].bytes(&handover::confirmation()?);
                    }
                    self.flush(now, links);
                    return Ok(false);
                }
                _ => {
                    self.fail(now, links, back);
                    return Ok(false);
                }
            }
        }
        if back.has_ended(now) {
            self.fail(now, links, back);
            return Ok(false);
        }
        Ok(true)
    }

    /// The migration has failed.
    fn fail(&mut self, now: Duration, links: &mut [Link], back: &mut Link) {
        self.state = State::Resumed;
        self.queues.iter_mut().for_each(Writer::clear);
        links.iter_mut().for_each(|link| link.close(now));
        back.refuse();
    }

    /// The next piece of work.
    fn produce(&mut self) -> Done {
        if self.state == State::Sent {
            return Ok(());
        }
        if let Some(page) = self.pass.pop_front() {
            self.page(page)?;
            if self.pass.is_empty() {
                self.end_pass()?;
            }
            return Ok(());
        }
        let dirty = self.memory.dirty();
        let ready = self.awaited == 0;
        if dirty.len() <= FEW || self.passes >= PASSES {
            if !ready {
                // The destination does not answer yet; the guest works on.
                self.works();
                self.waits = true;
                return Ok(());
            }
            self.state = State::Stopped;
            self.stream.section_end(RAM)?;
        } else {
            self.stream.section_part(RAM)?;
        }
        self.passes += 1;
        self.pass = self.memory.dirty().into();
        if self.pass.is_empty() { self.end_pass() } else { self.take_stream() }
    }

    fn page(&mut self, page: usize) -> Done {
        let content = if self.plant == Plant::ReadBeforeReset {
            let content = self.memory.page(page).to_vec();
            (0..4).for_each(|_| self.works());
            self.memory.reset(page);
            content
        } else {
            self.works();
            self.memory.reset(page);
            self.works();
            self.memory.page(page).to_vec()
        };
        self.works();
        let (offset, zero) = ((page * PAGE) as u64, content.iter().all(|byte| *byte == 0));
        if self.encoders.is_empty() || (zero && self.random.once_in(2)) {
            match zero {
                true => self.stream.zero_page(BlockId(0), offset)?,
                false => {
                    self.stream.page_header(BlockId(0), offset)?;
                    self.stream.payload(&content)?;
                }
            }
            return self.take_stream();
        }
        let channel = self.random.below(self.encoders.len() as u64) as usize;
        let (block, packet_num) = (name("microvm.ram")?, self.packets);
        self.packets += 1;
        let (normal, zeroes) = if zero { (vec![], vec![offset]) } else { (vec![offset], vec![]) };
        let pages = Pages { block: &block, normal: &normal, zero: &zeroes, packet_num };
        let queue = &mut self.queues[channel + 1];
        self.encoders[channel].pages(&pages, (normal.len() * PAGE) as u64, queue)?;
        if !zero {
            queue.bytes(&content);
        }
        Ok(())
    }

    fn end_pass(&mut self) -> Done {
        self.synchronise()?;
        self.end_section()?;
        if self.state == State::Stopped {
            let device = SectionHeader { section_id: RAM + 1, idstr: name("counter")?, instance_id: 0, version_id: 1 };
            self.stream.section_full(&device, &self.work.to_be_bytes())?;
            self.stream.eof()?;
            self.state = State::Sent;
            self.take_stream()?;
        }
        Ok(())
    }

    /// All page channels and the main channel.
    fn synchronise(&mut self) -> Done {
        for (encoder, queue) in self.encoders.iter_mut().zip(&mut self.queues[1..]) {
            encoder.sync(self.packets, queue)?;
            self.packets += 1;
        }
        if !self.encoders.is_empty() {
            self.stream.multifd_flush()?;
        }
        Ok(())
    }

    fn end_section(&mut self) -> Done {
        self.stream.eos()?;
        self.stream.footer()?;
        self.take_stream()
    }

    fn take_stream(&mut self) -> Done {
        self.queues[0].bytes(&self.stream.take());
        Ok(())
    }

    /// The guest works, if it runs.
    fn works(&mut self) {
        if self.runs() && self.random.once_in(3) {
            self.work += 1;
            self.memory.work(&mut self.random);
        }
    }

    /// Sends what there is room for; false if a link is down.
    fn flush(&mut self, now: Duration, links: &mut [Link]) -> bool {
        let mut stand = true;
        for (queue, link) in self.queues.iter_mut().zip(links) {
            if !queue.is_empty() && link.has_room() {
                stand &= link.send(now, queue.as_bytes());
                queue.clear();
            }
        }
        stand
    }
}

fn name(name: &str) -> Result<CountedString, Box<dyn Error>> {
    CountedString::new(name).ok_or_else(|| "a name is 1 to 255 bytes long".into())
}
