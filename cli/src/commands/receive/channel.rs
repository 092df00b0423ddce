//! A channel beside the main one, as it arrives: saved, and if it is a page channel, followed packet by packet, so that
//! what is wrong shows while the source can still go on by itself.

use super::gate::{Caller, Known};
use super::ledger::{Ledger, Numbers};
use crate::socket::Socket;
use qevm_inspect::failure::Failure;
use qevm_inspect::output_file::OutputFile;
use qevm_multifd::{ChannelDecoder, ChannelOptions, Compression, Event};
use qevm_wire::{Buffered, Decode, DriveError, PageGeometry, Window, next_event, skip_payload};
use std::io::{self, Read, Write};
use std::sync::Arc;

/// Bytes that are read of a channel before it is the next one's turn.
const TURN: usize = 256 << 10;

/// One connection and the file that it is saved to.
#[derive(Debug)]
pub(super) struct Channel {
    /// What was read and not yet followed, and the rest.
    input: Buffered<Tee>,
    /// The number of a page channel; `None` for the second channel of postcopy.
    pub(super) number: Option<u8>,
    /// Once the page size is known.
    decoder: Option<ChannelDecoder>,
    numbers: Numbers,
    /// The last packet is a SYNC, which counts when all of it has come.
    sync: bool,
    /// It was not read on at a SYNC, and what follows may have been read from the socket already.
    waits: bool,
    /// It was not read to its end, and a TLS session may have more that is not in the socket.
    more: bool,
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
        let input = Buffered::new(Tee { socket, output, name, first, read, turn: 0, arrived: 0 });
        Ok(Channel { input, number, decoder: None, numbers: Numbers::default(), sync: false, waits: false, more: true })
    }

    /// The connection.
    pub(super) fn socket(&self) -> &Socket {
        &self.input.input().socket
    }

    /// The file that it is saved to.
    pub(super) fn output(&self) -> &Arc<OutputFile> {
        &self.input.input().output
    }

    /// True if what comes can be followed: not before the page size is known, and not while others have to synchronise
    /// with it. Until then it waits in the socket.
    pub(super) fn can_follow(&self, ledger: &Ledger) -> bool {
        self.number.is_none_or(|number| match &self.decoder {
            Some(_) => !(self.waits && ledger.channel_waits(number)),
            None => ledger.page_geometry().is_some(),
        })
    }

    /// True if it stopped for a synchronisation, or where there may be more: the socket need not have anything then.
    pub(super) fn waits(&self) -> bool {
        self.waits || self.more
    }

    /// Takes what has arrived; false once the channel is over.
    ///
    /// # Errors
    /// It breaks off, cannot be saved, or is not what `compression` and the main channel say.
    pub(super) fn advance(&mut self, compression: Option<Compression>, ledger: &Ledger) -> Result<bool, Failure> {
        self.input.input_mut().turn = TURN;
        self.waits = false;
        let goes_on = match self.number {
            Some(number) => self.follow(number, compression, ledger),
            None => self.input.skip(u64::MAX).map(|count| count > 0).map_err(DriveError::from),
        };
        let tee = self.input.input_mut();
        self.more = tee.turn == 0;
        ledger.count(std::mem::take(&mut tee.arrived));
        match goes_on {
            Err(DriveError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(Failure::driven(&tee.name, tee.read, error)),
            Ok(goes_on) => Ok(goes_on),
        }
    }

    /// Follows the packets until the next SYNC, or until nothing is there, which is the error `WouldBlock`.
    fn follow(
        &mut self,
        number: u8,
        compression: Option<Compression>,
        ledger: &Ledger,
    ) -> Result<bool, DriveError<qevm_multifd::ErrorKind>> {
        let pages = ledger.page_geometry().unwrap_or(PageGeometry::X86);
        let decoder = self.decoder.get_or_insert_with(|| {
            ChannelDecoder::new(ChannelOptions { pages, compression, ..ChannelOptions::default() })
        });
        loop {
            if self.sync {
                // It is passed over before the next packet, but that one may be long in coming.
                skip_payload(&mut self.input, decoder)?;
                if decoder.payload_remaining() == 0 {
                    self.sync = false;
                    ledger.channel_sync(number, self.numbers).map_err(|error| decoder.fail(error))?;
                    if ledger.channel_waits(number) {
                        self.waits = true;
                        return Ok(true);
                    }
                }
            }
            let Some((event, read)) = next_event(&mut self.input, decoder)? else {
                ledger.channel_ended(number).map_err(|error| decoder.fail(error))?;
                return Ok(false);
            };
            if let Event::Ram(packet) = &event {
                let num = packet.packet_num();
                let (first, last) = self.numbers.range.unwrap_or((num, num));
                self.numbers.range = Some((first.min(num), last.max(num)));
                // A SYNC that is put on a packet with pages gives it a further number, in place of its own.
                self.numbers.used += 1 + u64::from(packet.is_sync() && packet.has_pages());
                self.sync = packet.is_sync();
            }
            let consumed = read.len();
            self.input.consume(consumed);
        }
    }
}

/// Gives what comes from the socket, and saves it. When it is the next channel's turn, it says that nothing is there.
#[derive(Debug)]
struct Tee {
    socket: Socket,
    output: Arc<OutputFile>,
    /// The file's name, by which errors call the channel.
    name: String,
    /// What was read to recognise it, and is saved already.
    first: Vec<u8>,
    /// Bytes that were read in all.
    read: u64,
    /// Bytes that may still be read in this turn.
    turn: usize,
    /// Bytes that were read and not yet counted.
    arrived: usize,
}

impl Read for Tee {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.first.is_empty() {
            let count = self.first.len().min(buffer.len());
            buffer[..count].copy_from_slice(&self.first[..count]);
            self.first.drain(..count);
            return Ok(count);
        }
        if self.turn == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let room = buffer.len().min(self.turn);
        let count = (&self.socket).read(&mut buffer[..room])?;
        self.output.file().write_all(&buffer[..count])?;
        self.read += count as u64;
        self.arrived += count;
        self.turn -= count;
        Ok(count)
    }
}
