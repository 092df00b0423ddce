//! QMP on a UNIX socket, with QEMU's names, shapes and error classes (QMP reference of QEMU 11.1).
//!
//! [`Server`] accepts clients one after the other, as QEMU's monitor does; `protocol` is the dialogue with one of them,
//! `arguments` reads what a command was given, `commands` are the commands.
//! [`Client`] is the other end.

mod address;
mod arguments;
mod client;
mod commands;
mod descriptors;
mod dirty_rate;
mod human;
mod objects;
mod parameters;
mod power;
mod protocol;
mod queries;
mod server;
mod statistics;

pub use address::channel;
pub use client::{Client, ClientError};
pub use commands::check_arguments;
pub use protocol::{Failure, Request, Requests, reply};
pub use server::Server;
pub(crate) use statistics::outgoing;
