//! The main channel of a QEMU migration stream, sans-IO.
#![forbid(unsafe_code)]

mod error;
pub mod guest_memory;

pub use error::{Error, ErrorKind, Reader};
