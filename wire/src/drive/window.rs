//! What a decoder is shown: a window that moves forward over an input.

use super::{CHUNK, DriveError};
use crate::{Decode, Step};
use bytes::{Buf, BytesMut};
use polonius_the_crab::{polonius, polonius_return};
use std::io::{self, ErrorKind, Read};

/// An input that is seen through a window: some of its bytes are there, others come when they are asked for.
///
/// [`Buffered`] makes one of anything that can be read. An input that is a file can jump over what is not read; one
/// that is in memory is its own window.
pub trait Window {
    /// The bytes that are there: those in front of them are done with.
    fn bytes(&self) -> &[u8];

    /// Reads until `at_least` bytes are there, or the input ends.
    ///
    /// # Errors
    /// The input fails. What is there stays there.
    fn fill(&mut self, at_least: usize) -> io::Result<()>;

    /// True once it is known that no byte follows those that are there.
    fn has_ended(&self) -> bool;

    /// Takes `count` bytes, at most those that are there, off the front.
    fn consume(&mut self, count: usize);

    /// Passes over some of the next `count` bytes, whether they are there or not, and gives how many: 0 only if `count`
    /// is 0 or the input ends here.
    ///
    /// # Errors
    /// The input fails, and nothing was passed over.
    fn skip(&mut self, count: u64) -> io::Result<u64>;
}

/// All of an input in memory.
impl Window for &[u8] {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn fill(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn has_ended(&self) -> bool {
        true
    }

    fn consume(&mut self, count: usize) {
        self.advance(count.min(self.len()));
    }

    fn skip(&mut self, count: u64) -> io::Result<u64> {
        let skipped = self.len().min(usize::try_from(count).unwrap_or(usize::MAX));
        self.advance(skipped);
        Ok(skipped as u64)
    }
}

/// The window of anything that can be read. It holds what was asked for, and at most 64 KiB more.
#[derive(Debug)]
pub struct Buffered<R> {
    pub(super) input: R,
    pub(super) buffer: BytesMut,
    pub(super) ended: bool,
    /// How many bytes were taken off the front.
    pub(super) taken: u64,
}

impl<R> Buffered<R> {
    /// A window at the place where `input` is.
    pub fn new(input: R) -> Self {
        Buffered { input, buffer: BytesMut::new(), ended: false, taken: 0 }
    }

    /// Takes `count` of the bytes that are there off the front.
    pub(super) fn take(&mut self, count: usize) {
        self.buffer.advance(count);
        self.taken += count as u64;
    }

    /// The input. Bytes of it may have been read ahead.
    pub fn input(&self) -> &R {
        &self.input
    }

    /// The input, to change how it is read. Bytes that are read from it here are lost to the window.
    pub fn input_mut(&mut self) -> &mut R {
        &mut self.input
    }
}

impl<R: Read> Window for Buffered<R> {
    fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    fn fill(&mut self, at_least: usize) -> io::Result<()> {
        while self.buffer.len() < at_least && !self.ended {
            let old = self.buffer.len();
            // The length comes from the peer: it is believed as far as bytes come.
            self.buffer.resize(old + CHUNK, 0);
            let read = self.input.read(&mut self.buffer[old..]);
            self.buffer.truncate(old + read.as_ref().map_or(0, |count| *count));
            match read {
                Ok(count) => self.ended = count == 0,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn consume(&mut self, count: usize) {
        self.take(count.min(self.buffer.len()));
    }

    fn skip(&mut self, count: u64) -> io::Result<u64> {
        if count > 0 {
            self.fill(1)?;
        }
        let skipped = self.buffer.len().min(usize::try_from(count).unwrap_or(usize::MAX));
        self.take(skipped);
        Ok(skipped as u64)
    }
}

/// What is there first, then straight from the input.
impl<R: Read> Read for Buffered<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = match self.buffer.len().min(into.len()) {
            0 if self.ended || into.is_empty() => 0,
            0 => {
                let count = self.input.read(into)?;
                self.ended = count == 0;
                count
            }
            count => {
                self.buffer.copy_to_slice(&mut into[..count]);
                count
            }
        };
        self.taken += count as u64;
        Ok(count)
    }
}

/// Passes over what is left of the payload of `decoder`'s last event, as far as it comes before the input ends.
///
/// # Errors
/// [`DriveError::Io`] if the input fails. What was passed over before is not lost: the call can be made again.
pub fn skip_payload<W: Window, D: Decode>(window: &mut W, decoder: &mut D) -> Result<(), DriveError<D::Kind>> {
    while decoder.payload_remaining() > 0 {
        let skipped = window.skip(decoder.payload_remaining())?;
        decoder.skip_payload(skipped)?;
        if skipped == 0 {
            decoder.end_of_input();
            break;
        }
    }
    Ok(())
}

/// The next event of `decoder` in `window`, with the bytes that it was read from; `None` at the end of the stream. What
/// is left of the last event's payload is skipped.
///
/// This is [`Driver::next`](super::Driver::next) for those to whom window and decoder belong apart: where several
/// decoders read one input, or a file is jumped in. The bytes stay in the window until the caller
/// [consumes](Window::consume) them.
///
/// ```
/// # #[derive(Default)]
/// # struct Records(qevm_wire::Cursor);
/// # impl qevm_wire::Decode for Records {
/// #     type Event<'a> = u8;
/// #     type Payload = ();
/// #     type Kind = qevm_wire::WireError;
/// #     fn next<'a>(&mut self, input: &'a [u8]) -> Result<qevm_wire::Step<u8>, qevm_wire::Located<Self::Kind>> {
/// #         let at_end = self.0.has_ended();
/// #         if let Some(step) = self.0.pending(input.len() as u64, at_end) { return step; }
/// #         let Some(len) = input.first().copied() else {
/// #             return Ok(if at_end { qevm_wire::Step::End } else { qevm_wire::Step::NeedMore { at_least: 1 } });
/// #         };
/// #         self.0.move_to(self.0.offset() + 1);
/// #         self.0.expect(len.into(), ());
/// #         Ok(qevm_wire::Step::Event { consumed: 1, event: len })
/// #     }
/// #     fn payload_remaining(&self) -> u64 { self.0.payload() }
/// #     fn payload_of(&self) -> Option<&()> { self.0.payload_of() }
/// #     fn skip_payload(&mut self, count: u64) -> Result<(), qevm_wire::Located<Self::Kind>> { self.0.skip(count) }
/// #     fn end_of_input(&mut self) { self.0.end() }
/// #     fn offset(&self) -> u64 { self.0.offset() }
/// # }
/// use qevm_wire::{Window, next_event};
///
/// // `Records` are a length byte and as many bytes of payload.
/// let (mut input, mut decoder) = (&b"\x03ram\x02pc\x00"[..], Records::default());
/// let mut lengths = Vec::new();
/// while let Some((len, read)) = next_event(&mut input, &mut decoder)? {
///     lengths.push(len);
///     let read = read.len();
///     input.consume(read);
/// }
/// assert_eq!(lengths, [3, 2, 0]);
/// # Ok::<(), qevm_wire::DriveError<qevm_wire::WireError>>(())
/// ```
///
/// # Errors
/// [`DriveError::Io`] if the input fails, [`DriveError::Stream`] with what is wrong with the stream. Nothing is lost:
/// an input that only has nothing at the moment (`WouldBlock`) can be asked again.
#[allow(clippy::type_complexity)] // an event and its bytes, as `Iterator::next` would give them
pub fn next_event<'w, W: Window, D: Decode>(
    window: &'w mut W,
    decoder: &mut D,
) -> Result<Option<(D::Event<'w>, &'w [u8])>, DriveError<D::Kind>> {
    skip_payload(window, decoder)?;
    // Of payload that does not come any more the decoder says what is missing, and where.
    let mut told = decoder.payload_remaining() > 0;
    let mut window = window;
    loop {
        let at_least =
            polonius!(|window| -> Result<Option<(D::Event<'polonius>, &'polonius [u8])>, DriveError<D::Kind>> {
                let bytes = window.bytes();
                match decoder.next(bytes) {
                    Ok(Step::Event { consumed, event }) => {
                        polonius_return!(Ok(Some((event, bytes.get(..consumed).unwrap_or(bytes)))))
                    }
                    Ok(Step::End) => polonius_return!(Ok(None)),
                    // No more is shown than was asked for, and payload was skipped above.
                    Ok(Step::Payload { .. }) => bytes.len() + 1,
                    Ok(Step::NeedMore { at_least }) => at_least.max(bytes.len() + 1),
                    Err(error) => polonius_return!(Err(error.into())),
                }
            });
        if told {
            // A decoder that asks for more although it was told that there is none.
            return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
        }
        window.fill(at_least)?;
        if window.has_ended() {
            decoder.end_of_input();
            told = true;
        }
    }
}
