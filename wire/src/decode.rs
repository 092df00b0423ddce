//! What all incremental decoders have in common: the calls, and the place in the stream.

use crate::{Blame, Located, Step, WireError};
use core::fmt;

/// An incremental decoder: bytes in, events out, no I/O.
///
/// The main channel, a page channel, the preempt channel and the return path each have one. A decoder holds no bytes of
/// the stream: its caller keeps a buffer, shows it to [`next`](Decode::next), and drops from its front what an event
/// consumed. The payload that may follow an event (a page, a bitmap) is the caller's, which moves it where it belongs
/// and reports it with [`skip_payload`](Decode::skip_payload). `Driver` (feature `std`) is that caller for anything
/// that can be read.
///
/// After an error a decoder stays where it was and gives the same error again.
pub trait Decode {
    /// What it reads; content that needs no copy borrows from the input.
    type Event<'a>;
    /// What a payload is: a page of this block, the data of that device…
    type Payload: Clone + fmt::Debug;
    /// What can be wrong.
    type Kind: Blame + fmt::Debug + fmt::Display;

    /// Reads the event at the front of `input`, which starts where the last event and its payload ended.
    ///
    /// # Errors
    /// What is wrong with the stream, with its offset and path. Input that ends too early is only an error after
    /// [`end_of_input`](Decode::end_of_input).
    fn next<'a>(&mut self, input: &'a [u8]) -> Result<NextStep<'a, Self>, Located<Self::Kind>>;

    /// Bytes of the payload after the last event that were not skipped yet.
    fn payload_remaining(&self) -> u64;

    /// What that payload is; `None` if nothing remains of it.
    fn payload_of(&self) -> Option<&Self::Payload>;

    /// Reports that `count` bytes of payload were taken from the stream.
    ///
    /// # Errors
    /// [`WireError::SkipTooFar`] if that is more than remain.
    fn skip_payload(&mut self, count: u64) -> Result<(), Located<Self::Kind>>;

    /// Reports that no byte follows those that the next call to [`next`](Decode::next) shows.
    fn end_of_input(&mut self);

    /// Offset of the next byte, from the start of the stream.
    fn offset(&self) -> u64;
}

/// What [`Decode::next`] answers.
pub type NextStep<'a, D> = Step<<D as Decode>::Event<'a>, <D as Decode>::Payload>;

/// Where a decoder is: its offset, what is left of the payload, and whether more input can come. `P` says what a
/// payload is.
///
/// ```
/// use qevm_wire::{Cursor, WireError};
///
/// let mut cursor = Cursor::at(100);
/// cursor.move_to(108); // an event of eight bytes,
/// cursor.expect(4096, "page"); // which a page follows
/// cursor.skip::<WireError>(4000)?;
/// assert_eq!((cursor.offset(), cursor.payload()), (4108, 96));
/// assert_eq!(cursor.skip::<WireError>(97).unwrap_err().kind, WireError::SkipTooFar { found: 97, remaining: 96 });
/// # Ok::<(), qevm_wire::Located<WireError>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor<P = ()> {
    offset: u64,
    payload: u64,
    /// What the payload is.
    of: Option<P>,
    /// Length of the whole payload.
    payload_len: u64,
    ended: bool,
}

impl<P> Default for Cursor<P> {
    fn default() -> Self {
        Self::at(0)
    }
}

impl<P> Cursor<P> {
    /// A cursor at `offset`, with no payload.
    pub fn at(offset: u64) -> Self {
        Cursor { offset, payload: 0, of: None, payload_len: 0, ended: false }
    }

    /// Offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are left of the payload.
    pub fn payload(&self) -> u64 {
        self.payload
    }

    /// What the payload is; `None` if nothing is left of it.
    pub fn payload_of(&self) -> Option<&P> {
        self.of.as_ref().filter(|_| self.payload > 0)
    }

    /// Whether no more input can come.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// No more input can come.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// What was read ends at `offset`.
    pub fn move_to(&mut self, offset: u64) {
        self.offset = offset;
    }

    /// `len` bytes of payload follow what was read, and are what `of` says.
    pub fn expect(&mut self, len: u64, of: P) {
        (self.payload, self.payload_len, self.of) = (len, len, Some(of));
    }

    /// Takes `count` bytes off the payload.
    ///
    /// # Errors
    /// [`WireError::SkipTooFar`] if fewer remain.
    pub fn skip<K: From<WireError>>(&mut self, count: u64) -> Result<(), Located<K>> {
        let Some(left) = self.payload.checked_sub(count) else {
            let kind = WireError::SkipTooFar { found: count, remaining: self.payload };
            return Err(Located::new(kind.into(), self.offset));
        };
        self.payload = left;
        self.offset = self.offset.saturating_add(count);
        Ok(())
    }

    /// What to answer while payload is left, when `available` bytes are shown; `None` if none is left. `at_end` says
    /// that no more can come.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if the payload cannot become complete: the item at fault is the whole payload, wherever
    /// the caller is in it.
    pub fn pending<E, K: From<WireError>>(&self, available: u64, at_end: bool) -> Option<Result<Step<E, P>, Located<K>>>
    where
        P: Clone,
    {
        let of = self.payload_of()?;
        if at_end && available < self.payload {
            let skipped = self.payload_len - self.payload;
            let kind = WireError::Truncated { needed: self.payload_len, available: skipped.saturating_add(available) };
            return Some(Err(Located::new(kind.into(), self.offset - skipped)));
        }
        Some(Ok(Step::Payload { of: of.clone(), remaining: self.payload }))
    }

    /// How much input the next call must show at least, if `error` is only that there was too little of it.
    pub fn need_more<K: Blame>(&self, error: &Located<K>, at_end: bool) -> Option<usize> {
        let needed = error.kind.needed().filter(|_| !at_end)?;
        let bytes = error.offset.saturating_sub(self.offset).saturating_add(needed);
        Some(usize::try_from(bytes).unwrap_or(usize::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_that_cannot_become_complete_is_an_error_about_all_of_it() {
        let mut cursor = Cursor::at(8);
        cursor.move_to(16);
        cursor.expect(100, 'p');
        cursor.skip::<WireError>(30).unwrap();
        let pending = |available, at_end| cursor.pending::<(), WireError>(available, at_end).unwrap();
        assert_eq!(pending(69, false), Ok(Step::Payload { of: 'p', remaining: 70 }));
        assert_eq!(pending(70, true), Ok(Step::Payload { of: 'p', remaining: 70 }));
        let error = pending(69, true).unwrap_err();
        assert_eq!((error.kind, error.offset), (WireError::Truncated { needed: 100, available: 99 }, 16));
    }

    #[test]
    fn only_input_that_is_too_short_asks_for_more() {
        let mut cursor = Cursor::<()>::at(10);
        let short = Located::new(WireError::Truncated { needed: 4, available: 1 }, 15);
        assert_eq!(cursor.need_more(&short, false), Some(9));
        assert_eq!(cursor.need_more(&short, true), None);
        assert_eq!(cursor.need_more(&Located::new(WireError::Empty { what: "name" }, 15), false), None);
        cursor.end();
        assert!(cursor.has_ended());
        assert_eq!(cursor.pending::<(), WireError>(0, true), None);
    }
}
