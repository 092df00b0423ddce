//! A driver of a page channel's reader, over a simulated link.

use super::memory::{BLOCKS, PAGE};
use super::{Link, Memory, Plan, Plant, Random};
use crate::core::{PageAction, PageChannel, PageTurn, Synchronisation};
use crate::{LoadError, MigrationError};
use qevm_multifd::layout::INIT_LEN;
use qevm_multifd::{ChannelOptions, SyncError, Uuid};
use qevm_wire::Located;
use std::collections::VecDeque;
use std::time::Duration;

/// A page channel of the destination.
pub(super) struct Pages {
    /// Bytes of content that came.
    pub(super) received: u64,
    /// How often it has met a SYNC packet.
    pub(super) marks: u64,
    number: u8,
    channels: u8,
    core: Option<PageChannel>,
    input: Vec<u8>,
    /// Pages of the last packet whose content has not come; the first may have come in part.
    expected: VecDeque<usize>,
    waits: bool,
    /// Nothing more is read.
    pub(super) over: bool,
    random: Random,
    plant: Plant,
}

impl Pages {
    pub(super) fn new(number: u8, plan: &Plan) -> Self {
        Pages {
            received: 0,
            marks: 0,
            number,
            channels: plan.channels,
            core: None,
            input: Vec::new(),
            expected: VecDeque::new(),
            waits: false,
            over: false,
            random: Random::new(plan.seed ^ (u64::from(number) << 32)),
            plant: plan.plant,
        }
    }

    /// Bytes that lie here.
    pub(super) fn buffered(&self) -> usize {
        self.input.len()
    }

    /// Goes on as far as it can at this time.
    pub(super) fn step(
        &mut self,
        now: Duration,
        link: &mut Link,
        memory: &mut Memory,
        sync: &mut Synchronisation,
    ) -> Result<(), MigrationError> {
        while !self.over {
            if self.waits {
                self.waits = sync.channel_waits(self.number).map_err(synchronisation)?;
                if self.waits {
                    return Ok(());
                }
            }
            let Some(core) = &mut self.core else {
                match self.input.first_chunk::<INIT_LEN>().copied() {
                    Some(first) => {
                        let (channels, uuid) = (Some(self.channels), Some(Uuid::default()));
                        let core =
                            PageChannel::new(&first, ChannelOptions { channels, uuid, ..ChannelOptions::default() })?;
                        // Who is who was settled when the channels were gathered.
                        self.number = core.number();
                        self.core = Some(core);
                        self.input.drain(..INIT_LEN);
                    }
                    None if self.fill(INIT_LEN, now, link) => {}
                    None if link.has_ended(now) => {
                        let source = std::io::ErrorKind::UnexpectedEof.into();
                        return Err(MigrationError::Receive { offset: 0, source });
                    }
                    None => return Ok(()),
                }
                continue;
            };
            let block_of = |name: &[u8]| BLOCKS.iter().position(|block| name == block.as_bytes());
            let length_of = |name: &[u8]| memory.block_len(block_of(name)?);
            let PageTurn { consumed, action } = core.next(&self.input, length_of)?;
            let mut used = consumed;
            match action {
                PageAction::Read { at_least } => {
                    if !self.fill(at_least, now, link) && !self.ends(now, link) {
                        return Ok(());
                    }
                }
                PageAction::Packet(packet) => {
                    let block = block_of(packet.block_bytes()).unwrap_or(0);
                    self.expected = packet.normal().map(|offset| memory.index(block, offset / PAGE as u64)).collect();
                    for offset in packet.zero() {
                        let index = memory.index(block, offset / PAGE as u64);
                        memory.page_mut(index).fill(0);
                    }
                }
                // No device sends its state here.
                PageAction::DeviceState(packet) => {
                    return Err(core.refuse(LoadError::Unsupported(format!("{packet:?}"))));
                }
                PageAction::Payload { remaining } => {
                    if self.input.is_empty() {
                        if !self.fill(1, now, link) && !self.ends(now, link) {
                            return Ok(());
                        }
                        continue;
                    }
                    let rest = (remaining - 1) as usize % PAGE + 1;
                    used = rest.min(self.input.len());
                    if let Some(page) = self.expected.front() {
                        memory.page_mut(*page)[PAGE - rest..][..used].copy_from_slice(&self.input[..used]);
                    }
                    if used == rest {
                        self.expected.pop_front();
                    }
                    self.received += used as u64;
                    core.placed(used as u64)?;
                }
                PageAction::Synchronise if self.plant == Plant::NoBarrier => {}
                PageAction::Synchronise => {
                    sync.channel_sync(self.number).map_err(synchronisation)?;
                    self.marks += 1;
                    self.waits = true;
                }
                PageAction::End => {
                    self.over = true;
                    sync.channel_end(self.number).map_err(synchronisation)?;
                }
            }
            self.input.drain(..used);
        }
        Ok(())
    }

    /// Takes what has come. False if that is nothing.
    fn fill(&mut self, at_least: usize, now: Duration, link: &mut Link) -> bool {
        let wanted = at_least.saturating_sub(self.input.len()).max(1) + self.random.below(3000) as usize;
        let arrived = link.receive(now, wanted);
        self.input.extend(&arrived);
        !arrived.is_empty()
    }

    /// Whether nothing more comes, which the core is told.
    fn ends(&mut self, now: Duration, link: &Link) -> bool {
        let ended = link.has_ended(now);
        if let Some(core) = self.core.as_mut().filter(|_| ended) {
            core.end_of_input();
        }
        ended
    }
}

fn synchronisation(error: SyncError) -> MigrationError {
    Located::new(LoadError::from(error), 0).into()
}
