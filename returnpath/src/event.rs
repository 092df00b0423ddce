//! What a return path consists of.

use crate::message::Message;

/// One item of the return path. The items in order, encoded one after the other with their payloads, are its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A message. After [`Message::RecvBitmap`] the bitmap is the payload.
    Message(Message),
    /// The end mark after the bitmap of the last [`Message::RecvBitmap`].
    BitmapEnd,
}

impl Event {
    /// Length in bytes of the payload that follows.
    pub fn payload_len(&self) -> u64 {
        match self {
            Event::Message(Message::RecvBitmap { len, .. }) => *len,
            _ => 0,
        }
    }
}
