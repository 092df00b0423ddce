//! A thread that writes pages to their places in a file.

use super::Queue;
use super::queue::Work;
use crate::page_file::Saving;
use crate::{Guest, MigrationError};

/// Writes what `queue` has until it ends. A failure ends the queue for all threads. Nothing tells threads apart in the
/// file.
pub(crate) fn save_pages(guest: &dyn Guest, saving: &Saving, queue: &Queue) {
    if let Err(error) = run(guest, saving, queue) {
        queue.fail(error);
    }
}

fn run(guest: &dyn Guest, saving: &Saving, queue: &Queue) -> Result<(), MigrationError> {
    let views = guest.ram();
    let mut synced = 0;
    loop {
        match queue.next(synced) {
            Work::Pages(batch) => {
                if let Some(view) = views.get(batch.block) {
                    queue.sent(saving.save(batch.block, view, &batch.pages)?);
                }
            }
            // All that was queued before is written by now, or by the thread that has taken it, which synchronises
            // after it.
            Work::Sync => {
                synced += 1;
                queue.synced();
            }
            // Files have no room for devices' state.
            Work::Transfer(transfer) => queue.transferred(transfer, true),
            Work::End => return Ok(()),
        }
    }
}
