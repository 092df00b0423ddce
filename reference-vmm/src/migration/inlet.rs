//! The reading end of a channel: a buffer for records, and a way past it for pages.

use super::{Channel, MigrationError, channel::Target, page_file::PageFile};
use std::io;
use vm_memory::{Bytes, VolatileSlice};

/// Bytes that were read and not used yet.
pub(crate) struct Inlet<'c> {
    channel: &'c dyn Channel,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    received: u64,
}

/// Room of the buffer at first: enough for the records of many small pages, little enough for a second-level cache.
const ROOM: usize = 128 << 10;

impl<'c> Inlet<'c> {
    /// `first` is what was read from the channel already. Bytes are counted from `offset` on.
    pub(crate) fn new(channel: &'c dyn Channel, first: &[u8], offset: u64) -> Self {
        let mut buffer = first.to_vec();
        buffer.resize(first.len().max(ROOM), 0);
        Inlet { channel, buffer, start: 0, end: first.len(), received: offset + first.len() as u64 }
    }

    /// What has arrived and is not used.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Where the next byte to use is: so many bytes were used so far, and lie in front of the stream in its file.
    pub(crate) fn offset(&self) -> u64 {
        self.received - self.bytes().len() as u64
    }

    /// Leaves everything out up to byte `offset`, which is not behind what is here or what the file has.
    pub(crate) fn jump(&mut self, offset: u64, file: &PageFile) -> Result<(), MigrationError> {
        let distance = offset.saturating_sub(self.offset());
        match usize::try_from(distance).ok().filter(|distance| *distance <= self.bytes().len()) {
            Some(distance) => self.consume(distance),
            None => {
                file.seek(offset).map_err(|source| MigrationError::Receive { offset: self.received, source })?;
                (self.start, self.end, self.received) = (0, 0, offset);
            }
        }
        Ok(())
    }

    /// Uses up the first `count` bytes.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// Reads until at least `at_least` bytes are there; false if the peer closed before.
    pub(crate) fn fill(&mut self, at_least: usize) -> Result<bool, MigrationError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < at_least {
            if self.end == self.buffer.len() {
                // Grows as data arrives, not as the peer promises.
                self.buffer.resize(at_least.min(2 * self.buffer.len()), 0);
            }
            let room = &mut self.buffer[self.end..];
            match read(self.channel, &mut [Target::bytes(room)], self.received)? {
                0 => return Ok(false),
                count => {
                    self.end += count;
                    self.received += count as u64;
                }
            }
        }
        Ok(true)
    }

    /// Moves the next bytes into all of `memory`: those that are in the buffer from there, the others straight from the
    /// channel, together with as much as comes behind them. False if the peer closed before.
    pub(crate) fn read_into(&mut self, memory: &VolatileSlice<'_>) -> Result<bool, MigrationError> {
        let buffered = self.bytes().len().min(memory.len());
        // The slice is at least that long.
        let copied = memory.write_slice(&self.buffer[self.start..self.start + buffered], 0);
        copied.map_err(|error| MigrationError::Guest { doing: "write guest memory", source: error.into() })?;
        self.start += buffered;
        let mut done = buffered;
        while done < memory.len() {
            (self.start, self.end) = (0, 0);
            let rest = memory
                .offset(done)
                .map_err(|error| MigrationError::Guest { doing: "write guest memory", source: error.into() })?;
            let mut targets = [Target::guest(&rest), Target::bytes(&mut self.buffer)];
            match read(self.channel, &mut targets, self.received)? {
                0 => return Ok(false),
                count => {
                    self.received += count as u64;
                    let direct = count.min(rest.len());
                    done += direct;
                    self.end = count - direct;
                }
            }
        }
        Ok(true)
    }
}

fn read(channel: &dyn Channel, targets: &mut [Target<'_>], offset: u64) -> Result<usize, MigrationError> {
    loop {
        match channel.read(targets) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(MigrationError::Receive { offset, source }),
            Ok(count) => return Ok(count),
        }
    }
}
