//! The network block device protocol, sans-IO: how a page server gives the bytes of a file to clients.
//!
//! A subset: the fixed newstyle handshake without TLS, and reading, with simple and structured replies. It is what a
//! read-only server needs for every client, and what a client needs for every server (`qemu-nbd`, `nbdkit`,
//! `qemu-storage-daemon`). Facts: `docs/format/nbd.md`.
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
//! # A connection
//!
//! ```text
//!  client                            server
//!                    ◀── Hello ──
//!                    ── Flags ──▶
//!                    ── Option STRUCTURED_REPLY ──▶      ◀── OptionReply ACK ──       or an error: simple replies
//!                    ── Option GO, with the name ──▶     ◀── OptionReply INFO … ACK ──
//!     both decoders: `begin`, from here on requests and replies
//!                    ── Request READ ──▶                 ◀── Chunk Data, Hole or Error …, the last one `done` ──
//!                                                        ◀── Simple, and the bytes ──
//!                    ── Request DISC ──▶
//!
//!  [`ClientDecoder`]   Flags ──▶ Options ──(`begin`)──▶ Requests
//!  [`ServerDecoder`]   Hello ──▶ Options ──(`begin`)──▶ Replies
//! ```
//!
//! # Promises
//!
//! * Nothing here does I/O, and nothing panics or loops without consuming input, on any input.
//! * A decoder holds no bytes and allocates nothing; no peer makes it ask for more than 64 KiB at a time.
//! * Whatever is decoded is encoded to the same bytes.
//!
//! # Example
//!
//! ```
//! use qevm_nbd::{ClientDecoder, ClientEvent, Export, Negotiation, Outcome};
//! use qevm_wire::{Decode, Step, Writer};
//!
//! // A client that asks for the export at once: its flags, then option GO with an empty name.
//! let received = [&[0, 0, 0, 1][..], b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0"].concat();
//! let mut decoder = ClientDecoder::default();
//! let (export, mut answer) = (Export { description: "guest.qevm".into(), len: 1 << 20 }, Writer::new());
//! assert_eq!(decoder.next(&received)?, Step::Event { consumed: 4, event: ClientEvent::Flags(1) });
//! if let Step::Event { event: ClientEvent::Option { option, data }, .. } = decoder.next(&received[4..])? {
//!     assert_eq!(Negotiation::default().option(&export, option, data, &mut answer), Outcome::Begin);
//! }
//! assert!(!answer.as_bytes().is_empty());
//! # Ok::<(), qevm_nbd::Error>(())
//! ```
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
