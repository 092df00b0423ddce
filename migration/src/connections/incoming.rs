//! The connections of a destination.

use crate::multifd::{PageStream, Settings};
use crate::page_file::PageFile;
use crate::postcopy::PreemptListener;
use crate::{Channel, MigrationError};
use std::sync::Arc;

/// The connections of a destination.
#[derive(Debug)]
pub struct Incoming {
    pub(crate) main: Arc<dyn Channel>,
    /// What was read from the main channel already.
    pub(crate) first: Vec<u8>,
    /// Where the stream begins in its file.
    pub(crate) offset: u64,
    pub(crate) pages: Vec<PageStream>,
    pub(crate) settings: Option<Settings>,
    /// A source with page channels has called, and there are none in this migration.
    pub(crate) page_channels_called: bool,
    /// What may explain a source that gives up at once: one of its channels did not fit.
    pub(crate) misfit: Option<MigrationError>,
    /// Where the preempt channel comes in (capability `postcopy-preempt`).
    pub(crate) preempt: Option<PreemptListener>,
    /// Pages may have their places in this file, in which the main channel reads, too.
    pub(crate) file: Option<PageFile>,
    /// The waits on them have deadlines.
    pub(crate) watched: bool,
}

impl From<Arc<dyn Channel>> for Incoming {
    /// A main channel alone.
    fn from(main: Arc<dyn Channel>) -> Self {
        Incoming {
            main,
            first: Vec::new(),
            offset: 0,
            pages: Vec::new(),
            settings: None,
            page_channels_called: false,
            misfit: None,
            preempt: None,
            file: None,
            watched: false,
        }
    }
}
