//! Page channels (capability `multifd`) at work: threads, queues and sockets around the `qevm-multifd` crate.
//!
//! | module | what |
//! |---|---|
//! | `settings` | [`Settings`]: what both sides have agreed on |
//! | `queue` | [`Queue`]: batches of pages for the channels, bounded, and who has synchronised |
//! | `sender` | a thread that sends batches straight from guest memory |
//! | `saver` | a thread that writes them to their places in a file instead (`mapped-ram`) |
//! | `stream` | the reading end of one page channel |
//! | `receiver` | a thread that reads pages straight into guest memory |
//! | `gate` | [`Gate`]: who waits for whom at the destination, between threads |

mod gate;
mod queue;
mod receiver;
mod saver;
mod sender;
mod settings;
mod stream;

pub(crate) use gate::Gate;
pub(crate) use queue::{Batch, Counts, Queue};
pub(crate) use receiver::receive_pages;
pub(crate) use saver::save_pages;
pub(crate) use sender::send_pages;
pub(crate) use settings::Settings;
pub(crate) use stream::PageStream;
