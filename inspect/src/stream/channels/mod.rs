//! The channels beside the main one, applied in step with it.
//!
//! multifd channels synchronise with the main channel: what a channel sends before its n-th SYNC comes before whatever
//! any channel sends after its n-th SYNC. So at each point at which the main channel waits for SYNCs, every channel is
//! read up to its next one. Within such a round a page is sent at most once, so the order of channels does not matter.
//! The preempt channel of postcopy carries pages that are sent only once, and is read at the end.

mod multifd;
mod preempt;

use super::halt::Halt;
use super::inputs::Named;
use super::memory::Memory;
use crate::failure::Failure;
use multifd::MultifdChannel;
use preempt::PreemptChannel;
use qevm_savevm::Decoder;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::Node;
use std::collections::HashMap;

/// The channels beside the main one.
#[derive(Default)]
pub(super) struct Channels {
    multifd: Vec<MultifdChannel>,
    preempt: Vec<PreemptChannel>,
    /// How often the main channel waited.
    waits: u64,
}

impl Channels {
    /// Recognises channels by their first bytes.
    pub(super) fn open(files: &mut Vec<Named>, reencode: bool) -> Result<Self, Halt> {
        let mut channels = Channels::default();
        for Named { name, mut source } in files.drain(..) {
            source.fill(4).map_err(|error| Failure::io(&name, 0, &error))?;
            // A multifd channel can be cut off in its first bytes. A preempt channel has no first packet, and carries
            // nothing if no page was urgent.
            let cut = !source.window().is_empty() && MULTIFD_MAGIC.starts_with(source.window());
            match qevm_multifd::is_page_channel(source.window()) {
                Some(true) => channels.multifd.push(MultifdChannel::new(name, source, reencode)),
                None if cut => channels.multifd.push(MultifdChannel::new(name, source, reencode)),
                _ => channels.preempt.push(PreemptChannel { name, source, description: String::new() }),
            }
        }
        Ok(channels)
    }

    /// There is at least one multifd channel.
    pub(super) fn any_multifd(&self) -> bool {
        !self.multifd.is_empty()
    }

    /// Bytes read of all channels.
    pub(super) fn bytes(&self) -> u64 {
        let multifd = self.multifd.iter().map(MultifdChannel::offset);
        multifd.chain(self.preempt.iter().map(|channel| channel.source.offset())).sum()
    }

    /// The configurations of VFIO devices that came on multifd channels, and remarks on those that could not be read.
    pub(super) fn configurations(&mut self) -> impl Iterator<Item = (Vec<(SectionHeader, Node)>, Vec<String>)> {
        self.multifd.iter_mut().map(MultifdChannel::take_configurations)
    }

    /// Bytes of devices' own data that came on multifd channels.
    pub(super) fn device_bytes(&self) -> u64 {
        self.multifd.iter().map(MultifdChannel::device_bytes).sum()
    }

    /// One line for each channel.
    pub(super) fn describe(&self) -> Vec<String> {
        let multifd = self.multifd.iter().map(MultifdChannel::describe);
        multifd.chain(self.preempt.iter().map(|c| format!("{}: {}", c.name, c.description))).collect()
    }

    /// The main channel, at byte `at`, waits for a SYNC of every channel.
    pub(super) fn sync(&mut self, memory: &mut Memory, main: &Decoder, at: u64) -> Result<(), Halt> {
        self.waits += 1;
        for channel in &mut self.multifd {
            if !channel.until_sync(memory, main)? {
                return Err(channel.missing_sync(self.waits, at).into());
            }
        }
        Ok(())
    }

    /// The main channel is over: reads what is left.
    pub(super) fn finish(
        &mut self,
        memory: &mut Memory,
        main: &Decoder,
        postcopy: bool,
        can_break: bool,
    ) -> Result<(), Halt> {
        self.check_numbers()?;
        for channel in &mut self.multifd {
            channel.rest(memory, main, self.waits)?;
        }
        self.check_packets()?;
        if let (Some(empty), false, false) = (self.empty_channel(), self.multifd.is_empty(), postcopy) {
            let message = "the file is empty, but every multifd channel starts with a packet that names it";
            let mut failure = Failure::mismatch(&empty, 0, "multifd channel", message);
            failure.kind = "truncated";
            return Err(failure.into());
        }
        for channel in &mut self.preempt {
            channel.read(memory, main, can_break)?;
        }
        Ok(())
    }

    fn empty_channel(&mut self) -> Option<String> {
        let empty = |channel: &&mut PreemptChannel| channel.source.offset() == 0 && channel.source.window().is_empty();
        self.preempt.iter_mut().find(empty).map(|channel| channel.name.clone())
    }

    /// Packets are numbered over all channels. Up to QEMU 7.2 a race gives some numbers to two packets, and a SYNC on a
    /// packet with pages replaces its number by the next. If more numbers are missing than that, a channel is.
    fn check_packets(&self) -> Result<(), Failure> {
        let used: u64 = self.multifd.iter().map(|channel| channel.packet_numbers().0).sum();
        let numbers = self.multifd.iter().filter_map(|channel| channel.packet_numbers().1);
        let range = numbers.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
        match (range, self.multifd.first()) {
            (Some((first, last)), Some(channel)) if last - first >= used => {
                let message = format!(
                    "packets have numbers {first} to {last}, but only {used} of them came: a channel is missing"
                );
                Err(Failure::mismatch(&channel.name, channel.offset(), "multifd channels", message))
            }
            _ => Ok(()),
        }
    }

    /// Channels of one migration are numbered from 0 without gaps, and have one UUID.
    fn check_numbers(&self) -> Result<(), Failure> {
        let mut seen: HashMap<u8, &str> = HashMap::new();
        for channel in &self.multifd {
            let Some(init) = channel.init() else { continue };
            let path = format!("channel {}", init.channel);
            if let Some(other) = seen.insert(init.channel, &channel.name) {
                let message = format!("the number is that of {other} as well");
                return Err(Failure::mismatch(&channel.name, INIT_CHANNEL_AT, path, message));
            }
            let first = self.multifd[0].init();
            if first.is_some_and(|first| first.uuid != init.uuid) {
                let message = format!("the UUID differs from that of {}", self.multifd[0].name);
                return Err(Failure::mismatch(&channel.name, INIT_UUID_AT, path, message));
            }
            if usize::from(init.channel) >= self.multifd.len() {
                let message =
                    format!("number {} of {} channels given: one is missing", init.channel, self.multifd.len());
                return Err(Failure::mismatch(&channel.name, INIT_CHANNEL_AT, path, message));
            }
        }
        Ok(())
    }
}

/// The first bytes of every multifd channel.
const MULTIFD_MAGIC: [u8; 4] = qevm_multifd::layout::MAGIC.to_be_bytes();
/// Offset of the UUID in a channel's first packet.
const INIT_UUID_AT: u64 = 8;
/// Offset of the channel's number in its first packet.
const INIT_CHANNEL_AT: u64 = 24;
