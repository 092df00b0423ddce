//! Page channels (capability `multifd`) at work: threads, queues and sockets around the `qevm-multifd` crate.
//!
//! | module | what |
//! |---|---|
//! | `settings` | [`Settings`]: what both sides have agreed on |
//! | `queue` | [`Queue`]: batches of pages for the channels, bounded, and who has synchronised |
//! | `sender` | a thread that sends batches straight from guest memory |
//! | `transfers` | [`Transfers`]: the state of devices that goes beside the pages |
//! | `saver` | a thread that writes them to their places in a file instead (`mapped-ram`) |
//! | `stream` | the reading end of one page channel |
//! | `receiver` | a thread that reads pages straight into guest memory |
//! | `states` | [`States`]: the state of devices that comes beside the pages, in order |
//! | `gate` | [`Gate`]: who waits for whom at the destination, between threads |

mod gate;
mod queue;
mod receiver;
mod saver;
mod sender;
mod settings;
mod states;
mod stream;
mod transfers;

pub(crate) use gate::Gate;
pub(crate) use queue::{Batch, Counts, Queue};
pub(crate) use receiver::receive_pages;
pub(crate) use saver::save_pages;
pub(crate) use sender::send_pages;
pub(crate) use settings::Settings;
pub(crate) use states::States;
pub(crate) use stream::PageStream;
pub(crate) use transfers::Transfers;
