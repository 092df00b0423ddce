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
//! * It is `no_std` and needs `alloc`.
//!
//! # Example
//!
//! ```
//! use qevm_returnpath::{Decoder, Event, Message};
//! use qevm_wire::Driver;
//!
//! // What QEMU 10.0 sends for a precopy without errors: PONG 1, SHUT 0.
//! let received = [0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0]; // in real life: a socket
//!
//! let mut driver = Driver::new(&received[..], Decoder::default());
//! let mut loaded = false;
//! while let Some(event) = driver.next()? {
//!     match event {
//!         Event::Message(Message::Shut { status }) => loaded = status == 0,
//!         other => println!("{other:?}"),
//!     }
//! }
//! assert!(loaded);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What may come when, as [`session::SourceSession`] has it:
//!
//! ```text
//!  precopy ──(the guest runs at the destination)──> postcopy ──(connection lost)──> recovery
//!   PONG, ACK                                        PONG, REQ_PAGES                  RECV_BITMAP, RESUME_ACK
//!     │                                                │                                │
//!     └──────────────(everything is sent)──────────────┴────────> SHUT, the last message
//! ```
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

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
