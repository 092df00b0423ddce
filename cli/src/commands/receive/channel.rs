//! A channel beside the main one, as it arrives: saved, and if it is a page channel, followed packet by packet.

use super::ledger::Ledger;
use crate::failure::Failure;
use crate::socket::Socket;
use qevm_multifd::{ChannelDecoder, ChannelOptions, Compression, Ending, Event, Init};
use qevm_wire::Step;
use std::fs::File;
use std::io::{self, Read, Write};
use std::thread;
use std::time::Duration;

/// Bytes that are read at a time.
const CHUNK: usize = 256 << 10;
/// How long a source is let alone before it hears of a fault. QEMU 7.2 stands still, monitor and guest included, if a
/// page channel is closed while it opens the others.
const REFUSAL_DELAY: Duration = Duration::from_millis(500);
/// Bytes of a page channel's first packet.
const INIT_LEN: usize = 64;

/// One connection and the file that it is saved to.
pub(super) struct Channel<'l> {
    socket: Socket,
    file: File,
    /// The file's name, by which errors call the channel.
    name: String,
    ledger: &'l Ledger,
    /// What was read and not yet followed, from `start` on.
    input: Vec<u8>,
    start: usize,
    /// Bytes read.
    read: u64,
    chunk: Vec<u8>,
}

impl<'l> Channel<'l> {
    /// A connection of which `first` was read to recognise it.
    pub(super) fn new(socket: Socket, first: Vec<u8>, file: File, name: String, ledger: &'l Ledger) -> Self {
        let read = first.len() as u64;
        Channel { socket, file, name, ledger, input: first, start: 0, read, chunk: vec![0; CHUNK] }
    }

    /// Saves a channel that is no page channel (postcopy-preempt) as it comes.
    pub(super) fn save(mut self) {
        if let Err(failure) = self.save_first().and_then(|()| self.save_rest()) {
            self.ledger.fail(failure);
        }
    }

    /// Saves a page channel and follows its packets: what is wrong shows while the source can still go on by itself.
    pub(super) fn follow(mut self, compression: Option<Compression>) {
        let opened = self.save_first().and_then(|()| self.open());
        let failed = match opened {
            Ok(init) => {
                // Only now, so that the channel counts from the moment on in which it is no longer unknown.
                self.ledger.recognised();
                self.packets(init.channel, compression).err()
            }
            Err(failure) => Some(failure),
        };
        if let Some(failure) = failed {
            // A channel that was not recognised holds up the end meanwhile.
            thread::sleep(REFUSAL_DELAY);
            self.ledger.fail(failure);
        }
    }

    fn save_first(&mut self) -> Result<(), Failure> {
        self.file.write_all(&self.input).map_err(|error| Failure::io(&self.name, 0, &error))
    }

    fn save_rest(&mut self) -> Result<(), Failure> {
        while self.more()? > 0 {
            self.input.clear();
        }
        Ok(())
    }

    /// Reads the first packet, and leaves it in the input.
    fn open(&mut self) -> Result<Init, Failure> {
        while self.input.len() < INIT_LEN {
            if self.more()? == 0 {
                return Err(self.truncated(format!("the connection ends in its first packet of {INIT_LEN} bytes")));
            }
        }
        let init = Init::decode(&self.input).map_err(|error| Failure::located(&self.name, error))?;
        self.ledger.channel_opened(&self.name, &init)?;
        Ok(init)
    }

    fn packets(&mut self, number: u8, compression: Option<Compression>) -> Result<(), Failure> {
        // After a failure elsewhere nothing is left to do.
        let Some(pages) = self.ledger.page_geometry() else { return Ok(()) };
        let mut decoder = ChannelDecoder::new(ChannelOptions { pages, compression, ..ChannelOptions::default() });
        loop {
            let step = decoder.next(&self.input[self.start..]).map_err(|error| Failure::located(&self.name, error))?;
            match step {
                Step::Event { consumed, event } => {
                    let is_sync = matches!(&event, Event::Ram(packet) if packet.is_sync());
                    self.start += consumed;
                    self.payload(&mut decoder)?;
                    if is_sync {
                        self.ledger.channel_sync(number);
                    }
                }
                Step::Payload { .. } => self.payload(&mut decoder)?,
                Step::NeedMore { .. } => {
                    self.input.drain(..self.start);
                    self.start = 0;
                    if self.more()? == 0 {
                        decoder.end_of_input(Ending::Closed);
                    }
                }
                Step::End => {
                    self.ledger.channel_ended(number);
                    return Ok(());
                }
            }
        }
    }

    /// Moves past the payload of the last packet.
    fn payload(&mut self, decoder: &mut ChannelDecoder) -> Result<(), Failure> {
        loop {
            let count = decoder.payload_remaining().min((self.input.len() - self.start) as u64);
            decoder.skip_payload(count).map_err(|error| Failure::located(&self.name, error))?;
            self.start += count as usize;
            if decoder.payload_remaining() == 0 {
                return Ok(());
            }
            self.input.clear();
            self.start = 0;
            if self.more()? == 0 {
                return Err(self.truncated(format!("the connection ends {} bytes early", decoder.payload_remaining())));
            }
        }
    }

    /// Reads what has arrived, saves it and appends it to the input; 0 at the end.
    fn more(&mut self) -> Result<usize, Failure> {
        let count = loop {
            match self.socket.read(&mut self.chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(|error| Failure::io(&self.name, self.read, &error))?,
            }
        };
        let fresh = &self.chunk[..count];
        self.file.write_all(fresh).map_err(|error| Failure::io(&self.name, self.read, &error))?;
        self.input.extend_from_slice(fresh);
        self.read += count as u64;
        self.ledger.count(count);
        Ok(count)
    }

    fn truncated(&self, message: String) -> Failure {
        Failure { kind: "truncated", ..Failure::mismatch(&self.name, self.read, "multifd channel", message) }
    }
}
