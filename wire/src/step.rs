//! What every incremental decoder answers.

/// What a decoder answers when it is shown input.
///
/// The decoder holds no bytes: the caller keeps a buffer, drops from its front what was consumed, and adds to its end
/// when [`Step::NeedMore`] asks for it. `E` is the event type of the decoder, `P` says what its payload can be.
///
/// ```
/// use qevm_wire::Step;
///
/// fn bytes_to_read(step: &Step<()>, buffered: usize) -> usize {
///     match step {
///         Step::NeedMore { at_least } => at_least.saturating_sub(buffered),
///         _ => 0,
///     }
/// }
/// assert_eq!(bytes_to_read(&Step::NeedMore { at_least: 64 }, 10), 54);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<E, P = ()> {
    /// `event` was read; the first `consumed` bytes of the input are done with. That can be none of them.
    Event {
        /// How many bytes the caller must drop from the front of its input.
        consumed: usize,
        /// What was read.
        event: E,
    },
    /// The next `remaining` bytes are payload, which the caller moves itself and reports with `skip_payload`.
    Payload {
        /// What the payload is: a page of this block, the data of that device…
        of: P,
        /// Bytes left of the payload.
        remaining: u64,
    },
    /// The next event is not complete.
    NeedMore {
        /// How many bytes, counted from the front of this input, the next call must show at least. Never more than
        /// the peer has to send in any case.
        at_least: usize,
    },
    /// The stream is over.
    End,
}
