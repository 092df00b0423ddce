//! The loop around a decoder over what tokio reads.

use super::{Buffered, CHUNK, DriveError, Driver};
use crate::{Decode, Step};
use bytes::{Buf, BufMut};
use core::pin::Pin;
use core::task::{Context, Poll, ready};
use polonius_the_crab::{polonius, polonius_return};
use std::io::{self, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

/// How much of a payload that is not read is dropped at a time, in bytes.
const SKIPPED: usize = 8 << 10;

/// Drives a decoder over an input that is read asynchronously. Everything else is as with [`Driver`].
///
/// All of it is cancel-safe: a future that is dropped has lost no byte, and the call can be made again.
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
/// use qevm_wire::AsyncDriver;
/// use tokio::io::AsyncReadExt;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), qevm_wire::DriveError<qevm_wire::WireError>> {
/// // `Records` are a length byte and as many bytes of payload.
/// let mut driver = AsyncDriver::new(&b"\x03ram\x02pc\x00"[..], Records::default());
/// let mut names = Vec::new();
/// while let Some(_len) = driver.next().await? {
///     let mut name = String::new();
///     driver.payload().read_to_string(&mut name).await?;
///     names.push(name);
/// }
/// assert_eq!(names, ["ram", "pc", ""]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AsyncDriver<R, D> {
    driver: Driver<R, D>,
}

impl<R: AsyncRead + Unpin, D: Decode> AsyncDriver<R, D> {
    /// Drives `decoder` over `input`, from where both are.
    pub fn new(input: R, decoder: D) -> Self {
        AsyncDriver { driver: Driver::new(input, decoder) }
    }

    /// The next event; `None` at the end of the stream. What is left of the last event's payload is skipped.
    ///
    /// # Errors
    /// [`DriveError::Io`] if the input fails, [`DriveError::Stream`] with what is wrong with the stream,
    /// [`DriveError::OutOfStep`] if the caller has taken other bytes than it has told the decoder of.
    pub async fn next(&mut self) -> Result<Option<D::Event<'_>>, DriveError<D::Kind>> {
        let mut dropped = [0; SKIPPED];
        while self.payload().read(&mut dropped).await? > 0 {}
        self.driver.in_step()?;
        let mut this = self;
        loop {
            let at_least = polonius!(|this| -> Result<Option<D::Event<'polonius>>, DriveError<D::Kind>> {
                match this.driver.decoder.next(&this.driver.window.buffer) {
                    Ok(Step::Event { consumed, event }) => {
                        this.driver.taken = consumed;
                        polonius_return!(Ok(Some(event)))
                    }
                    Ok(Step::End) => polonius_return!(Ok(None)),
                    Ok(Step::Payload { .. }) => this.driver.window.buffer.len() + 1,
                    Ok(Step::NeedMore { at_least }) => at_least,
                    Err(error) => polonius_return!(Err(error.into())),
                }
            });
            if this.driver.window.ended {
                // A decoder that was told so and asks for more all the same.
                return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
            }
            this.fill(at_least).await?;
        }
    }

    /// The rest of the payload that follows the last event, wherever it is. Dropping it early is legal.
    pub fn payload(&mut self) -> AsyncPayload<'_, R, D> {
        self.driver.drop_taken();
        AsyncPayload { driver: &mut self.driver }
    }

    /// What was read and not used yet: it starts where the last event and its payload ended.
    pub fn buffered(&mut self) -> &[u8] {
        self.driver.buffered()
    }

    /// Reads until [`buffered`](Self::buffered) holds `at_least` bytes, or the input ends.
    ///
    /// # Errors
    /// The input fails.
    pub async fn fill(&mut self, at_least: usize) -> io::Result<()> {
        self.driver.drop_taken();
        let Driver { window: Buffered { input, buffer, ended, .. }, decoder, .. } = &mut self.driver;
        while buffer.len() < at_least && !*ended {
            // The length comes from the peer: it is believed as far as bytes come.
            buffer.reserve(CHUNK);
            if input.read_buf(&mut (&mut *buffer).limit(CHUNK)).await? == 0 {
                *ended = true;
                decoder.end_of_input();
            }
        }
        Ok(())
    }

    /// Takes `count` bytes off the front of [`buffered`](Self::buffered), which the decoder was told of by the caller.
    ///
    /// # Panics
    /// Never: at most what is buffered is taken.
    pub fn consume(&mut self, count: usize) {
        self.driver.consume(count);
    }

    /// The decoder.
    pub fn decoder(&self) -> &D {
        self.driver.decoder()
    }

    /// The decoder, to tell it what only the caller knows.
    pub fn decoder_mut(&mut self) -> &mut D {
        self.driver.decoder_mut()
    }

    /// The input. Bytes of it may have been read ahead.
    pub fn input(&self) -> &R {
        self.driver.input()
    }
}

/// The payload that follows an event: from the buffer as far as it is there, then straight from the input.
#[derive(Debug)]
pub struct AsyncPayload<'d, R, D> {
    driver: &'d mut Driver<R, D>,
}

impl<R, D: Decode> AsyncPayload<'_, R, D> {
    /// Bytes that are left.
    pub fn remaining(&self) -> u64 {
        self.driver.decoder.payload_remaining()
    }

    /// What it is.
    pub fn of(&self) -> Option<&D::Payload> {
        self.driver.decoder.payload_of()
    }
}

impl<R: AsyncRead + Unpin, D: Decode> AsyncRead for AsyncPayload<'_, R, D> {
    /// Reads some of the payload; nothing at its end. An input that ends before the payload does is no error here but
    /// the end: the next call to [`AsyncDriver::next`] says what is missing, and where.
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Driver { window: Buffered { input, buffer, ended, taken }, decoder, .. } = &mut *self.get_mut().driver;
        let wanted = into.remaining().min(usize::try_from(decoder.payload_remaining()).unwrap_or(usize::MAX));
        if wanted == 0 || (*ended && buffer.is_empty()) {
            return Poll::Ready(Ok(()));
        }
        let target = into.initialize_unfilled_to(wanted);
        let count = if buffer.is_empty() {
            let mut target = ReadBuf::new(target);
            ready!(Pin::new(input).poll_read(context, &mut target))?;
            target.filled().len()
        } else {
            let count = wanted.min(buffer.len());
            buffer.copy_to_slice(&mut target[..count]);
            count
        };
        into.advance(count);
        *taken += count as u64;
        if count == 0 {
            *ended = true;
            decoder.end_of_input();
        }
        // It was bounded by what remains.
        let skipped = decoder.skip_payload(count as u64);
        Poll::Ready(skipped.map_err(|_| io::Error::other("the payload is shorter than it was")))
    }
}

#[cfg(test)]
mod tests;
