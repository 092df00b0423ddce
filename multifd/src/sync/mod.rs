//! The synchronisation between the main channel and the page channels.

mod error;

pub use error::SyncError;
