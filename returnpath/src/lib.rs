//! The return path of a QEMU migration, sans-IO: what the destination tells the source.
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | [`message`] | [`Message`]: every message and its numbers |
//! | [`event`], [`decode`], [`encode`] | [`Event`], [`Decoder`], [`Encoder`] |
//! | [`switchover`] | the switchover gate |
//! | [`requests`] | page requests of postcopy |
//! | [`bitmap`] | received bitmaps of postcopy recovery |
//! | [`session`] | the return path as a whole: what may come when, and what is missing |
//! | [`error`] | [`Error`]: kind, offset, path |
//!
//! # Promises
//!
//! * Nothing here does I/O, and nothing panics or loops without consuming input, on any input.
//! * A decoder holds no bytes of the return path and allocates nothing but block names; the state machines allocate
//!   for what is waited for, whatever a peer repeats.
//! * A peer that is silent, repeats itself or sends out of order gets an error that names it; how long to wait is the
//!   caller's to decide, and what for is the state machines' to say.
//! * Whatever is decoded is encoded to the same bytes.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod decode;
pub mod encode;
pub mod error;
pub mod event;
pub mod message;
pub mod requests;
pub mod session;
pub mod switchover;
#[cfg(test)]
mod tests;

pub use decode::Decoder;
pub use encode::Encoder;
pub use error::{Error, ErrorKind, MessageError, Reader};
pub use event::Event;
pub use message::{Message, MessageType};
pub use requests::RequestError;
pub use session::SessionError;
pub use switchover::SwitchoverError;
