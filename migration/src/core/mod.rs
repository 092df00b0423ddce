//! The deterministic core of the engines: state machines without I/O, threads and clocks.
//!
//! A machine is told what arrived, what the guest reported and what time it is, and says what to do next. Whoever drives it does that:
//! [`migrate`](crate::migrate) and [`receive`](crate::receive) with threads and blocking sockets, the example `async_vmm` with tokio, a simulator
//! with virtual time in a single thread.
//!
//! Time is a [`Duration`](std::time::Duration) since the start of the migration, and never goes back.
//!
//! | module | what |
//! |---|---|
//! | [`source`] | the source: what goes out, when the guest is paused, and who has it in the end |
//! | `answers` | what the destination has said to the source, and what follows from it |
//! | `sweep` | which pages are sent in which order, and which wait |
//! | [`destination`] | what is done with the main channel at the destination |
//! | `page_channel` | what is done with a page channel there |
//! | `synchronisation` | which of those waits for which |
//!
//! # The destination
//!
//! [`Destination`](destination::Destination) reads the main channel, [`PageChannel`] a page channel, and [`Synchronisation`] says which of them waits for which.
//! They hold no bytes of the stream and touch no memory: payload goes from the socket to where it belongs without them.

mod answers;
pub mod destination;
mod page_channel;
pub mod source;
mod sweep;
mod synchronisation;

use sweep::Sweep;

pub use page_channel::{PageAction, PageChannel, PageTurn};
pub use synchronisation::{Mark, Synchronisation};
