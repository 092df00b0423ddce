//! A postcopy that goes on over another connection.

use super::{Doing, Source};
use crate::MigrationError;
use qevm_returnpath::Decoder;

impl Source {
    /// Whether another connection is waited for.
    pub(in crate::testing) fn is_interrupted(&self) -> bool {
        matches!(self.doing, Doing::Interrupted)
    }

    /// There is one.
    pub(in crate::testing) fn reconnect(&mut self) -> Result<(), MigrationError> {
        // Those were of the connections before.
        self.plan.faults.clear();
        self.heard.clear();
        self.queue.clear();
        self.batch.clear();
        (self.decoder, self.bitmap, self.closed, self.ended) = (Decoder::default(), None, false, false);
        self.doing = Doing::Idle;
        self.answers.as_mut().map_or(Ok(()), |answers| self.core.reconnected(answers))
    }

    /// There will be none.
    pub(in crate::testing) fn give_up(&mut self) {
        self.doing = Doing::Idle;
    }
}
