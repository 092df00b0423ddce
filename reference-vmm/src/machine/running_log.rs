//! The dirty log of a migration: what the vCPUs, the monitor and VFIO devices write to.

use super::{Machine, RunState};
use crate::dirty_log::{DirtyBitmap, PAGES_PER_WORD};
use crate::error::Result;
use crate::vfio::Tracking;
use qevm_migration::{DirtyLog, GuestError};
use std::ops::Range;

/// The block that devices reach.
const RAM: usize = 0;

/// The logs while they run.
pub(super) struct RunningLog<'m> {
    machine: &'m Machine,
    /// What the last reading of KVM's log and of the monitor's writes had and was not reset since, by block, 64 pages
    /// to a word.
    reported: Vec<Vec<u64>>,
    /// What devices wrote to and was not reset since, in the RAM. Their logs, unlike KVM's, forget what they have told.
    by_devices: Vec<u64>,
    /// Of some device it is unknown what it writes to, so that all of RAM counts as written to when it has worked.
    untold: bool,
    /// How often devices had begun to work when all of RAM last counted so, and whether they worked on then.
    counted: Option<u64>,
}

impl<'m> RunningLog<'m> {
    pub(super) fn start(machine: &'m Machine) -> Result<RunningLog<'m>> {
        let mut log =
            RunningLog { machine, reported: Vec::new(), by_devices: Vec::new(), untold: false, counted: None };
        machine.dirty_log().enable()?;
        for devices in machine.vfio().logs() {
            log.untold |= devices.start() == Tracking::Nobody;
        }
        if log.untold {
            tracing::warn!(
                "it is not known which pages VFIO devices write to: all of RAM is sent once more when the guest has stopped"
            );
        }
        log.by_devices = vec![0; machine.memory().ram().pages().div_ceil(PAGES_PER_WORD) as usize];
        if machine.run_state() != RunState::Running {
            // They do nothing.
            log.counted = Some(machine.vfio().starts());
        }
        Ok(log)
    }

    /// Adds what devices have written to.
    fn read_devices(&mut self) -> Result<(), GuestError> {
        let vfio = self.machine.vfio();
        for log in vfio.logs() {
            let by_devices = &mut self.by_devices;
            log.report(&mut |first, words| {
                let first = (first / PAGES_PER_WORD) as usize;
                by_devices.iter_mut().skip(first).zip(words).for_each(|(into, word)| *into |= word);
            })
            .map_err(|error| format!("the log of the pages that devices write to cannot be read: {error}"))?;
        }
        let starts = vfio.starts();
        if self.untold && self.counted != Some(starts) && self.machine.control.all_parked() {
            self.by_devices.fill(u64::MAX);
            self.counted = Some(starts);
        }
        Ok(())
    }
}

impl DirtyLog for RunningLog<'_> {
    fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
        let memory = self.machine.memory();
        let mut dirty = DirtyBitmap::none(memory);
        self.machine.dirty_log().sync(&mut dirty)?;
        self.reported = (0..memory.blocks().len()).map(|block| dirty.take(block, 0, usize::MAX >> 1)).collect();
        self.read_devices()?;
        dirty.add(RAM, 0, &self.by_devices);
        // Without the bits beyond the end.
        self.by_devices = dirty.take(RAM, 0, usize::MAX >> 1);
        for (block, words) in self.reported.iter().enumerate() {
            let by_devices = if block == RAM { &self.by_devices[..] } else { &[] };
            let by_devices = by_devices.iter().copied().chain(std::iter::repeat(0));
            words.iter().zip(by_devices).enumerate().for_each(|(i, (word, other))| found(block, i, word | other));
        }
        Ok(())
    }

    fn reset(&mut self, block: usize, pages: Range<u64>) -> Result<(), GuestError> {
        let words = self.reported.get_mut(block).ok_or("no such RAM block")?;
        let first = (pages.start / PAGES_PER_WORD) as usize;
        let last = (pages.end.div_ceil(PAGES_PER_WORD) as usize).min(words.len());
        let words = words.get_mut(first..last).ok_or("no such pages")?;
        // KVM is given its own pages alone.
        self.machine.dirty_log().clear(block, pages.start, words)?;
        words.fill(0);
        if block == RAM {
            self.by_devices.get_mut(first..last).into_iter().for_each(|words| words.fill(0));
        }
        Ok(())
    }
}

impl Drop for RunningLog<'_> {
    fn drop(&mut self) {
        self.machine.vfio().logs().iter().for_each(|log| log.stop());
        if let Err(error) = self.machine.dirty_log().disable() {
            tracing::error!(%error, "the dirty log cannot be stopped: the guest runs slower than it could");
        }
    }
}
