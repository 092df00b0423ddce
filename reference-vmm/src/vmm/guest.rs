//! The machine as a migration sees it.

use super::{RunState, Vmm};
use qevm_migration::dirty_rate::LogClaim;
use qevm_migration::{
    DeviceSection, Devices, DirtyLog, Guest, GuestError, Hooks, IterativeDevice, MissingPages, ProtectedPages, RamView,
    SavedDevices,
};
use qevm_wire::{CountedString, Profile};
use std::ops::Range;
use std::time::Duration;

/// The dirty log of a migration, which is the only one to have it. The log ends before the claim.
struct ClaimedLog<'v> {
    log: Box<dyn DirtyLog + 'v>,
    _claim: LogClaim<'v>,
}

impl DirtyLog for ClaimedLog<'_> {
    fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
        self.log.read(found)
    }

    fn reset(&mut self, block: usize, pages: Range<u64>) -> Result<(), GuestError> {
        self.log.reset(block, pages)
    }
}

impl Vmm {
    /// A device refused to leave when the guest had been paused for that: it goes on, or stays paused as it was.
    fn take_back(&self, was_running: bool) {
        if !was_running {
            return self.stay_stopped();
        }
        if let Err(error) = self.start() {
            tracing::error!("the guest cannot go on ({error}): fix the cause, then issue 'cont'");
            self.lock().run_state = RunState::Paused;
        }
    }
}

/// The machine, with the run state kept and events told.
impl Guest for Vmm {
    fn machine_type(&self) -> &str {
        self.machine.machine_type()
    }

    fn ram(&self) -> Vec<RamView<'_>> {
        // What an incoming migration has left that failed is still there when the next one comes.
        let tried = self.lock().tried;
        self.machine.ram().into_iter().map(|view| RamView { pristine: view.pristine && !tried, ..view }).collect()
    }

    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        let claim = self.dirty_rate.take_log();
        Ok(Box::new(ClaimedLog { log: self.machine.start_dirty_log()?, _claim: claim }))
    }

    fn pause(&self) -> Result<bool, GuestError> {
        match self.pause_for_migration() {
            (was_running, None) => match self.machine.vfio().save() {
                Ok(()) => Ok(was_running),
                Err(error) => {
                    self.take_back(was_running);
                    Err(error.into())
                }
            },
            // The monitor ends, or waits to be told what to do: the destination must not run it on.
            (_, Some(stop)) => Err(stop.to_string().into()),
        }
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.start()
    }

    fn resize_ram(&self, block: usize, used_length: u64) -> Result<(), GuestError> {
        self.machine.resize_ram(block, used_length)
    }

    fn devices(&self) -> &dyn Devices {
        self
    }

    fn hooks(&self) -> &dyn Hooks {
        self
    }
}

impl Devices for Vmm {
    fn save(&self, profile: &Profile, running: bool) -> Result<SavedDevices, GuestError> {
        let _transition = self.transition();
        let saved = self.machine.devices().save(profile, running)?;
        self.lock().saved = true;
        Ok(saved)
    }

    fn has(&self, idstr: &CountedString, instance_id: u32) -> bool {
        self.machine.devices().has(idstr, instance_id)
    }

    fn advice(&self, idstr: &CountedString) -> String {
        self.machine.devices().advice(idstr)
    }

    fn iterative(&self) -> Vec<&dyn IterativeDevice> {
        self.machine.devices().iterative()
    }

    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError> {
        let _transition = self.transition();
        let running = self.machine.devices().load(devices)?;
        self.lock().loaded = true;
        Ok(running)
    }
}

impl Hooks for Vmm {
    fn prepare(&self) {
        self.machine.hooks().prepare();
        if self.run_state() == RunState::Inmigrate {
            self.machine.vfio().receive();
        }
    }

    fn stay_stopped(&self) {
        let mut state = self.lock();
        // One that has stopped by itself is not to be taken for one that runs.
        if state.run_state == RunState::FinishMigrate && state.before_migration != RunState::Running {
            state.run_state = state.before_migration;
        }
        state.saved = false;
    }

    fn host_page_size(&self, block: usize) -> u64 {
        self.machine.hooks().host_page_size(block)
    }

    fn shares(&self, block: usize) -> bool {
        self.machine.hooks().shares(block)
    }

    fn missing_pages(&self) -> Result<Box<dyn MissingPages>, GuestError> {
        self.machine.hooks().missing_pages()
    }

    fn protected_pages(&self) -> Result<Box<dyn ProtectedPages>, GuestError> {
        self.machine.hooks().protected_pages()
    }

    fn activate(&self) -> Result<(), GuestError> {
        self.machine.hooks().activate()
    }

    fn inactivate(&self) {
        self.machine.hooks().inactivate();
    }

    fn throttle(&self, per_cent: u8) -> Result<(), GuestError> {
        Ok(self.machine.throttle(per_cent)?)
    }

    fn limit_dirty_rate(&self, mib_per_second: Option<u64>, period: Duration) -> Result<(), GuestError> {
        self.machine.hooks().limit_dirty_rate(mib_per_second, period)
    }

    fn release(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        self.machine.hooks().release(block, bytes)
    }

    fn handed_over(&self) {
        let mut state = self.lock();
        state.run_state = RunState::Postmigrate;
        state.saved = false;
        state.given_away = state.shares;
    }
}
