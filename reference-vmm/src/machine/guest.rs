//! The machine as the engines see it.

use super::running_log::RunningLog;
use super::{Machine, RunState};
use crate::memory::{BIOS, PAGE_SIZE, RamBlock, Userfault, WriteProtection};
use qevm_microvm::MACHINE_TYPE;
use qevm_microvm::sections::{self, has_device};
use qevm_microvm::state::MachineState;
use qevm_migration::{
    DeviceSection, Devices, DirtyLog, Guest, GuestError, Hooks, IterativeDevice, MissingPages, ProtectedPages, RamView,
    SavedDevices,
};
use qevm_wire::{CountedString, Profile};
use std::ops::Range;
use std::time::Duration;
use vm_memory::VolatileSlice;

impl Guest for Machine {
    fn machine_type(&self) -> &str {
        MACHINE_TYPE
    }

    fn ram(&self) -> Vec<RamView<'_>> {
        let view = |block: &'_ RamBlock| -> VolatileSlice<'_> {
            // SAFETY: a block stays mapped, `used_length` bytes at least, as long as it lives, and the view borrows the
            // machine, which holds it.
            unsafe { VolatileSlice::new(block.host_address(), block.used_length() as usize) }
        };
        // The firmware is loaded before a migration arrives; all other blocks are empty until the guest runs, but for a
        // file that others have written, and for what devices of the host write.
        let alone = !self.has_kernel() && self.vfio().logs().is_empty();
        let pristine = |b: &RamBlock| b.name() != BIOS && b.is_fresh() && alone;
        let blocks = self.memory().blocks().iter();
        blocks.map(|b| RamView { name: b.name(), memory: view(b), pristine: pristine(b) }).collect()
    }

    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        Ok(Box::new(RunningLog::start(self)?))
    }

    fn pause(&self) -> Result<bool, GuestError> {
        let was_running = self.run_state() == RunState::Running;
        Machine::pause(self);
        if let Err(error) = self.vfio().save() {
            if was_running {
                Machine::resume(self)?;
            }
            return Err(error.into());
        }
        Ok(was_running)
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(Machine::resume(self)?)
    }

    fn resize_ram(&self, block: usize, used_length: u64) -> Result<(), GuestError> {
        let block = self.memory().blocks().get(block).ok_or("no such RAM block")?;
        Ok(block.resize(used_length)?)
    }

    fn devices(&self) -> &dyn Devices {
        self
    }

    fn hooks(&self) -> &dyn Hooks {
        self
    }
}

impl Devices for Machine {
    fn save(&self, profile: &Profile, running: bool) -> Result<SavedDevices, GuestError> {
        if running {
            self.catch_up_clock()?;
        }
        Ok(sections::save(&self.save_state()?, profile, running)?)
    }

    fn has(&self, idstr: &CountedString, instance_id: u32) -> bool {
        has_device(idstr, instance_id, self.cpus(), self.has_rtc(), self.pci_slots().as_deref(), self.virtio())
    }

    fn advice(&self, idstr: &CountedString) -> String {
        sections::advice(idstr).into()
    }

    fn iterative(&self) -> Vec<&dyn IterativeDevice> {
        self.vfio().iterative()
    }

    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError> {
        // Nothing has run here, so this is still its state; but for the real-time clock, which is left alone if none
        // arrives.
        let mut state = MachineState { rtc: None, ..self.fresh_state()? };
        let running = sections::load(devices, &sections::newest(), &mut state)?;
        self.load_state(&state)?;
        // The RAM has come before the devices.
        self.check_virtio()?;
        self.vfio().loaded()?;
        Ok(running)
    }
}

impl Hooks for Machine {
    fn prepare(&self) {
        // A device that cannot be saved is reported when it comes to that.
        let rehearsed: Result<(), GuestError> =
            self.fresh_state().map_err(Into::into).and_then(|state| Ok(sections::rehearse(&state)?));
        if let Err(error) = rehearsed {
            tracing::debug!(error, "the devices could not be rehearsed");
        }
    }

    fn host_page_size(&self, block: usize) -> u64 {
        self.memory().blocks().get(block).map_or(PAGE_SIZE, |block| block.host_page_size())
    }

    fn shares(&self, block: usize) -> bool {
        self.memory().blocks().get(block).is_some_and(|block| block.is_shared_file())
    }

    fn missing_pages(&self) -> Result<Box<dyn MissingPages>, GuestError> {
        let vcpus = self.vcpus.clone();
        let vcpu_of = move |tid| vcpus.iter().position(|vcpu| vcpu.has_thread(tid));
        Ok(Box::new(Userfault::new(self.memory().clone())?.with_vcpus(self.cpus(), vcpu_of)))
    }

    fn protected_pages(&self) -> Result<Box<dyn ProtectedPages>, GuestError> {
        Ok(Box::new(WriteProtection::new(self.memory().clone())?))
    }

    fn activate(&self) -> Result<(), GuestError> {
        Ok(Machine::activate(self)?)
    }

    fn inactivate(&self) {
        Machine::inactivate(self);
    }

    fn throttle(&self, per_cent: u8) -> Result<(), GuestError> {
        Ok(Machine::throttle(self, per_cent)?)
    }

    fn limit_dirty_rate(&self, mib_per_second: Option<u64>, period: Duration) -> Result<(), GuestError> {
        self.set_dirty_limit_period(period);
        Ok(Machine::limit_dirty_rate(self, None, mib_per_second)?)
    }

    fn release(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        Ok(self.memory().blocks().get(block).ok_or("no such RAM block")?.release(bytes)?)
    }
}

// Pages of the wire are those of the log.
const _: () = assert!(PAGE_SIZE == 4096);
