//! The page channels of a migration that is written again.

use crate::failure::{Error, Failure};
use qevm_multifd::compression::Compressor;
use qevm_multifd::{ChannelEncoder, Compression, EncoderOptions, Init, PacketLayout, Pages, Uuid};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{CountedString, PageGeometry, Profile, Writer};
use std::io::Write;

/// How pages travel on page channels.
#[derive(Debug, Clone)]
pub struct ChannelForm {
    /// What the destination reads.
    pub profile: Profile,
    /// `multifd-compression`.
    pub compression: Compression,
    /// `multifd-zlib-level` or `multifd-zstd-level`; the default if it is left out.
    pub level: Option<i32>,
    /// UUID of the guest, all zero if it has none.
    pub uuid: Uuid,
}

/// The page channels, in use by turns.
pub struct Channels<W> {
    channels: Vec<Channel<W>>,
    next: usize,
    batch: Batch,
    slots: usize,
    packet_num: u64,
    zero_in_packets: bool,
}

struct Channel<W> {
    encoder: ChannelEncoder,
    compressor: Compressor,
    out: W,
    name: String,
    sent: u64,
}

/// Pages of one RAM block that go into the next packet.
#[derive(Default)]
struct Batch {
    block: Option<CountedString>,
    normal: Vec<u64>,
    zero: Vec<u64>,
    content: Vec<u8>,
}

impl<W> std::fmt::Debug for Channels<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channels").field("channels", &self.channels.len()).finish_non_exhaustive()
    }
}

impl<W: Write> Channels<W> {
    /// Opens a channel over each of `outs`, which errors call by the names beside them.
    ///
    /// # Errors
    /// [`Error::Usage`] for a level that the method does not have, or a method that cannot be written here.
    pub fn open(outs: Vec<(String, W)>, form: &ChannelForm, pages: PageGeometry) -> Result<Self, Error> {
        let layout = PacketLayout::of(&form.profile);
        let mut channels = Vec::with_capacity(outs.len());
        for (number, (name, out)) in outs.into_iter().enumerate() {
            let compressor =
                Compressor::new(form.compression, form.level).map_err(|error| Error::Usage(error.to_string()))?;
            let options = EncoderOptions { layout, pages, compression: form.compression };
            let mut channel = Channel { encoder: ChannelEncoder::new(options), compressor, out, name, sent: 0 };
            let mut writer = Writer::new();
            let init = Init::new(form.uuid, number as u8);
            channel.encoder.init(&init, &mut writer).map_err(cannot_write)?;
            channel.send(writer.as_bytes())?;
            channels.push(channel);
        }
        Ok(Channels {
            channels,
            next: 0,
            batch: Batch::default(),
            slots: qevm_multifd::packet::slots(pages) as usize,
            packet_num: 0,
            zero_in_packets: form.profile.zero_page_detection == ZeroPageDetection::Multifd,
        })
    }

    /// Zero pages go into packets; otherwise they are ZERO records of the main channel.
    pub fn takes_zero_pages(&self) -> bool {
        self.zero_in_packets
    }

    /// Queues a page; `None` is one of zeroes.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if a channel cannot be written.
    pub fn page(&mut self, block: &CountedString, offset: u64, content: Option<&[u8]>) -> Result<(), Error> {
        let full = self.batch.normal.len() + self.batch.zero.len() == self.slots;
        if full || self.batch.block.as_ref() != Some(block) {
            self.send_batch()?;
            self.batch.block = Some(block.clone());
        }
        match content {
            Some(content) => {
                self.batch.normal.push(offset);
                self.batch.content.extend_from_slice(content);
            }
            None => self.batch.zero.push(offset),
        }
        Ok(())
    }

    /// Sends what is queued, then a SYNC packet on every channel.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if a channel cannot be written.
    pub fn sync(&mut self) -> Result<(), Error> {
        self.send_batch()?;
        for channel in &mut self.channels {
            let mut writer = Writer::new();
            channel.encoder.sync(self.packet_num, &mut writer).map_err(cannot_write)?;
            self.packet_num += 1;
            channel.send(writer.as_bytes())?;
        }
        Ok(())
    }

    /// Bytes sent on all channels.
    pub fn sent(&self) -> u64 {
        self.channels.iter().map(|channel| channel.sent).sum()
    }

    fn send_batch(&mut self) -> Result<(), Error> {
        let Batch { block: Some(block), normal, zero, content } = std::mem::take(&mut self.batch) else {
            return Ok(());
        };
        if self.channels.is_empty() || (normal.is_empty() && zero.is_empty()) {
            return Ok(());
        }
        self.next = (self.next + 1) % self.channels.len();
        let channel = &mut self.channels[self.next];
        let mut payload = Vec::new();
        if !normal.is_empty() {
            let page_len = content.len() / normal.len();
            channel
                .compressor
                .packet(content.chunks_exact(page_len), &mut payload)
                .map_err(|error| Error::Usage(error.to_string()))?;
        }
        let pages = Pages { block: &block, normal: &normal, zero: &zero, packet_num: self.packet_num };
        self.packet_num += 1;
        let mut writer = Writer::new();
        channel.encoder.pages(&pages, payload.len() as u64, &mut writer).map_err(cannot_write)?;
        channel.send(writer.as_bytes())?;
        channel.send(&payload)
    }
}

impl<W: Write> Channel<W> {
    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(|error| Failure::io(&self.name, self.sent, &error))?;
        self.sent += bytes.len() as u64;
        Ok(())
    }
}

/// Mistakes of this module, not of a peer: what it writes does not fit the format.
fn cannot_write(error: qevm_multifd::Error) -> Error {
    Failure::located("output", error).into()
}
