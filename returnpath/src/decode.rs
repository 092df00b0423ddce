//! The decoder of the return path: bytes in, events out.

use crate::{
    Error, ErrorKind, Event, MessageError, Reader,
    message::{BITMAP_END, Message},
};
use qevm_wire::{CountedString, Limits, Located, Step, WireError};

/// Reads a return path: [`next`](Decoder::next) is shown bytes and gives the message at their front.
///
/// The decoder holds no bytes. The bitmap behind [`Message::RecvBitmap`] is payload, which the caller moves itself and
/// reports with [`skip_payload`](Decoder::skip_payload); [`Event::BitmapEnd`] follows it. After an error the decoder
/// stays where it was and gives the same error again. Behind SHUT the return path is over.
///
/// ```
/// use qevm_returnpath::{Decoder, Event, Message};
/// use qevm_wire::Step;
///
/// // What QEMU 10.0 sends for a precopy without errors: PONG 1, SHUT 0.
/// let input = [0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0];
/// let mut decoder = Decoder::default();
/// let pong = Event::Message(Message::Pong { value: 1 });
/// assert_eq!(decoder.next(&input)?, Step::Event { consumed: 8, event: pong });
/// assert_eq!(decoder.next(&input[8..9])?, Step::NeedMore { at_least: 2 });
/// let shut = Event::Message(Message::Shut { status: 0 });
/// assert_eq!(decoder.next(&input[8..])?, Step::Event { consumed: 8, event: shut });
/// assert_eq!(decoder.next(&[])?, Step::End);
/// # Ok::<(), qevm_returnpath::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    limits: Limits,
    state: State,
    offset: u64,
    payload: u64,
    messages: u64,
    input_ended: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum State {
    #[default]
    Message,
    /// The bitmap of this block and its end mark are next.
    Bitmap(CountedString),
    Shut,
}

impl Decoder {
    /// A decoder for a return path from its first byte.
    pub fn new(limits: Limits) -> Self {
        Decoder { limits, ..Decoder::default() }
    }

    /// Reads the event at the front of `input`, which starts where the last event and its payload ended.
    ///
    /// # Errors
    /// What is wrong with the message, with its offset and path. Input that ends too early is only an error after
    /// [`end_of_input`](Self::end_of_input); that it ends without SHUT is none here, see
    /// [`is_shut`](Self::is_shut).
    pub fn next(&mut self, input: &[u8]) -> Result<Step<Event>, Error> {
        if self.payload > 0 {
            return self.pending_payload(input.len() as u64);
        }
        if input.is_empty() && (self.state == State::Shut || self.input_ended && self.state == State::Message) {
            return Ok(Step::End);
        }
        let mut reader = Reader::at(input, self.offset);
        match self.item(&mut reader) {
            Ok(event) => {
                self.offset = reader.offset();
                self.payload = event.payload_len();
                self.messages += u64::from(event != Event::BitmapEnd);
                self.state = match &event {
                    Event::Message(Message::Shut { .. }) => State::Shut,
                    Event::Message(Message::RecvBitmap { block, .. }) => State::Bitmap(block.clone()),
                    _ => State::Message,
                };
                Ok(Step::Event { consumed: reader.position(), event })
            }
            Err(Located { kind: ErrorKind::Wire(WireError::Truncated { needed, .. }), offset, .. })
                if !self.input_ended =>
            {
                let at_least = (offset - self.offset).saturating_add(needed);
                Ok(Step::NeedMore { at_least: usize::try_from(at_least).unwrap_or(usize::MAX) })
            }
            Err(error) => Err(self.locate(error)),
        }
    }

    /// Bytes of the bitmap behind the last event that were not skipped yet.
    pub fn payload_remaining(&self) -> u64 {
        self.payload
    }

    /// Says that `count` bytes of the bitmap were taken.
    ///
    /// # Errors
    /// [`MessageError::SkipTooFar`] if that is more than remain.
    pub fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        match self.payload.checked_sub(count) {
            Some(left) => {
                self.payload = left;
                self.offset = self.offset.saturating_add(count);
                Ok(())
            }
            None => {
                let kind = MessageError::SkipTooFar { found: count, remaining: self.payload };
                Err(self.locate(Located::new(kind.into(), self.offset)))
            }
        }
    }

    /// Says that no byte follows those that the next call to [`next`](Self::next) shows.
    pub fn end_of_input(&mut self) {
        self.input_ended = true;
    }

    /// True behind SHUT. A return path that ends without it ended because the destination or the connection broke.
    pub fn is_shut(&self) -> bool {
        self.state == State::Shut
    }

    /// Offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Puts the last message around an error that came up with it, as those of the state machines of this crate.
    pub fn fail(&self, kind: impl Into<ErrorKind>) -> Error {
        let message = self.messages.saturating_sub(1);
        Located::new(kind.into(), self.offset).within(format!("message {message}")).within("return path")
    }

    fn item(&self, reader: &mut Reader<'_>) -> Result<Event, Error> {
        match &self.state {
            State::Message => Message::read(reader, &self.limits).map(Event::Message),
            State::Bitmap(_) => {
                let at = reader.clone();
                match reader.be64()? {
                    BITMAP_END => Ok(Event::BitmapEnd),
                    found => {
                        Err(at.fail(WireError::Unexpected { what: "end of the bitmap", found, expected: BITMAP_END }))
                    }
                }
            }
            State::Shut => match reader.peek() {
                Some(found) => Err(reader.fail(MessageError::AfterShut { found })),
                // `next` takes this for the end.
                None => Err(reader.fail(WireError::Truncated { needed: 1, available: 0 })),
            },
        }
    }

    fn pending_payload(&self, available: u64) -> Result<Step<Event>, Error> {
        let remaining = self.payload;
        if self.input_ended && available < remaining {
            let kind = WireError::Truncated { needed: remaining, available };
            return Err(self.locate(Located::new(kind.into(), self.offset)));
        }
        Ok(Step::Payload { remaining })
    }

    fn locate(&self, error: Error) -> Error {
        match &self.state {
            State::Bitmap(block) => error
                .within(format!("bitmap of RAM block '{block}'"))
                .within(format!("message {}", self.messages.saturating_sub(1))),
            _ => error.within(format!("message {}", self.messages)),
        }
        .within("return path")
    }
}
