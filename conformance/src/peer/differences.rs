//! Whether a source has sent differences to what it has sent before (capability `xbzrle`).

use super::endpoint::Endpoint;
use crate::patience::PATIENCE;
use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// More pages than this have to go as differences, which a guest on a busy host takes long to write to.
const PAGES: u64 = 100;
/// `max-bandwidth` from then on, bytes a second.
const MAX_BANDWIDTH: u64 = 16 << 20;
/// `downtime-limit` from then on, ms.
const DOWNTIME_LIMIT: u64 = 50;

/// Lets the migration complete when enough was sent as differences.
pub(super) fn let_complete(source: &mut Endpoint) -> Result<()> {
    let enough = |migration: &Value| migration["xbzrle-cache"]["pages"].as_u64() > Some(PAGES);
    source.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed" || enough(migration))?;
    let limits = json!({ "max-bandwidth": MAX_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT });
    source.monitor().set_parameters(&limits)?;
    Ok(())
}

/// What the source of a migration that has completed says must be small differences.
pub(super) fn judge(done: &Value) -> Result<()> {
    let cache = &done["xbzrle-cache"];
    // The guest rewrites six words of most pages, and that is less than 100 bytes.
    let saved = cache["pages"].as_u64().zip(cache["bytes"].as_u64());
    let saved = saved.is_some_and(|(pages, bytes)| pages > PAGES && bytes < 400 * pages);
    ensure!(saved, "the source has not sent small differences: {done}");
    Ok(())
}
