//! Migrations into files by `exec:`, which every release knows.
//!
//! QEMU says that such a migration has completed when its command has got the last byte, and does not wait for the
//! command. So the command gives the file its name when it has written all of it.

use crate::launch::Qemu;
use crate::patience::PATIENCE;
use anyhow::{Result, ensure};
use serde_json::json;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(5);

/// What `migrate` takes as `uri`.
pub(crate) fn uri(path: &Path) -> String {
    let path = path.display();
    format!("exec:cat > {path}.part && mv {path}.part {path}")
}

/// Waits until the file of a migration that has completed is whole.
///
/// # Errors
/// It does not come.
pub(crate) fn finish(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        ensure!(Instant::now() < deadline, "the command did not write {}", path.display());
        thread::sleep(POLL);
    }
    Ok(())
}

/// Migrates a guest into a file, and waits until it is there.
///
/// # Errors
/// QEMU refuses, or the migration fails.
pub(crate) fn save(qemu: &mut Qemu, path: &Path) -> Result<()> {
    qemu.execute("migrate", json!({ "uri": uri(path) }))?;
    qemu.wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
    finish(path)
}
