//! From when on memory is missing.

use super::missing::{Block, LISTEN, Shared};
use super::preempt::Preempt;
use crate::ram_receiver::Listed;
use crate::watch::Watch;
use crate::{Channel, Guest, MigrationError};
use qevm_returnpath::requests::{RequestBlock, RequestBlocks};
use qevm_savevm::ram::RamBlocks;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Memory that is missing, and a thread that asks for what is touched.
pub(crate) struct Listening {
    pub(super) shared: Arc<Shared>,
    pub(super) asker: Option<JoinHandle<()>>,
}

impl Listening {
    /// Empties what has not come of `blocks`, or is old, and makes it missing. `block_times` says that it is counted
    /// how long the guest waits.
    pub(crate) fn start(
        guest: &dyn Guest,
        blocks: &[Listed],
        channel: Arc<dyn Channel>,
        block_times: bool,
        waits: Arc<Watch>,
    ) -> Result<Self, MigrationError> {
        let pages = guest.hooks().missing_pages().map_err(MigrationError::guest(LISTEN))?;
        let views = guest.ram();
        let (mut missing, mut requested) = (Vec::with_capacity(blocks.len()), Vec::with_capacity(blocks.len()));
        for listed in blocks {
            let number = views.iter().position(|view| listed.name == *view.name);
            let (Some(number), Some(received)) = (number, &listed.received) else {
                let why = format!("it is not known which pages of RAM block '{}' have come", listed.name);
                return Err(MigrationError::Guest { doing: LISTEN, source: why.into() });
            };
            let block = Block::empty(&*pages, number, listed, received)?;
            let (name, used_length) = (listed.name.clone(), listed.used_length);
            requested.push(RequestBlock { name, used_length, page_size: block.unit });
            missing.push(block);
        }
        let requested = RequestBlocks::new(requested).map_err(|error| MigrationError::guest(LISTEN)(error.into()))?;
        let shared = Arc::new(Shared::new(pages, missing, requested, channel, block_times, waits));
        let asking = shared.clone();
        let asker = thread::Builder::new().name("page-requests".into()).spawn(move || asking.ask());
        let asker = asker.map_err(|error| MigrationError::guest("start a thread for missing pages")(error.into()))?;
        Ok(Listening { shared, asker: Some(asker) })
    }
}

impl Listening {
    /// The same with a preempt channel, over which pages of `blocks` come.
    pub(crate) fn with_preempt(self, preempt: Option<Preempt>, blocks: Arc<RamBlocks>) -> Self {
        if let Some(preempt) = preempt {
            // It was not set before.
            let blocks = self.shared.urgent_blocks.get_or_init(|| blocks).clone();
            self.shared.read_urgent(preempt, blocks);
        }
        self
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Otherwise it goes on elsewhere.
        if let Some(asker) = self.asker.take() {
            self.shared.stop_asking();
            self.shared.end_urgent();
            // It has reported what went wrong.
            let _ = asker.join();
        }
    }
}
