//! Live migration: precopy of a running guest to another monitor, with QEMU's stream.
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | `address`, `channel`, `socket`, `pipe`, `connections` | where a peer is, and the ways to it |
//! | `strangers`, `arrivals` | connections until it is known what they are; those of one source |
//! | `capabilities`, `parameters`, [`rate`] | QEMU's settings by their names; the rate limit |
//! | `guest` | [`Guest`], [`Devices`], [`Hooks`]: what the engines need of a virtual machine |
//! | [`bitmap`], `zero`, `ram_sender` | dirty pages, and sending them straight from guest memory |
//! | `multifd` | page channels: threads that send and receive pages beside the main channel |
//! | `page_file` | files in which every page has its place |
//! | `pending`, [`switchover`] | what remains of everything, and when to stop the guest |
//! | `source`, `return_path` | [`migrate`]: the source engine |
//! | `inlet`, `touched`, `ram_receiver`, `destination` | [`receive`]: the destination engine |
//! | `handover`, `verdict` | who runs the guest when the connection breaks in the last moment |
//! | `job`, `statistics` | control and what `query-migrate` reports |
//!
//! # Promises
//!
//! * Until the destination has everything and says so, every failure leaves the source's guest running (if it ran).
//! * A page that changes after it was sent is sent again: a page leaves the set of dirty pages, and its log is reset,
//!   before it is read.
//! * The guest never runs on both sides; see `handover` and `verdict` for what the network can still spoil.

mod address;
mod arrivals;
pub mod bitmap;
mod capabilities;
mod channel;
mod connections;
mod converge;
mod descriptors;
mod destination;
pub mod dirty_rate;
mod error;
mod guest;
mod handover;
mod inlet;
mod job;
mod multifd;
mod page_file;
#[cfg(test)]
mod pair;
mod parameters;
mod pending;
mod pipe;
mod ram_receiver;
mod ram_sender;
pub mod rate;
mod return_path;
mod socket;
mod source;
mod statistics;
mod strangers;
pub mod switchover;
mod touched;
mod verdict;
mod zero;

pub use address::{Address, BadAddress};
pub use capabilities::{BadCapability, Capabilities, KNOWN as KNOWN_CAPABILITIES, RULES};
pub use channel::{Channel, Source, Target};
pub use connections::{Incoming, Outgoing, check_transport};
pub use descriptors::{Descriptors, NoDescriptors};
pub use destination::{Arrival, receive};
pub use error::{LoadError, MigrationError};
pub use guest::{ADVICE, DeviceSection, Devices, DirtyLog, Guest, GuestError, Hooks, NoHooks, RamView, SavedDevices};
pub use job::{Job, Notice, Refused};
pub use parameters::{BadParameter, Mode, Parameters};
pub use pending::{IterativeDevice, Pending};
pub use pipe::Pipe;
pub use return_path::ReturnPathError;
pub use socket::{Listener, Socket};
pub use source::{migrate, monotonic_now};
pub use statistics::{RamStatistics, RoundStatistics, Statistics, Status};
pub use verdict::Doubt;

/// Bytes of a page of guest memory: that of x86, `PageGeometry::X86`.
const PAGE_SIZE: u64 = 4096;
