//! The reading end of one page channel.

use crate::channel::{ReadSlice, read_at_least};
use crate::core::PageChannel;
use crate::{Channel, MigrationError};
use qevm_multifd::layout::INIT_LEN;
use qevm_multifd::{ChannelOptions, packet};
use qevm_wire::PageGeometry;
use std::sync::Arc;

/// A page channel, read packet by packet. Of what follows a packet, no more than its payload and the next packet's
/// header are read, so that page data never lies in a buffer here.
#[derive(Debug)]
pub(crate) struct PageStream {
    pub(super) channel: Arc<dyn Channel>,
    pub(super) core: PageChannel,
    /// The header that is read, or as much of it as is here.
    pub(super) header: Vec<u8>,
    pub(super) filled: usize,
    /// Room for the header after it.
    pub(super) ahead: Vec<u8>,
}

/// Reads the payload of a packet.
pub(super) struct Payload<'s> {
    pub(super) channel: &'s dyn Channel,
    pub(super) core: &'s mut PageChannel,
    pub(super) ahead: &'s mut Vec<u8>,
    pub(super) filled: &'s mut usize,
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
        let core = PageChannel::new(first, options)?;
        let len = packet::packet_len(PageGeometry::X86);
        Ok(PageStream { channel, core, header: vec![0; len], filled: 0, ahead: vec![0; len] })
    }

    /// The channel's number.
    pub(crate) fn number(&self) -> u8 {
        self.core.number()
    }

    /// The connection.
    pub(crate) fn channel(&self) -> &Arc<dyn Channel> {
        &self.channel
    }

    /// Reads until this many bytes of the header are here, or the channel ends.
    pub(super) fn fill(&mut self, at_least: usize) -> Result<(), MigrationError> {
        // A packet is as long as the room for it.
        let wanted = at_least.min(self.header.len()).saturating_sub(self.filled);
        let read = read_at_least(&*self.channel, &mut [ReadSlice::bytes(&mut self.header[self.filled..])], wanted);
        let offset = self.core.offset() + self.filled as u64;
        let count = read.map_err(|source| MigrationError::Receive { offset, source })?;
        self.filled += count;
        if count < wanted || wanted == 0 {
            self.core.end_of_input();
        }
        Ok(())
    }

    /// Reads the content of a packet whose header took `consumed` bytes into `content`, whatever that holds. It is
    /// short, so some of what follows may be here already.
    pub(super) fn read_content(
        &mut self,
        consumed: usize,
        len: usize,
        content: &mut Vec<u8>,
    ) -> Result<(), MigrationError> {
        let here = self.header.get(consumed..self.filled).unwrap_or_default();
        let front = here.len().min(len);
        // The core has checked the length against its limit.
        content.resize(len, 0);
        content[..front].copy_from_slice(&here[..front]);
        if front < len {
            self.filled = 0;
            let PageStream { channel, core, ahead, filled, .. } = self;
            let mut payload = Payload { channel: &**channel, core, ahead, filled };
            payload.read_rest(vec![ReadSlice::bytes(&mut content[front..])], front, len)?;
            self.advance();
        } else {
            self.header.copy_within(consumed + front..self.filled, 0);
            self.filled -= consumed + front;
            self.core.placed(len as u64)?;
        }
        Ok(())
    }

    /// The packet and its payload are done with: the header after it is the next.
    pub(super) fn advance(&mut self) {
        std::mem::swap(&mut self.header, &mut self.ahead);
    }
}

impl Payload<'_> {
    /// Reads the whole payload into `parts`, which are as long as it is, together with what is there of the next
    /// packet's header.
    pub(super) fn read<'p>(&'p mut self, parts: Vec<ReadSlice<'p>>, len: usize) -> Result<(), MigrationError> {
        self.read_rest(parts, 0, len)
    }

    /// The same with a payload of which the first `here` bytes are not read any more.
    fn read_rest<'p>(
        &'p mut self,
        mut parts: Vec<ReadSlice<'p>>,
        here: usize,
        len: usize,
    ) -> Result<(), MigrationError> {
        let offset = self.core.offset() + here as u64;
        parts.push(ReadSlice::bytes(self.ahead));
        let read = read_at_least(self.channel, &mut parts, len - here);
        let read = read.map_err(|source| MigrationError::Receive { offset, source })?;
        match (here + read).checked_sub(len) {
            Some(ahead) => {
                *self.filled = ahead;
                self.core.placed(len as u64)
            }
            None => Err(self.core.cut(len as u64, (here + read) as u64)),
        }
    }

    /// An error in the payload.
    pub(super) fn fail(&self, kind: impl Into<qevm_multifd::ErrorKind>) -> MigrationError {
        self.core.fail(kind)
    }
}
