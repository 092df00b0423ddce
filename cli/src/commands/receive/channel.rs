//! A channel beside the main one, as it arrives: saved, and if it is a page channel, followed packet by packet, so that
//! what is wrong shows while the source can still go on by itself.

use super::gate::{Caller, Known};
use super::ledger::{Delivered, Ledger};
use crate::failure::Failure;
use crate::output_file::OutputFile;
use crate::socket::Socket;
use qevm_multifd::{ChannelDecoder, ChannelOptions, Compression, Ending, Event};
use qevm_wire::{Decode, PageGeometry, Step};
use std::io::{self, Read, Write};
use std::sync::Arc;

/// Bytes that are read at a time.
pub(super) const CHUNK: usize = 256 << 10;

/// One connection and the file that it is saved to.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) socket: Socket,
    output: Arc<OutputFile>,
    /// The file's name, by which errors call the channel.
    name: String,
    /// The number of a page channel; `None` for the second channel of postcopy.
    pub(super) number: Option<u8>,
    /// Once the page size is known.
    decoder: Option<ChannelDecoder>,
    delivered: Delivered,
    /// The last packet is a SYNC, which counts when all of it has come.
    sync: bool,
    /// What was read and not yet followed, from `start` on.
    input: Vec<u8>,
    start: usize,
    /// Bytes read.
    read: u64,
}

impl Channel {
    /// Saves `caller` to `output`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn new(caller: Caller, output: Arc<OutputFile>) -> Result<Self, Failure> {
        let Caller { socket, first, known, .. } = caller;
        let name = output.path().display().to_string();
        output.file().write_all(&first).map_err(|error| Failure::io(&name, 0, &error))?;
        let number = match known {
            Known::PageChannel(init) => Some(init.channel),
            Known::Main | Known::Preempt => None,
        };
        let read = first.len() as u64;
        let delivered = Delivered::default();
        Ok(Channel {
            socket,
            output,
            name,
            number,
            decoder: None,
            delivered,
            sync: false,
            input: first,
            start: 0,
            read,
        })
    }

    /// The file that it is saved to.
    pub(super) fn output(&self) -> &Arc<OutputFile> {
        &self.output
    }

    /// True once what comes can be followed, for which the page size is needed. Until then it waits in the socket.
    pub(super) fn can_follow(&self, ledger: &Ledger) -> bool {
        self.number.is_none() || self.decoder.is_some() || ledger.page_geometry().is_some()
    }

    /// Takes what has arrived; false once the channel is over.
    ///
    /// # Errors
    /// It breaks off, cannot be saved, or is not what `compression` and the main channel say.
    pub(super) fn advance(
        &mut self,
        chunk: &mut [u8],
        compression: Option<Compression>,
        ledger: &Ledger,
    ) -> Result<bool, Failure> {
        let count = match (&self.socket).read(chunk) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(true);
            }
            Err(error) => return Err(Failure::io(&self.name, self.read, &error)),
        };
        let fresh = &chunk[..count];
        self.output.file().write_all(fresh).map_err(|error| Failure::io(&self.name, self.read, &error))?;
        self.read += count as u64;
        ledger.count(count);
        let Some(number) = self.number else { return Ok(count > 0) };
        self.input.extend_from_slice(fresh);
        let mut decoder = match self.decoder.take() {
            Some(decoder) => decoder,
            None => {
                let pages = ledger.page_geometry().unwrap_or(PageGeometry::X86);
                ChannelDecoder::new(ChannelOptions { pages, compression, ..ChannelOptions::default() })
            }
        };
        if count == 0 {
            decoder.ended(Ending::Closed);
        }
        let goes_on = self.follow(&mut decoder, number, count == 0, ledger);
        self.decoder = Some(decoder);
        self.input.drain(..self.start);
        self.start = 0;
        goes_on
    }

    /// Follows the packets that are there.
    fn follow(
        &mut self,
        decoder: &mut ChannelDecoder,
        number: u8,
        ended: bool,
        ledger: &Ledger,
    ) -> Result<bool, Failure> {
        loop {
            let located = |error| Failure::located(&self.name, error);
            let there = (self.input.len() - self.start) as u64;
            let skipped = decoder.payload_remaining().min(there);
            decoder.skip_payload(skipped).map_err(located)?;
            self.start += skipped as usize;
            if decoder.payload_remaining() > 0 && !ended {
                return Ok(true);
            }
            if std::mem::take(&mut self.sync) {
                self.delivered.syncs += 1;
                ledger.channel_sync(number, self.delivered);
            }
            match decoder.next(&self.input[self.start..]).map_err(located)? {
                Step::Event { consumed, event } => {
                    self.start += consumed;
                    if let Event::Ram(packet) = &event {
                        let num = packet.packet_num();
                        let (first, last) = self.delivered.range.unwrap_or((num, num));
                        self.delivered.range = Some((first.min(num), last.max(num)));
                        // A SYNC that is put on a packet with pages gives it a further number, in place of its own.
                        self.delivered.numbers += 1 + u64::from(packet.is_sync() && packet.has_pages());
                        self.sync = packet.is_sync();
                    }
                }
                Step::Payload { remaining, .. } => {
                    let message = format!("the connection ends {remaining} bytes early");
                    let failure = Failure::mismatch(&self.name, self.read, "multifd channel", message);
                    return Err(Failure { kind: "truncated", ..failure });
                }
                Step::NeedMore { .. } => return Ok(true),
                Step::End => {
                    ledger.channel_ended(number);
                    return Ok(false);
                }
            }
        }
    }
}
