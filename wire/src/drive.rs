//! The loop around a decoder: reads from anything that can be read, and keeps the buffer.

use crate::{Blame, Decode, Fault, Located};
use core::fmt;
use std::io::{self, Read};

/// How much is read at a time, in bytes, unless more is needed at once.
const CHUNK: usize = 64 << 10;

/// Why a [`Driver`] cannot go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum DriveError<K> {
    /// The input could not be read.
    Io(io::Error),
    /// What was read is wrong, and where.
    Stream(Located<K>),
    /// What the caller has [consumed](Driver::consume) is not what it has told the decoder of. The caller's fault:
    /// whatever the decoder would say of the bytes that are next is not the peer's.
    OutOfStep {
        /// Offset in the stream at which the decoder is.
        decoder: u64,
        /// Offset in the stream of the next byte.
        input: u64,
    },
}

impl<K: Blame> DriveError<K> {
    /// Whose fault it is; `None` if the input failed, which is no peer's.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            DriveError::Io(_) => None,
            DriveError::Stream(error) => Some(error.fault()),
            DriveError::OutOfStep { .. } => Some(Fault::Misuse),
        }
    }
}

impl<K: Blame + fmt::Display> fmt::Display for DriveError<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DriveError::Io(error) => write!(f, "the stream cannot be read: {error}"),
            DriveError::Stream(error) => error.fmt(f),
            DriveError::OutOfStep { decoder, input } => write!(
                f,
                "{}: the decoder was told of all up to byte {decoder}, but the input was consumed up to byte {input}",
                Fault::Misuse
            ),
        }
    }
}

impl<K: Blame + fmt::Debug + fmt::Display + 'static> std::error::Error for DriveError<K> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DriveError::Io(error) => Some(error),
            DriveError::Stream(_) | DriveError::OutOfStep { .. } => None,
        }
    }
}

impl<K> From<Located<K>> for DriveError<K> {
    fn from(error: Located<K>) -> Self {
        DriveError::Stream(error)
    }
}

impl<K> From<io::Error> for DriveError<K> {
    fn from(error: io::Error) -> Self {
        DriveError::Io(error)
    }
}

/// Drives a decoder over an input: [`next`](Driver::next) gives event after event, [`payload`](Driver::payload) the
/// bytes that follow one.
///
/// It keeps at most what one event needs and one chunk of 64 KiB. Payload that the caller does not read is dropped
/// before the next event.
///
/// ```
/// use qevm_wire::{Blame, Decode, Driver, Fault, Located, Reader, Step, WireError};
/// use std::io::Read;
///
/// // A decoder of records that are a length byte and as many bytes of payload.
/// #[derive(Default)]
/// struct Records(qevm_wire::Cursor);
///
/// impl Decode for Records {
///     type Event<'a> = u8;
///     type Payload = ();
///     type Kind = WireError;
///     fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<u8>, Located<WireError>> {
///         let at_end = self.0.has_ended();
///         if let Some(step) = self.0.pending(input.len() as u64, at_end) {
///             return step;
///         }
///         let Some(len) = input.first().copied() else {
///             return Ok(if at_end { Step::End } else { Step::NeedMore { at_least: 1 } });
///         };
///         self.0.move_to(self.0.offset() + 1);
///         self.0.expect(len.into(), ());
///         Ok(Step::Event { consumed: 1, event: len })
///     }
///     fn payload_remaining(&self) -> u64 { self.0.payload() }
///     fn payload_of(&self) -> Option<&()> { self.0.payload_of() }
///     fn skip_payload(&mut self, count: u64) -> Result<(), Located<WireError>> { self.0.skip(count) }
///     fn end_of_input(&mut self) { self.0.end() }
///     fn offset(&self) -> u64 { self.0.offset() }
/// }
///
/// let mut driver = Driver::new(&b"\x03ram\x02pc\x00"[..], Records::default());
/// let mut names = Vec::new();
/// while let Some(len) = driver.next()? {
///     let mut name = String::new();
///     driver.payload().read_to_string(&mut name)?;
///     assert_eq!(name.len(), len.into());
///     names.push(name);
/// }
/// assert_eq!(names, ["ram", "pc", ""]);
/// # Ok::<(), qevm_wire::DriveError<WireError>>(())
/// ```
#[derive(Debug)]
pub struct Driver<R, D> {
    window: Buffered<R>,
    decoder: D,
    /// Bytes at the front of the window that belong to the event that was given last.
    taken: usize,
    /// Offset in the stream of the input's first byte.
    start: u64,
}

impl<R, D: Decode> Driver<R, D> {
    /// Drives `decoder` over `input`, from where both are.
    pub fn new(input: R, decoder: D) -> Self {
        Driver { window: Buffered::new(input), start: decoder.offset(), decoder, taken: 0 }
    }

    /// What was read and not used yet: it starts where the last event and its payload ended.
    pub fn buffered(&mut self) -> &[u8] {
        self.drop_taken();
        &self.window.buffer
    }

    /// Takes `count` bytes off the front of [`buffered`](Self::buffered), which the decoder was told of by the caller:
    /// the content of a device section that the caller has read. If they are not as many, the next event is
    /// [`DriveError::OutOfStep`].
    ///
    /// # Panics
    /// Never: at most what is buffered is taken.
    pub fn consume(&mut self, count: usize) {
        self.drop_taken();
        self.window.take(count.min(self.window.buffer.len()));
    }

    /// The decoder.
    pub fn decoder(&self) -> &D {
        &self.decoder
    }

    /// The decoder, to tell it what only the caller knows.
    pub fn decoder_mut(&mut self) -> &mut D {
        &mut self.decoder
    }

    /// The input. Bytes of it may have been read ahead.
    pub fn input(&self) -> &R {
        &self.window.input
    }

    fn drop_taken(&mut self) {
        self.window.take(core::mem::take(&mut self.taken));
    }

    /// Checks that the caller has taken what it has told the decoder of.
    fn in_step(&self) -> Result<(), DriveError<D::Kind>> {
        let (decoder, input) = (self.decoder.offset(), self.start.saturating_add(self.window.taken));
        if decoder == input { Ok(()) } else { Err(DriveError::OutOfStep { decoder, input }) }
    }
}

impl<R: Read, D: Decode> Driver<R, D> {
    /// The next event; `None` at the end of the stream. What is left of the last event's payload is skipped.
    ///
    /// # Errors
    /// [`DriveError::Io`] if the input fails, [`DriveError::Stream`] with what is wrong with the stream,
    /// [`DriveError::OutOfStep`] if the caller has taken other bytes than it has told the decoder of.
    #[allow(clippy::should_implement_trait)] // an event borrows from the driver
    pub fn next(&mut self) -> Result<Option<D::Event<'_>>, DriveError<D::Kind>> {
        self.drop_taken();
        self.in_step()?;
        let Driver { window, decoder, taken, .. } = self;
        Ok(next_event(window, decoder)?.map(|(event, read)| {
            *taken = read.len();
            event
        }))
    }

    /// The rest of the payload that follows the last event. It ends where the payload does; dropping it early is
    /// legal.
    pub fn payload(&mut self) -> Payload<'_, R, D> {
        self.drop_taken();
        Payload { driver: self }
    }

    /// Reads until [`buffered`](Self::buffered) holds `at_least` bytes, or the input ends.
    ///
    /// # Errors
    /// The input fails.
    pub fn fill(&mut self, at_least: usize) -> io::Result<()> {
        self.drop_taken();
        self.window.fill(at_least)?;
        if self.window.ended {
            self.decoder.end_of_input();
        }
        Ok(())
    }
}

/// The payload that follows an event: from the buffer as far as it is there, then straight from the input.
#[derive(Debug)]
pub struct Payload<'d, R, D> {
    driver: &'d mut Driver<R, D>,
}

impl<R: Read, D: Decode> Payload<'_, R, D> {
    /// Bytes that are left.
    pub fn remaining(&self) -> u64 {
        self.driver.decoder.payload_remaining()
    }

    /// What it is; `None` if nothing is left.
    pub fn of(&self) -> Option<&D::Payload> {
        self.driver.decoder.payload_of()
    }
}

impl<R: Read, D: Decode> Read for Payload<'_, R, D> {
    /// Reads some of the payload; 0 at its end.
    ///
    /// An input that ends before the payload does is no error here but the end: the next call to [`Driver::next`] says
    /// what is missing, and where.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Driver { window, decoder, .. } = &mut *self.driver;
        let wanted = into.len().min(usize::try_from(decoder.payload_remaining()).unwrap_or(usize::MAX));
        let count = window.read(&mut into[..wanted])?;
        if window.ended {
            decoder.end_of_input();
        }
        // It was bounded by what remains.
        decoder.skip_payload(count as u64).map_err(|_| io::Error::other("the payload is shorter than it was"))?;
        Ok(count)
    }
}

mod window;
pub use window::{Buffered, Window, next_event, skip_payload};

#[cfg(feature = "tokio")]
mod tokio;
#[cfg(feature = "tokio")]
pub use self::tokio::{AsyncDriver, AsyncPayload};

#[cfg(test)]
mod tests;
