//! The decoder of the return path: bytes in, events out.

use crate::message::{BITMAP_END, Message};
use crate::{Error, ErrorKind, Event, MessageError, Reader};
use alloc::format;
use qevm_wire::{CountedString, Cursor, Decode, Limits, Located, Step, WireError};

/// Reads a return path: [`next`](Decode::next) is shown bytes and gives the message at their front.
///
/// The decoder holds no bytes. The bitmap after [`Message::RecvBitmap`] is payload, which the caller moves itself and
/// reports with [`skip_payload`](Decode::skip_payload); [`Event::BitmapEnd`] follows it. After an error the decoder
/// stays where it was and gives the same error again. After SHUT the return path is over.
///
/// ```
/// use qevm_returnpath::{Decoder, Event, Message};
/// use qevm_wire::{Decode, Step};
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
    cursor: Cursor<CountedString>,
    messages: u64,
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

    /// True after SHUT. A return path that ends without it ended because the destination or the connection broke.
    pub fn is_shut(&self) -> bool {
        self.state == State::Shut
    }

    /// Puts the last message around an error that came up with it, as those of the state machines of this crate.
    pub fn fail(&self, kind: impl Into<ErrorKind>) -> Error {
        let message = self.messages.saturating_sub(1);
        Located::new(kind.into(), self.cursor.offset()).within(format!("message {message}")).within("return path")
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

impl Decode for Decoder {
    type Event<'a> = Event;
    /// The RAM block whose bitmap it is.
    type Payload = CountedString;
    type Kind = ErrorKind;

    /// Reads the event at the front of `input`. That a return path ends without SHUT is no error here, see
    /// [`is_shut`](Decoder::is_shut).
    fn next(&mut self, input: &[u8]) -> Result<Step<Event, CountedString>, Error> {
        let at_end = self.cursor.has_ended();
        if let Some(step) = self.cursor.pending(input.len() as u64, at_end) {
            return step.map_err(|error| self.locate(error));
        }
        if input.is_empty() && (self.state == State::Shut || at_end && self.state == State::Message) {
            return Ok(Step::End);
        }
        let mut reader = Reader::at(input, self.cursor.offset());
        match self.item(&mut reader) {
            Ok(event) => {
                self.cursor.move_to(reader.offset());
                self.messages += u64::from(event != Event::BitmapEnd);
                self.state = match &event {
                    Event::Message(Message::Shut { .. }) => State::Shut,
                    Event::Message(Message::RecvBitmap { block, .. }) => {
                        self.cursor.expect(event.payload_len(), block.clone());
                        State::Bitmap(block.clone())
                    }
                    _ => State::Message,
                };
                Ok(Step::Event { consumed: reader.position(), event })
            }
            Err(error) => match self.cursor.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(self.locate(error)),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.cursor.payload()
    }

    fn payload_of(&self) -> Option<&CountedString> {
        self.cursor.payload_of()
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        self.cursor.skip(count).map_err(|error| self.locate(error))
    }

    fn end_of_input(&mut self) {
        self.cursor.end();
    }

    fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}
