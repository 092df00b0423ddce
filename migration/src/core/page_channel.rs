//! What the destination does with a page channel.

use crate::{LoadError, MigrationError};
use qevm_multifd::layout::INIT_LEN;
use qevm_multifd::{ChannelDecoder, ChannelOptions, DeviceState, Ending, Event, Init, RamPacket};
use qevm_wire::{Decode, Located, Step, WireError};

/// The reader of one page channel: shown what has arrived, it says what to do with it.
#[derive(Debug)]
pub struct PageChannel {
    decoder: ChannelDecoder,
    number: u8,
    /// The last packet is a point of synchronisation, when its pages are in their places.
    sync: bool,
}

/// What to do next on a page channel.
#[derive(Debug)]
pub struct PageTurn<'a> {
    /// How many bytes at the front of the input are done with.
    pub consumed: usize,
    /// What to do.
    pub action: PageAction<'a>,
}

/// What to do next on a page channel. An action that was not carried out is given again.
#[derive(Debug)]
pub enum PageAction<'a> {
    /// Show more of the channel: at least this many bytes, counted from the front of this input.
    Read {
        /// How many.
        at_least: usize,
    },
    /// Clear the pages of [`zero_runs`](RamPacket::zero_runs), and make ready those of
    /// [`normal_runs`](RamPacket::normal_runs): the next [`payload_len`](RamPacket::payload_len) bytes of the channel
    /// are their content. The pages lie in their block.
    Packet(RamPacket<'a>),
    /// The next [`payload_len`](DeviceState::payload_len) bytes of the channel are a piece of a device's state: give it
    /// to the [`DeviceStates`](super::DeviceStates), or [refuse](PageChannel::refuse) it.
    DeviceState(DeviceState),
    /// This many bytes of the last packet's content have not been [placed](PageChannel::placed).
    Payload {
        /// How many.
        remaining: u64,
    },
    /// Tell the [`Synchronisation`](super::Synchronisation), and do not go on while it says to wait.
    Synchronise,
    /// The channel was closed in an orderly way.
    End,
}

impl PageChannel {
    /// The channel whose first packet is `first`.
    ///
    /// # Errors
    /// The packet is none, or not for this migration.
    pub fn new(first: &[u8; INIT_LEN], options: ChannelOptions) -> Result<Self, MigrationError> {
        let mut decoder = ChannelDecoder::new(options);
        let number = match decoder.next(first).map_err(load_error)? {
            Step::Event { event: Event::Init(Init { channel, .. }), .. } => channel,
            // The bytes are as many as the first packet has.
            _ => 0,
        };
        Ok(PageChannel { decoder, number, sync: false })
    }

    /// The channel's number.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Bytes of the channel that are done with.
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// What to do next, where `input` is what has arrived and is not done with. `length_of` tells the length in bytes
    /// of a RAM block that the main channel has listed.
    ///
    /// # Errors
    /// What arrived is wrong, or ends too early.
    pub fn next<'a>(
        &mut self,
        input: &'a [u8],
        length_of: impl FnOnce(&[u8]) -> Option<u64>,
    ) -> Result<PageTurn<'a>, MigrationError> {
        if self.sync && self.decoder.payload_remaining() == 0 {
            self.sync = false;
            return Ok(PageTurn { consumed: 0, action: PageAction::Synchronise });
        }
        let (consumed, action) = match self.decoder.next(input).map_err(load_error)? {
            Step::Event { consumed, event: Event::Ram(packet) } => {
                if packet.has_pages() {
                    self.decoder.check_block(&packet, length_of(packet.block_bytes())).map_err(load_error)?;
                }
                self.sync = packet.is_sync();
                (consumed, PageAction::Packet(packet))
            }
            Step::Event { consumed, event: Event::DeviceState(packet) } => (consumed, PageAction::DeviceState(packet)),
            Step::Event { event, .. } => {
                let unsupported = LoadError::Unsupported(format!("{event:?} on a page channel"));
                return Err(Located::new(unsupported, self.decoder.offset()).into());
            }
            Step::Payload { remaining, .. } => (0, PageAction::Payload { remaining }),
            Step::NeedMore { at_least } => (0, PageAction::Read { at_least }),
            Step::End => (0, PageAction::End),
        };
        Ok(PageTurn { consumed, action })
    }

    /// This many bytes of the last packet's content are in their places.
    ///
    /// # Errors
    /// They are more than there are.
    pub fn placed(&mut self, count: u64) -> Result<(), MigrationError> {
        self.decoder.skip_payload(count).map_err(load_error)
    }

    /// Nothing more comes.
    pub fn end_of_input(&mut self) {
        self.decoder.ended(Ending::Closed);
    }

    /// The error of a channel that ends when only this many of the last packet's bytes, of `len`, have arrived.
    pub fn cut(&self, len: u64, arrived: u64) -> MigrationError {
        self.fail(WireError::Truncated { needed: len, available: arrived })
    }

    /// The last packet is one that cannot be used.
    pub fn refuse(&self, kind: impl Into<LoadError>) -> MigrationError {
        let error = Located::new(kind.into(), self.decoder.offset());
        error.within(format!("page channel {}", self.number)).into()
    }

    /// An error in the last packet's content.
    pub fn fail(&self, kind: impl Into<qevm_multifd::ErrorKind>) -> MigrationError {
        load_error(self.decoder.fail(kind))
    }
}

fn load_error(error: qevm_multifd::Error) -> MigrationError {
    let error: Located<LoadError> = error.map(LoadError::Multifd);
    error.into()
}
