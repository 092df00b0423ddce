//! The page channels of a simulated source.

use super::memory::PAGE;
use super::{Fault, Link, Memory, Plan, Random};
use crate::MigrationError;
use crate::core::source::Sent;
use crate::multifd::{Batch, Settings};
use qevm_multifd::{ChannelEncoder, Init, Pages, Uuid};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{CountedString, Writer};
use std::collections::VecDeque;
use std::time::Duration;

/// Who sends what on all page channels: a batch is taken by whichever channel is free.
pub(super) struct PageSender {
    channels: Vec<Channel>,
    names: Vec<CountedString>,
    zero_pages: ZeroPageDetection,
    work: VecDeque<Work>,
    /// Synchronisations asked for.
    wanted: u64,
    packets: u64,
    sent: Sent,
    /// A channel broke.
    pub(super) broken: bool,
}

/// Pages of a packet, with their content where it was read already.
pub(super) struct Work {
    pub(super) batch: Batch,
    pub(super) content: Vec<Option<Vec<u8>>>,
}

struct Channel {
    encoder: ChannelEncoder,
    queue: Writer,
    flip: Option<u64>,
    /// The page whose content the flip has struck.
    struck: Option<usize>,
    /// SYNC packets that were made, and that were sent.
    made: u64,
    synced: u64,
}

impl PageSender {
    pub(super) fn new(plan: &Plan, settings: &Settings, names: Vec<CountedString>) -> Result<Self, MigrationError> {
        let mut channels = Vec::new();
        for number in 0..plan.channels {
            let mut encoder = ChannelEncoder::new(settings.encoder());
            let mut queue = Writer::new();
            encoder.init(&Init::new(Uuid::default(), number), &mut queue)?;
            let flip = plan.fault_of(usize::from(number) + 1).and_then(Fault::flips);
            channels.push(Channel { encoder, queue, flip, struck: None, made: 0, synced: 0 });
        }
        Ok(PageSender {
            channels,
            names,
            zero_pages: settings.zero_pages,
            work: VecDeque::new(),
            wanted: 0,
            packets: 0,
            sent: Sent::default(),
            broken: false,
        })
    }

    /// Whether zero pages are looked for beside the channels.
    pub(super) fn is_legacy(&self) -> bool {
        self.zero_pages == ZeroPageDetection::Legacy
    }

    /// Whether another batch can be queued.
    pub(super) fn has_room(&self) -> bool {
        self.work.len() < self.channels.len()
    }

    pub(super) fn push(&mut self, work: Work) {
        self.work.push_back(work);
    }

    /// A SYNC packet is to follow on every channel.
    pub(super) fn synchronise(&mut self) {
        self.wanted += 1;
    }

    /// Whether every channel has sent its SYNC packet.
    pub(super) fn is_synchronised(&self) -> bool {
        self.channels.iter().all(|channel| channel.synced == self.wanted)
    }

    /// The page whose content a flip on this channel has struck.
    pub(super) fn struck(&self, channel: usize) -> Option<usize> {
        self.channels.get(channel)?.struck
    }

    /// Counts since the last call.
    pub(super) fn take_sent(&mut self) -> Sent {
        std::mem::take(&mut self.sent)
    }

    /// Whether a channel can go on at once; `links` are those of the page channels.
    pub(super) fn is_busy(&self, links: &[Link]) -> bool {
        let has_work =
            |channel: &Channel| !channel.queue.is_empty() || !self.work.is_empty() || channel.synced != self.wanted;
        !self.broken && self.channels.iter().zip(links).any(|(channel, link)| has_work(channel) && link.has_room())
    }

    /// One of the channels goes on.
    pub(super) fn step(
        &mut self,
        now: Duration,
        links: &mut [Link],
        memory: &Memory,
        random: &mut Random,
    ) -> Result<(), MigrationError> {
        let number = random.below(self.channels.len() as u64) as usize;
        let (Some(channel), Some(link)) = (self.channels.get_mut(number), links.get_mut(number)) else { return Ok(()) };
        if self.broken || !link.has_room() {
            return Ok(());
        }
        if channel.queue.is_empty() {
            if let Some(work) = self.work.pop_front() {
                self.encode(number, work, links[number].sent(), memory)?;
            } else if channel.made < self.wanted {
                channel.encoder.sync(self.packets, &mut channel.queue)?;
                (self.packets, channel.made) = (self.packets + 1, channel.made + 1);
            }
            return Ok(());
        }
        self.broken = !link.send(now, channel.queue.as_bytes());
        self.sent.bytes += channel.queue.len() as u64;
        channel.queue.clear();
        channel.synced = channel.made;
        Ok(())
    }

    fn encode(&mut self, number: usize, work: Work, at: u64, memory: &Memory) -> Result<(), MigrationError> {
        let channel = &mut self.channels[number];
        let (mut normal, mut zero, mut contents) = (Vec::new(), Vec::new(), Vec::new());
        for (offset, content) in work.batch.pages.into_iter().zip(work.content) {
            let page = memory.index(work.batch.block, offset / PAGE as u64);
            let content = content.as_deref().unwrap_or(memory.page(page)).to_vec();
            if self.zero_pages == ZeroPageDetection::Multifd && content.iter().all(|byte| *byte == 0) {
                zero.push(offset);
            } else {
                normal.push(offset);
                contents.push((page, content));
            }
        }
        let pages =
            Pages { block: &self.names[work.batch.block], normal: &normal, zero: &zero, packet_num: self.packets };
        self.packets += 1;
        channel.encoder.pages(&pages, (normal.len() * PAGE) as u64, &mut channel.queue)?;
        for (page, content) in contents {
            let begin = at + channel.queue.len() as u64;
            if channel.flip.is_some_and(|flip| (begin..begin + PAGE as u64).contains(&flip)) {
                channel.struck = Some(page);
            }
            channel.queue.bytes(&content);
        }
        self.sent.normal += normal.len() as u64;
        self.sent.zero += zero.len() as u64;
        Ok(())
    }
}
