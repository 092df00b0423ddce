//! The reading end of one page channel.

use crate::{
    Channel, LoadError, MigrationError,
    channel::{Target, read_at_least},
};
use qevm_multifd::{ChannelDecoder, ChannelOptions, Ending, Event, Init, RamPacket, layout::INIT_LEN, packet};
use qevm_wire::{Decode, Located, PageGeometry, Step};
use std::{io, sync::Arc};

/// A page channel, read packet by packet. Of what follows a packet, no more than its payload and the next packet's
/// header are read, so that page data never lies in a buffer here.
#[derive(Debug)]
pub(crate) struct PageStream {
    channel: Arc<dyn Channel>,
    decoder: ChannelDecoder,
    /// The header that is read, or as much of it as is here.
    header: Vec<u8>,
    filled: usize,
    /// Room for the header behind it.
    ahead: Vec<u8>,
    number: u8,
}

/// What a page channel brought.
pub(super) enum Item<'s> {
    /// A packet, whose payload is to be read from the reader.
    Packet(RamPacket<'s>, Payload<'s>),
    /// The channel was closed in an orderly way.
    End,
}

/// Reads the payload of a packet.
pub(super) struct Payload<'s> {
    channel: &'s dyn Channel,
    decoder: &'s mut ChannelDecoder,
    ahead: &'s mut Vec<u8>,
    filled: &'s mut usize,
}

impl PageStream {
    /// The channel whose first packet is `first`.
    ///
    /// # Errors
    /// The packet is none, or not for this migration.
    pub(crate) fn new(
        channel: Arc<dyn Channel>,
        first: &[u8; INIT_LEN],
        options: ChannelOptions,
    ) -> Result<Self, MigrationError> {
        let mut decoder = ChannelDecoder::new(options);
        let number = match decoder.next(first).map_err(load_error)? {
            Step::Event { event: Event::Init(Init { channel, .. }), .. } => channel,
            // The bytes are as many as the first packet has.
            _ => 0,
        };
        let len = packet::packet_len(PageGeometry::X86);
        Ok(PageStream { channel, decoder, header: vec![0; len], filled: 0, ahead: vec![0; len], number })
    }

    /// The channel's number.
    pub(crate) fn number(&self) -> u8 {
        self.number
    }

    /// The connection.
    pub(crate) fn channel(&self) -> &Arc<dyn Channel> {
        &self.channel
    }

    /// Reads the next packet. Its payload must be read before the next call.
    pub(super) fn next(&mut self) -> Result<Item<'_>, MigrationError> {
        let wanted = self.header.len() - self.filled;
        let read = read_at_least(&*self.channel, &mut [Target::bytes(&mut self.header[self.filled..])], wanted);
        self.filled += self.received(read)?;
        if self.filled < self.header.len() {
            self.decoder.ended(Ending::Closed);
        }
        let PageStream { channel, decoder, header, filled, ahead, .. } = self;
        let input = &header[..std::mem::replace(filled, 0)];
        match decoder.next(input).map_err(load_error)? {
            Step::Event { event: Event::Ram(packet), .. } => {
                Ok(Item::Packet(packet, Payload { channel: &**channel, decoder, ahead, filled }))
            }
            // Device state is refused by the decoder, and all of a packet is here.
            _ => Ok(Item::End),
        }
    }

    /// The packet and its payload are done with: the header behind it is the next.
    pub(super) fn advance(&mut self) {
        std::mem::swap(&mut self.header, &mut self.ahead);
    }

    fn received(&self, read: io::Result<usize>) -> Result<usize, MigrationError> {
        let offset = self.decoder.offset() + self.filled as u64;
        read.map_err(|source| MigrationError::Receive { offset, source })
    }
}

impl Payload<'_> {
    /// Reads the whole payload into `parts`, which are as long as it is, together with what is there of the next
    /// packet's header.
    pub(super) fn read<'p>(&'p mut self, mut parts: Vec<Target<'p>>, len: usize) -> Result<(), MigrationError> {
        let offset = self.decoder.offset();
        parts.push(Target::bytes(self.ahead));
        let read = read_at_least(self.channel, &mut parts, len);
        let read = read.map_err(|source| MigrationError::Receive { offset, source })?;
        match read.checked_sub(len) {
            Some(ahead) => {
                *self.filled = ahead;
                self.decoder.skip_payload(len as u64).map_err(load_error)
            }
            None => {
                let kind = qevm_wire::WireError::Truncated { needed: len as u64, available: read as u64 };
                Err(load_error(self.decoder.fail(kind)))
            }
        }
    }

    /// Checks the pages against the length of their block, `None` if there is no such block.
    pub(super) fn check(&self, packet: &RamPacket<'_>, used_length: Option<u64>) -> Result<(), MigrationError> {
        self.decoder.check_block(packet, used_length).map_err(load_error)
    }

    /// An error in the payload.
    pub(super) fn fail(&self, kind: impl Into<qevm_multifd::ErrorKind>) -> MigrationError {
        load_error(self.decoder.fail(kind))
    }
}

pub(super) fn load_error(error: qevm_multifd::Error) -> MigrationError {
    let error: Located<LoadError> = error.map(LoadError::Multifd);
    error.into()
}
