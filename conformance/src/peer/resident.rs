//! The memory that a host holds for a source whose guest has gone.

use super::endpoint::Endpoint;
use anyhow::{Context, Result, ensure};
use std::fs;

const MIB: u64 = 1 << 20;
/// What a guest of [`Departure::load`](super::Departure::load) writes to again and again: all of it is given back.
const WRITTEN: u64 = 16 * MIB;
/// What a monitor may let go of besides.
const SLACK: u64 = 8 * MIB;

/// Bytes of memory that the host holds for a monitor, but for the programs that it has read so far: those grow with
/// what it does for the first time.
pub(super) fn resident(endpoint: &mut Endpoint) -> Result<u64> {
    let path = format!("/proc/{}/smaps_rollup", endpoint.monitor().pid());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let field = |name: &str| {
        let kib =
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.with_context(|| format!("smaps_rollup has no {name}"))
    };
    Ok((field("Pss_Anon:")? + field("Pss_Shmem:")?) << 10)
}

/// That the source, which held `before` bytes when its guest began to leave before its memory, has given that back
/// where it is to, and nowhere else.
pub(super) fn judge(capabilities: &[&str], before: u64, here: &mut Endpoint) -> Result<()> {
    let (after, releases) = (resident(here)?, capabilities.contains(&"release-ram"));
    let holds = if releases { after + WRITTEN <= before } else { after + SLACK > before };
    ensure!(holds, "the source held {before} bytes before and {after} after, and release-ram is {releases}");
    Ok(())
}
