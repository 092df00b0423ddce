//! The deterministic core of the engines: state machines without I/O, threads and clocks.
//!
//! | module | what |
//! |---|---|
//! | `source` | the source: what goes out, when the guest is paused, and who has it in the end |
//! | `answers` | what the destination has said to the source, and what follows from it |
//! | `sweep` | which pages are sent in which order, and which wait |

mod answers;
pub(crate) mod source;
mod sweep;

pub(crate) use answers::Answers;
use sweep::Sweep;
