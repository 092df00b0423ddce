//! The return path of a QEMU migration, sans-IO: what the destination tells the source.
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | [`message`] | [`Message`]: every message and its numbers |
//! | [`event`], [`decode`], [`encode`] | [`Event`], [`Decoder`], [`Encoder`] |
//! | [`error`] | [`Error`]: kind, offset, path |
//!
//! # Promises
//!
//! * Nothing here does I/O, and nothing panics or loops without consuming input, on any input.
//! * A decoder holds no bytes of the stream and allocates nothing but block names.
//! * Whatever is decoded is encoded to the same bytes.
#![forbid(unsafe_code)]

pub mod decode;
pub mod encode;
pub mod error;
pub mod event;
pub mod message;

pub use decode::Decoder;
pub use encode::Encoder;
pub use error::{Error, ErrorKind, MessageError, Reader};
pub use event::Event;
pub use message::{Message, MessageType};
