//! The network block device protocol, sans-IO: how a page server gives the bytes of a file to whoever asks for them.
//!
//! A subset: the fixed newstyle handshake without TLS, and reading, with simple and structured replies. It is what a read-only server needs for
//! every client, and what a client needs for every server (`qemu-nbd`, `nbdkit`, `qemu-storage-daemon`). Facts:
//! `docs/format/nbd.md`.
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | [`number`] | magics, flags and the numbers of everything |
//! | [`client`] | [`ClientEvent`], [`ClientDecoder`]: what a client sends |
//! | [`server`] | [`ServerEvent`], [`ServerDecoder`]: what a server sends |
//! | [`negotiation`] | [`Negotiation`]: what a server answers to options |
//! | [`error`] | [`Error`]: kind, offset, path |
//!
//! # Promises
//!
//! * Nothing here does I/O, and nothing panics or loops without consuming input, on any input.
//! * A decoder holds no bytes and allocates nothing; no peer makes it ask for more than 64 KiB at a time.
//! * Whatever is decoded is encoded to the same bytes.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod client;
pub mod error;
pub mod negotiation;
pub mod number;
pub mod server;
#[cfg(test)]
mod tests;

pub use client::{ClientDecoder, ClientEvent, ExportQuery, Request};
pub use error::{Error, ErrorKind, NbdError, Reader};
pub use negotiation::{Export, Negotiation, Outcome};
pub use server::{Chunk, Content, ServerDecoder, ServerEvent};
