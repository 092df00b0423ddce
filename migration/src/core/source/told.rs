//! What the driver tells of the actions that it has performed.

use super::phase::{Phase, Postcopy, Rest, Snapshot, Step, Stopped};
use super::{DeviceSize, Sent, SourceCore};
use crate::{MigrationError, SavedDevices};
use std::io;
use std::time::Duration;

impl SourceCore {
    /// This was sent.
    pub fn sent(&mut self, sent: Sent) {
        self.transferred = self.transferred.saturating_add(sent.bytes);
        self.limiter.sent(sent.bytes);
        self.differences = self.differences.saturating_add(sent.differences);
        let ram = &mut self.statistics.ram;
        ram.transferred = self.transferred;
        ram.normal = ram.normal.saturating_add(sent.normal);
        ram.duplicate = ram.duplicate.saturating_add(sent.zero);
        let gone = sent.normal.saturating_add(sent.zero).saturating_add(sent.differences).saturating_mul(ram.page_size);
        ram.remaining = ram.remaining.saturating_sub(gone);
        if self.departed {
            ram.postcopy_bytes += sent.bytes;
        }
    }

    /// The dirty log has this word: bit `i` of `word` is page `64 * word_number + i` of the block.
    pub fn found(&mut self, block: usize, word_number: usize, word: u64) {
        if self.look_ahead {
            self.sweep.defer(block, word_number, word);
        } else {
            self.found += self.sweep.add(block, word_number, word);
        }
    }

    /// The guest is paused. `was_running` is whether it ran before.
    pub fn paused(&mut self, was_running: bool) {
        if let Some(pause) = &mut self.pause {
            pause.was_running = was_running;
        }
    }

    /// What remains of the iterative devices.
    pub fn device_sizes(&mut self, mut sizes: Vec<DeviceSize>) {
        sizes.resize(self.options.devices.len(), DeviceSize::default());
        self.initial.told |= sizes.iter().any(|size| size.initial > 0);
        self.sizes = sizes;
    }

    /// The next state of an iterative device; empty if there is none at the moment.
    pub fn device_state(&mut self, state: &[u8]) -> Result<(), MigrationError> {
        // What was not asked for has no section to go to.
        let asked = match &self.phase {
            Phase::Precopy(_, Step::DeviceRead { .. }) => true,
            Phase::Completing(rest) => matches!(rest.step, Rest::DeviceRead(_)),
            _ => false,
        };
        if !asked {
            return Ok(());
        }
        self.record = state.len() as u64;
        self.device_record(state)
    }

    /// This many of the bytes that were sent went over page channels.
    pub fn sent_by_channels(&mut self, bytes: u64) {
        self.statistics.ram.multifd_bytes += bytes;
    }

    /// This many synchronisations of page channels came after copies alone (capability `zero-copy-send`).
    pub fn synchronised_by_copies(&mut self, count: u64) {
        self.statistics.ram.dirty_sync_missed_zero_copy += count;
    }

    /// This many bytes of the devices' state went over page channels.
    pub fn devices_transferred(&mut self, bytes: u64) {
        self.statistics.device_bytes += bytes;
    }

    /// This many sent bytes have not reached the peer's host.
    pub fn backlog(&mut self, bytes: u64) {
        self.backlog = bytes;
    }

    /// The devices were saved.
    pub fn devices_saved(&mut self, devices: SavedDevices) {
        match &mut self.phase {
            Phase::Stopped(Stopped::Saved(saved)) | Phase::Snapshot(Snapshot::Saved(saved)) => *saved = Some(devices),
            _ => {}
        }
    }

    /// The end of the stream was sent, or some of it and then no more. (If nothing got out, the action has
    /// [failed](Self::failed).)
    pub fn end_sent(&mut self, result: Result<(), MigrationError>, now: Duration) {
        self.account_for_pause(now);
        match &mut self.phase {
            Phase::Ending => self.phase = Phase::AwaitVerdict { sent: result, since: now, heard_out: None },
            Phase::Postcopy(Postcopy::Ending(sent)) => *sent = Some(result),
            _ => {}
        }
    }

    /// Everything was taken, or not.
    pub fn settled(&mut self, result: io::Result<()>) {
        match &mut self.phase {
            Phase::Settling(settled) => *settled = Some(result),
            Phase::Snapshot(Snapshot::Settled(settled)) => *settled = result,
            _ => {}
        }
    }

    /// It is too late to cancel, or the operator has cancelled before.
    pub fn committed(&mut self, result: Result<(), MigrationError>) {
        if let Phase::Committing { committed, .. } | Phase::Postcopy(Postcopy::Committing { committed, .. }) =
            &mut self.phase
        {
            *committed = Some(result);
        }
    }

    /// The confirmation was sent, or not.
    pub fn confirmed(&mut self, result: io::Result<()>) {
        if let Phase::Confirming { sent, .. } = &mut self.phase {
            *sent = Some(result);
        }
    }

    /// The guest goes on here, or cannot.
    pub fn resumed(&mut self, result: Result<(), crate::GuestError>) {
        match &mut self.phase {
            Phase::Snapshot(Snapshot::GoesOn { result: went_on, .. }) => *went_on = result,
            _ => self.came_back(result),
        }
    }

    /// The last action has failed.
    ///
    /// `return_path` is whether the destination may say why.
    pub fn failed(&mut self, error: MigrationError, now: Duration, return_path: bool) {
        // The destination runs the guest, or does not yet.
        let error = if matches!(self.phase, Phase::Confirming { .. }) { self.unsettled(error) } else { error };
        self.fail(error, now, return_path);
    }
}
