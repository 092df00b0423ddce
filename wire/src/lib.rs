//! What every QEMU migration format shares.
//!
//! Read in this order: [`error`] (whose fault, where, and what was found), [`read`] and [`mod@write`] (the bounded
//! big-endian reader and the writer that mirrors it), [`step`] (what an incremental decoder answers), [`decode`] (what
//! all decoders have in common), `drive` (the loop around a decoder, with feature `std`; over what tokio reads with
//! feature `tokio`), [`name`] (counted strings), [`limits`] (what a peer may make us allocate), [`page`] (page
//! arithmetic), [`profile`] (every switch that changes bytes on the wire) and [`capability`] (migration capabilities
//! and what QEMU lets go together).
//!
//! # Promises
//!
//! No function here panics on any input, performs I/O, or allocates more than the bytes it was given plus what
//! [`Limits`] allows. The crate is `no_std` and needs `alloc`; only `drive` is another matter, which reads from what
//! its caller gives it.
//!
//! # Example
//!
//! ```
//! use qevm_wire::{Reader, WireError};
//!
//! // The first eight bytes of every QEMU migration stream: magic and version, both big-endian.
//! let mut reader: Reader<'_, WireError> = Reader::new(b"QEVM\x00\x00\x00\x03");
//! assert_eq!(reader.be32()?, 0x5145_564d);
//! assert_eq!(reader.be32()?, 3);
//! assert!(reader.is_empty());
//! # Ok::<(), qevm_wire::Located<WireError>>(())
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod capability;
pub mod decode;
#[cfg(feature = "std")]
pub mod drive;
pub mod error;
pub mod limits;
pub mod name;
pub mod page;
pub mod profile;
pub mod read;
pub mod step;
pub mod write;

pub use capability::{Capabilities, Capability};
pub use decode::{Cursor, Decode, NextStep};
#[cfg(feature = "tokio")]
pub use drive::{AsyncDriver, AsyncPayload};
#[cfg(feature = "std")]
pub use drive::{Buffered, DriveError, Driver, Payload, Window, next_event, skip_payload};
pub use error::{Blame, Fault, Located, Path, WireError, Within};
pub use limits::Limits;
pub use name::{CountedString, NameLength};
pub use page::PageGeometry;
pub use profile::{Profile, QemuVersion};
pub use read::Reader;
pub use step::Step;
pub use write::Writer;
