//! The connections of a source.

use crate::page_file::PageFile;
use crate::{Address, Channel};
use std::sync::{Arc, OnceLock};

/// Who reads what a source sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// A destination, over something with two directions: it is asked to answer.
    Answers,
    /// A destination perhaps, which is asked to answer only under capability `return-path`.
    Silent,
    /// No process for now: a file.
    Nobody,
}

/// The connections of a source.
#[derive(Debug, Clone)]
pub struct Outgoing {
    pub(crate) main: Arc<dyn Channel>,
    pub(crate) reader: Reader,
    pub(crate) pages: Vec<Arc<dyn Channel>>,
    /// The page channels have sent their first packets.
    pub(crate) greeted: bool,
    /// Pages have their places in this file, in which the main channel writes, too.
    pub(crate) file: Option<PageFile>,
    /// Where further connections go, if there can be any.
    pub(crate) address: Option<Address>,
    /// The connection of its own for pages that the guest waits for (capability `postcopy-preempt`).
    pub(crate) preempt: OnceLock<Arc<dyn Channel>>,
    /// The waits on them have deadlines.
    pub(crate) watched: bool,
}

impl Outgoing {
    /// The preempt channel, when it was opened.
    pub(crate) fn preempt(&self) -> Option<&Arc<dyn Channel>> {
        self.preempt.get()
    }

    /// Ends all connections at once.
    pub(crate) fn close(&self) {
        self.all().for_each(|channel| channel.close());
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<dyn Channel>> {
        std::iter::once(&self.main).chain(&self.pages).chain(self.preempt())
    }
}

impl From<Arc<dyn Channel>> for Outgoing {
    /// A main channel alone. The destination is asked to answer if capability `return-path` is on.
    fn from(main: Arc<dyn Channel>) -> Self {
        let (pages, preempt) = (Vec::new(), OnceLock::new());
        Outgoing {
            main,
            reader: Reader::Silent,
            pages,
            greeted: false,
            file: None,
            address: None,
            preempt,
            watched: false,
        }
    }
}
