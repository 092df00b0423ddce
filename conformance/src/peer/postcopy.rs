//! Guests that go before their memory.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::party::Party;
use crate::patience::PATIENCE;

/// When the operator lets a guest go before its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// As soon as the migration has begun: nearly all of its memory comes later.
    AtOnce,
    /// When all of its memory was sent once: what it has written to since comes later.
    AfterPass,
}

impl Departure {
    /// Lets the guest go, whose migration was begun.
    pub(super) fn start(self, here: &mut Party) -> Result<()> {
        if self == Departure::AfterPass {
            // The log is read before each pass.
            let read = |migration: &Value| migration["ram"]["dirty-sync-count"].as_u64() >= Some(2);
            let passed = here.monitor().wait_migration(PATIENCE, read)?;
            ensure!(passed["status"] == "active", "the guest has gone with its memory: {passed}");
        }
        here.monitor().execute("migrate-start-postcopy", Value::Null).map(drop)
    }

    /// That memory came after the guest, in a migration that the source says has completed.
    pub(super) fn judge(self, done: &Value) -> Result<()> {
        let ram = &done["ram"];
        let (later, total) = (ram["postcopy-bytes"].as_u64(), ram["total"].as_u64());
        ensure!(later > Some(0), "no memory came after the guest: {done}");
        ensure!(ram["postcopy-requests"].as_u64() > Some(0), "the guest has waited for no page: {done}");
        ensure!(self != Departure::AfterPass || later < total, "all memory came after the guest: {done}");
        Ok(())
    }
}
